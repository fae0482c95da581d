"""Damage checkpoints: of a pretrained model, and of a model after surgery."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

import phasegate
from phasegate.model.classifier import Model, ModelSpec
from phasegate.params.fields import override
from phasegate.pretraining.pretrain import pretrain
from phasegate.surgery.operations import ExpertManager
from phasegate.training import checkpoint
from phasegate.training.batches import Examples, load_examples
from phasegate.training.checkpoint import RECORD, WEIGHTS
from tests.damage import DEEP, ODD, PLACE, damage_file, damaged_tree
from tests.fuzz import Case
from tests.models import ARCHITECTURE
from tests.tiny_data import TRAINING, write_tiny_data

VALUES = [*ODD, "\ud800", "\0", 10**3, 10**6, 10**9, 10**12, 2**63 - 1, -(10**12), "nan", "NaN", [0], [1, 8], [8, 1]]
VALUES += [[0, 0], [-1], [1, 2, 3, 4], [10**12], [10**5] * 20, [4] * 1000, [1] * 50_000, [[4]], [1.5], {"kind": "moe"}]
VALUES += ["moe", "reference", "mlp", "%s %d {0}"]
SNIPPETS: list[str] = []  # JSON that no Python value is dumped as
SNIPPETS += ["1" + "0" * 5000, "-" + "9" * 100_000, "1e999999", "-1e999999", "1e-999999", "0123", "1.", ".5", "+1"]
SNIPPETS += ["0x10", "[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 900 + "]" * 900]
SNIPPETS += ["undefined", "", '{"a": 1, "a": 2}', '"\\ud800"', '"\\x"', '"', "'a'", "Infinity", "-NaN", "nan", "// a"]
SNIPPETS += ["1 2", "\x00", "\ufeff"]


def originals(folder: Path) -> tuple[list[Path], Examples]:
    """Return the folders of a tiny model and of a copy changed by surgery, and the data to verify them on."""
    torch.set_num_threads(1)
    gate = load_examples(write_tiny_data(folder / "prepared"), torch.device("cpu"))[2]
    first, second = folder / "first", folder / "second"
    first.mkdir()
    spec = ModelSpec(override(ARCHITECTURE, {"n_shared": 1}, ""), (1, 8), (4,))
    pretrain(first, prepared=folder / "prepared", phase="p7a", arm="baseline", seed=0, spec=spec, training=TRAINING,
             keep_optimizer=True)  # fmt: skip
    trial, noise = checkpoint.load(first, gate), torch.Generator().manual_seed(0)
    assert isinstance(trial.model, Model)
    for moe in trial.model.layers:
        manager = ExpertManager(moe, trial.optimizer)
        manager.split(0, torch.randn(16, generator=noise), 0.1)
        manager.clone(1)
        manager.remove(2)
    checkpoint.save(second, trial.model, trial.optimizer, trial.record, gate)
    checkpoint.load(second, gate)
    return [first, second], gate


def case(state: tuple[list[Path], Examples], draw: random.Random, folder: Path) -> Case:
    """Damage one checkpoint, which is then loaded, with data and without, and summarised."""
    (folders, gate), damaged = state, folder / "checkpoint"
    shutil.copytree(draw.choice(folders), damaged)
    weights, record = damaged / WEIGHTS, damaged / RECORD
    before = weights.read_bytes()
    match draw.choice(["record"] * 6 + ["weights"] * 4 + ["file"] * 4 + ["mixed"]):
        case "record":
            _damage_record(record, draw)
        case "weights":
            weights.write_bytes(damaged_weights(before, draw))
        case "file":
            damage_file(draw.choice([weights, weights, record, record, damaged]), draw)
        case "mixed":
            shutil.copy(draw.choice(folders) / WEIGHTS, weights)
    changed = not weights.is_file() or weights.stat().st_size != len(before) or weights.read_bytes() != before
    loads = (lambda: checkpoint.load(damaged, gate), lambda: phasegate.load(damaged, dataset=None))
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
    """Return a JSON text with other values, or with what is hardly JSON in their places."""
    values = [PLACE] if draw.random() < 0.3 else VALUES
    damaged = json.dumps(damaged_tree(json.loads(text), draw, values), ensure_ascii=draw.random() < 0.5)
    return damaged.replace(f'"{PLACE}"', draw.choice(SNIPPETS))


def damaged_weights(content: bytes, draw: random.Random) -> bytes:
    """Return a safetensors file with other tensors, or a header that lies."""
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
            shapes = [[], [0], [2**63], [2**32, 2**32], [10**12], [-1], [1.5], "a", None, [1] * 10**5]
            entry["shape"] = draw.choice(shapes)
        case "dtype":
            dtypes = ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "", 3, None]
            entry["dtype"] = draw.choice(dtypes)
        case "offsets":
            begin, end = entry["data_offsets"]
            offsets = [[0, end - begin], [end, begin], [begin, end + 4], [begin + 4, end], [2**62, 2**63]]
            entry["data_offsets"] = draw.choice([*offsets, [-4, 0], [begin], [], None])
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
        match draw.choice(["nan", "less", "rename", "more", "dtype", "flat", "longer", "shorter", "values"]):
            case "nan" if array.dtype.kind == "f":
                tensors[name] = np.full_like(array, draw.choice([np.nan, np.inf, -np.inf, 1e38, 0]))
            case "less":
                del tensors[name]
            case "rename":
                names = [f"{name}x", name[1:], "model.", "", "optimizer.", "../x", "\x1b[2J\n"]
                tensors[draw.choice(names)] = tensors.pop(name)
            case "more":
                tensors[f"{name}.{draw.choice(['more', 'step', 'exp_avg'])}"] = array
            case "dtype":
                tensors[name] = array.astype(draw.choice([np.float16, np.float64, np.int64, np.uint8, np.bool_]))
            case "flat":
                tensors[name] = draw.choice([array.ravel(), array[None], array.T.copy(), np.resize(array, ())])
            case "longer" if array.ndim:
                tensors[name] = np.concatenate([array] * draw.choice([2, 100]))
            case "shorter" if array.ndim:
                tensors[name] = array[: draw.randrange(len(array) + 1)]
            case "values":
                far = np.array(10**6).astype(array.dtype)
                tensors[name] = draw.choice([array - 1, array + far, -array]) if array.dtype != bool else ~array
    return {name: np.asarray(array, order="C") for name, array in tensors.items()}
