"""Damaged checkpoints: of a model as it was pretrained, and of one after surgery."""

import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch

import phasegate
from phasegate import checkpoint, data
from phasegate.checkpoint import RECORD, WEIGHTS
from phasegate.expert_manager import ExpertManager
from phasegate.model import Model, ModelSpec
from phasegate.pretraining import pretrain
from phasegate.pretraining_params import Architecture, Training
from phasegate.training import Examples, load_examples
from tests.damage import DEEP, damaged_bytes, damaged_tree, replaced
from tests.fuzz import Case

ARCHITECTURE = Architecture(
    stem="mlp", width=16, blocks=2, n_routed=5, n_shared=1, top_k=2, expert_width=8,
    dropout=0.1, balance_loss=0.01, balance_bias=0.001, z_loss=0.001,
)  # fmt: skip
TRAINING = Training(
    steps=20, batch=32, lr=0.01, warmup=5, weight_decay=0.01, label_smoothing=0.0, noise=0.1, shift=1
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *(None, "", " ", [], {}, [[]], [{}], "abc", "ключ", "\x1b[2J", "\ud800", "a\nb", "\0", "x" * 100_000, True, False),
    *(-1, 0, 1, 2, 3, 7, 10**3, 10**6, 10**9, 10**12, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**12)),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), "1", "nan", "NaN"),
    *([0], [1, 8], [8, 1], [0, 0], [-1], [1, 2, 3, 4], [10**12], [10**5] * 20, [4] * 1000, [1] * 50_000),
    *([[4]], [None], ["a"], [1.5]),
    *({"a": 1}, {"kind": "moe"}, "moe", "reference", "mlp", "conv", "../../etc/passwd", "/dev/zero", "%s %d {0}"),
)
SNIPPETS = (  # JSON that no Python value is dumped as
    *("1" + "0" * 5000, "-" + "9" * 100_000, "1e999999", "-1e999999", "1e-999999", "0123", "1.", ".5", "+1", "0x10"),
    *("[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 900 + "]" * 900, "undefined", ""),
    *('{"a": 1, "a": 2}', '"\\ud800"', '"\\x"', '"', "'a'", "Infinity", "-NaN", "nan", "// a", "1 2", "\x00", "\ufeff"),
)
PLACE = "placeholder_of_a_snippet"


class Originals(NamedTuple):
    """Checkpoints, and what they are verified on."""

    folders: list[Path]
    gate: Examples


def originals(folder: Path) -> Originals:
    """Train a tiny model, and change a copy of it by surgery."""
    torch.set_num_threads(1)
    gate = load_examples(prepared(folder / "prepared"), torch.device("cpu"))[2]
    first, second = folder / "first", folder / "second"
    first.mkdir()
    pretrain(
        first, prepared=folder / "prepared", phase="p7a", arm="baseline", seed=0,
        spec=ModelSpec(ARCHITECTURE, (1, 8), (4,)), training=TRAINING, keep_optimizer=True,
    )  # fmt: skip
    trial, noise = checkpoint.load(first, gate), torch.Generator().manual_seed(0)
    assert isinstance(trial.model, Model)
    for moe in trial.model.layers:
        manager = ExpertManager(moe, trial.optimizer)
        manager.split(0, torch.randn(16, generator=noise), 0.1)
        manager.clone(1)
        manager.remove(2)
    checkpoint.save(second, trial.model, trial.optimizer, trial.record, gate)
    checkpoint.load(second, gate)
    return Originals([first, second], gate)


def prepared(folder: Path) -> Path:
    """A prepared data set of 4 noisy classes."""
    draws = np.random.default_rng(0)
    centres = draws.normal(size=(4, 1, 8))

    def split(examples: int) -> data.Split:
        y = np.arange(examples) % 4
        return data.Split(centres[y] + draws.normal(0, 0.8, (examples, 1, 8)), y)

    splits = {"train": split(160), "signal": split(80), "gate": split(80), "test": split(40)}
    tasks = {"half": (0, 0, 1, 1)}
    data.save(folder, splits, name="tiny", class_names=("a", "b", "c", "d"), tasks=tasks, mean=(0.0,), std=(1.0,))
    return folder


def case(state: Originals, draw: random.Random, folder: Path) -> Case:
    """One damaged checkpoint, to be loaded, on data and without them, and summarised."""
    damaged = folder / "checkpoint"
    shutil.copytree(draw.choice(state.folders), damaged)
    weights, record = damaged / WEIGHTS, damaged / RECORD
    before = weights.read_bytes()
    match draw.choice(["record"] * 6 + ["weights"] * 4 + ["bytes"] * 3 + ["replaced", "mixed"]):
        case "record":
            _damage_record(record, draw)
        case "weights":
            weights.write_bytes(damaged_weights(before, draw))
        case "bytes":
            path = draw.choice([weights, record])
            path.write_bytes(damaged_bytes(path.read_bytes(), draw))
        case "replaced":
            replaced(draw.choice([weights, record, damaged]), draw)
        case "mixed":
            shutil.copy(draw.choice(state.folders) / WEIGHTS, weights)
    changed = not weights.is_file() or weights.stat().st_size != len(before) or weights.read_bytes() != before
    loads = (lambda: checkpoint.load(damaged, state.gate), lambda: phasegate.load(damaged, dataset=None))
    return Case(loads if changed else (*loads, lambda: checkpoint.summary(damaged)), harmful=changed)


def _damage_record(path: Path, draw: random.Random) -> None:
    text = path.read_text()
    if draw.random() < 0.05:
        padding = " " * draw.choice([1000, 1 << 20, 5 << 20])
        damaged = draw.choice([padding + text, text + padding, text.replace("{", "{" + padding, 1)])
    else:
        damaged = damaged_json(text, draw)
    path.write_bytes(damaged.encode(draw.choice(["utf-8"] * 9 + ["utf-8-sig", "utf-16"]), errors="surrogatepass"))


def damaged_json(text: str, draw: random.Random) -> str:
    """A JSON text with other values, or with what is hardly JSON in their places."""
    values = [PLACE] if draw.random() < 0.3 else VALUES
    damaged = json.dumps(damaged_tree(json.loads(text), draw, values), ensure_ascii=draw.random() < 0.5)
    return damaged.replace(f'"{PLACE}"', draw.choice(SNIPPETS))


def damaged_weights(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with other tensors, or a header that lies."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    if draw.random() < 0.4:
        return safetensors.numpy.save(_damaged_tensors(safetensors.numpy.load(content), draw))
    if draw.random() < 0.2:
        lie = draw.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**32, 10**8, 2**40, 2**63, 2**64 - 1])
        return lie.to_bytes(8, "little") + content[8:]
    name = draw.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    match draw.choice(["shape", "dtype", "offsets", "tree", "deep", "twice", "metadata"]):
        case "shape":
            entry["shape"] = draw.choice(
                [[], [0], [2**63], [2**32, 2**32], [10**12], [-1], [1.5], "a", None, [1] * 10**5]
            )
        case "dtype":
            entry["dtype"] = draw.choice(
                ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "", 3, None]
            )
        case "offsets":
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = draw.choice(
                [
                    [0, end - begin],
                    [end, begin],
                    [begin, end + 4],
                    [begin + 4, end],
                    [2**62, 2**63],
                    [-4, 0],
                    [begin],
                    [],
                    None,
                ]
            )
        case "tree":
            header = damaged_tree(header, draw, VALUES)
        case "deep":
            header[name] = PLACE
        case "twice":
            header[name + "2"] = entry
        case "metadata":
            header["__metadata__"] = draw.choice([{"a": "b"}, {"a": 1}, [], "a", None, {"a": "x" * 10**6}])
    damaged = json.dumps(header).replace(f'"{PLACE}"', draw.choice(SNIPPETS)).encode(errors="surrogatepass")
    return len(damaged).to_bytes(8, "little") + damaged + body


def _damaged_tensors(tensors: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    for _ in range(draw.choice([1, 1, 1, 3])):
        name = draw.choice(sorted(tensors))
        array = tensors[name]
        match draw.choice(["nan", "less", "rename", "more", "dtype", "flat", "longer", "shorter", "values", "prefix"]):
            case "nan" if array.dtype.kind == "f":
                tensors[name] = np.full_like(array, draw.choice([np.nan, np.inf, -np.inf, 1e38, 0]))
            case "less":
                del tensors[name]
            case "rename":
                tensors[draw.choice([f"{name}x", name[1:], "model.", "", "optimizer.", "../x", "\x1b[2J\n"])] = (
                    tensors.pop(name)
                )
            case "more":
                tensors[f"{name}.{draw.choice(['more', 'step', 'exp_avg'])}"] = array
            case "dtype":
                tensors[name] = array.astype(draw.choice([np.float16, np.float64, np.int64, np.uint8, np.bool_]))
            case "flat":
                tensors[name] = draw.choice([array.ravel(), array[None], array.T.copy(), array.ravel()[:1].reshape(())])
            case "longer" if array.ndim:
                tensors[name] = np.concatenate([array] * draw.choice([2, 100]))
            case "shorter" if array.ndim:
                tensors[name] = array[: draw.randrange(len(array) + 1)]
            case "values":
                tensors[name] = draw.choice([array - 1, array + 10**6, -array]) if array.dtype != bool else ~array
            case "prefix":
                for key in [key for key in tensors if key.startswith(name.rpartition(".")[0])]:
                    del tensors[key]
                tensors["model.x"] = array
    return {name: np.asarray(array, order="C") for name, array in tensors.items()}
