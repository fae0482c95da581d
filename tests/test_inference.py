"""A trained model gives the same bits outside the pipeline as inside."""

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import phasegate
from phasegate.base.errors import UserError
from phasegate.data_sets.prepare import channel_moments, standardise
from phasegate.model.classifier import Model, ModelSpec, Network
from phasegate.model.references import Reference, ReferenceSpec
from phasegate.model.routing_statistics import expert_signals
from phasegate.params import load_params
from phasegate.params.fields import override
from phasegate.records.prepared import Split, save
from phasegate.surgery.operations import ExpertManager
from phasegate.training import checkpoint
from phasegate.training.batches import Examples
from phasegate.training.losses import load_balance
from phasegate.training.predictions import EVALUATION_BATCH, predict
from tests.models import ARCHITECTURE
from tests.small_study import ROOT
from tests.test_checkpoint import edit_weights
from tests.test_docs import blocks
from tests.test_moe import chain
from tests.tiny_data import TRAINING

RAW = np.random.default_rng(0).integers(0, 256, (60, 1, 8), dtype=np.uint8)
MOMENTS = channel_moments(RAW)
SEED = f"seed-{load_params(ROOT / 'params.yaml').seeds.first}"  # as docs/models.md names it


def grown(input_shape: tuple[int, ...], n_gates: int, **changes: Any) -> Model:
    """Make an untrained classifier with three heads, whose first block has a family of three different experts."""
    torch.manual_seed(0)
    model = Model(ModelSpec(override(ARCHITECTURE, changes, ""), input_shape, (4, 2, 2), n_gates))
    manager = ExpertManager(model.layers[0])
    for _ in range(2):
        manager.split(0, torch.randn(model.spec.architecture.width), 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save_model(folder: Path, model: Network, gate: Examples | None = None) -> Path:
    record = checkpoint.Record(phase="p7b2", arm="split", seed=0, training=TRAINING, n_routed_start=5)
    gate = gate or Examples(torch.randn(20, *model.spec.input_shape), torch.arange(20) % 4)
    checkpoint.save(folder, model, None, record, gate)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a study of bytes, standardised, with a model that was split and one of several tasks and gates."""
    folder = tmp_path_factory.mktemp("study")
    split = Split(standardise(RAW, *MOMENTS), np.arange(len(RAW)) % 4)
    names, tasks = ("ash", "beech", "cherry", "durian"), {"half": (0, 0, 1, 1), "parity": (0, 1, 0, 1)}
    splits, (mean, std) = dict.fromkeys(("train", "signal", "gate", "test", "published"), split), MOMENTS
    save(folder / "data/prepared", splits, name="bytes", class_names=names, tasks=tasks, mean=mean, std=std)
    gate = Examples(torch.from_numpy(split.x), torch.from_numpy(split.y))
    for name, n_gates in (("p7b2/split", 1), ("p7b3/task_gates", 3)):
        save_model(folder / "models" / name / SEED, grown((1, 8), n_gates), gate)
    return folder


def test_a_loaded_model_gives_the_bits_of_the_trained_one(baselines: Path, prepared: Path, gate: Examples) -> None:
    trained = checkpoint.load(baselines / "seed-0", gate).model
    model = phasegate.load(baselines / "seed-0", dataset=prepared)
    logits = predict(trained, gate.x)[0].logits[0]
    assert not model.training and torch.equal(model(gate.x), logits)
    assert torch.equal(model.predict(gate.x), logits.argmax(-1)) and model.class_names == ("a", "b", "c", "d")
    assert torch.equal(model.predict_proba(gate.x), logits.softmax(-1))


def test_raw_inputs_are_standardised_to_the_bits_of_the_stage_prepare(study: Path) -> None:
    folder = study / "models/p7b2/split" / SEED
    found, given = phasegate.load(folder), phasegate.load(folder, study / "data/prepared/dataset.json")
    unaware = phasegate.load(folder, dataset=None)
    raw, standardised = torch.from_numpy(RAW), torch.from_numpy(standardise(RAW, *MOMENTS))
    wanted = unaware(standardised)
    assert torch.equal(found(raw), wanted) and torch.equal(given(raw.double()), wanted)
    assert not torch.equal(unaware(raw), wanted)


def test_the_units_of_inputs_are_never_guessed(study: Path, prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(study / "models/p7b3/task_gates" / SEED, tmp_path / "copied")
    with pytest.raises(UserError, match=r"no data/prepared/dataset.json .* or None if inputs are standardised"):
        phasegate.load(folder)
    with pytest.raises(UserError, match="nowhere"):
        phasegate.load(folder, tmp_path / "nowhere/dataset.json")
    assert phasegate.load(folder, prepared).tasks == ("class", "half", "parity")
    other = save_model(tmp_path / "other", Reference(ReferenceSpec((1, 8), 5, (), None)))
    with pytest.raises(UserError, match=r"and \(4, 2, 2\) labels of its tasks, and the model has \(1, 8\) and \(5,\)"):
        phasegate.load(other, prepared)
    published = phasegate.load(other, None)
    assert published.predict(torch.zeros(3, 1, 8)).shape == (3,)
    with pytest.raises(UserError, match="has no experts, and so no routing"):
        published.routing(torch.zeros(3, 1, 8))


def test_further_tasks_have_their_own_heads_and_gates(study: Path) -> None:
    model = phasegate.load(study / "models/p7b3/task_gates" / SEED, dataset=None)
    x = torch.randn(EVALUATION_BATCH + 50, 1, 8)
    for task in range(3):
        outputs = predict(model.model, x, task + 1)
        assert torch.equal(model.logits(x, task), torch.cat([output.logits[task] for output in outputs]))
    assert not model.routing(x, 1).equals(model.routing(x, 2))
    with pytest.raises(UserError, match=r"task is 3: this model has 0 \(class\), 1 \(task 1\), 2 \(task 2\)$"):
        model.predict(x, 3)


def test_routing_statistics_are_those_that_controllers_read(study: Path) -> None:
    model = phasegate.load(study / "models/p7b2/split" / SEED, dataset=None)
    x = torch.randn(EVALUATION_BATCH + 50, 1, 8)
    tables = model.routing(x).groupby("block")
    for (_, rows), moe, routing in zip(tables, model.model.layers, model.model(x).routings, strict=True):
        signals = expert_signals(routing, moe.n_routed)
        assert rows["expert"].tolist() == moe.expert_id.tolist() and rows["family"].tolist() == moe.family_of.tolist()
        assert rows["share"].sum() == pytest.approx(1)
        for column, values in (("share", signals.load), ("gate", signals.gate), ("entropy", signals.entropy)):
            assert rows[column].fillna(0).to_numpy() == pytest.approx(values.numpy(), abs=1e-5)
    unused = model.routing(x[:1]).query("share == 0")
    assert not unused.empty and unused[["gate", "entropy"]].isna().all(axis=None)


def test_damaged_checkpoints_and_missing_devices_are_refused(study: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(study / "models/p7b2/split" / SEED, tmp_path / "damaged")
    weights, record = folder / checkpoint.WEIGHTS, folder / checkpoint.RECORD
    for name, why in (("abacus", "Expected one of"), ("meta", "Cannot copy out of meta tensor; no data!$")):
        with pytest.raises(UserError, match=f"^device is '{name}', which can't be used here: {why}"):
            phasegate.load(folder, None, name)
    whole, text = weights.read_bytes(), record.read_text()
    edit_weights(folder, lambda tensors: tensors["model.blocks.0.moe.w_in"][3, 0, 0].neg_())
    with pytest.raises(UserError, match=r"was altered: its sha256 is not the recorded"):
        phasegate.load(folder, None)
    weights.write_bytes(whole)
    for old, new in (('"top_k": 2', '"top_k": 9'), ('"width": 16', '"width": 12'), ('"format": 3', '"format": 4')):
        assert old in text
        record.write_text(text.replace(old, new))
        with pytest.raises(UserError) as refusal:
            phasegate.load(folder, None)
        assert "\n" not in str(refusal.value)


def test_a_device_without_float64_is_refused_in_one_sentence(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*size: int, dtype: torch.dtype = torch.float32, device: str) -> Tensor:
        """Refuse as torch does for Apple's MPS."""
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return torch.zeros(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(UserError, match=r"^device is 'mps', which can't be used here: Cannot convert a MPS Tensor"):
        phasegate.load(study / "models/p7b2/split" / SEED, device="mps")


@pytest.mark.parametrize(
    ("name", "value"), [("std", 0.0), ("std", -1.0), ("std", 1e-320), ("mean", 1e308), ("mean", -1e308)]
)
@pytest.mark.parametrize("text", [None, "NaN", "-Infinity", "1e999"])
def test_moments_that_make_inputs_infinite_are_refused(
    study: Path, tmp_path: Path, name: str, value: float, text: str | None
) -> None:
    path = tmp_path / "dataset.json"
    content = json.loads((study / "data/prepared/dataset.json").read_text()) | {"mean": [0.0]} | {name: [value]}
    path.write_text(json.dumps(content).replace(f'"{name}": [{value}]', f'"{name}": [{text or value}]'))
    with pytest.raises(UserError, match=r"dataset.json is missing or damaged") as refusal:
        phasegate.load(study / "models/p7b2/split" / SEED, path)
    assert "\n" not in str(refusal.value) and (text or f"{name} {value}" in str(refusal.value))


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.zeros(1, 8), r"x has shape \(1, 8\): it must be \(B, 1, 8\), with B examples"),
        (torch.zeros(5, 1, 9), r"x has shape \(5, 1, 9\): it must be \(B, 1, 8\)"),
        (torch.zeros(5, 1, 8).bool(), r"x is torch.bool: it must be of real numbers.* \(B, 1, 8\)"),
        (torch.zeros(5, 1, 8).to(torch.complex64), r"x is torch.complex64: it must be of real numbers"),
        (np.zeros((5, 1, 8)), r"x is of type ndarray: it must be a torch.Tensor of shape \(B, 1, 8\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(study: Path, x: Tensor, sentence: str) -> None:
    model = phasegate.load(study / "models/p7b2/split" / SEED)
    for use in (model.forward, model.predict, model.routing):
        with pytest.raises(UserError, match=sentence):
            use(x)
    with pytest.raises(UserError, match=r"^logits are not finite: x, weights or dataset.json have NaN, or"):
        model.predict(torch.tensor([1e30, 0]).view(2, 1, 1).expand(2, 1, 8))


VARIANTS: dict[str, Callable[[], Network]] = {
    "one expert per token": lambda: grown((1, 8), 1, top_k=1, blocks=1),
    "two blocks": lambda: grown((1, 8), 1),
    "shared experts and a gate per task": lambda: grown((1, 8), 3, n_shared=1, blocks=1),
    "tokens of a sequence": lambda: grown((2, 16), 1, stem="conv", blocks=1),
    "tokens of an image, odd widths": lambda: grown((3, 8, 8), 1, stem="conv", width=7, expert_width=5, blocks=1),
    "perceptron": lambda: Reference(ReferenceSpec((1, 16), 4, (12,), None)),
    "convolutional network": lambda: Reference(ReferenceSpec((1, 16), 4, None, (5, 7))),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_model_gives_the_same_numbers_for_any_batch(variant: str, tmp_path: Path) -> None:
    model = phasegate.load(save_model(tmp_path, VARIANTS[variant]()), dataset=None)
    x = torch.randn(130, *model.input_shape)
    program = torch.export.export(model, (x[:8],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    for size in (0, 1, 2, 130):
        wanted = model(x[:size])
        assert wanted.shape == (size, 4)
        torch.testing.assert_close(program.module()(x[:size]), wanted)
        torch.testing.assert_close(loaded(x[:size]), wanted)


@pytest.mark.parametrize("variant", ["shared experts and a gate per task", "tokens of a sequence"])
def test_under_autocast_a_loaded_model_computes_and_learns_in_float32(variant: str, tmp_path: Path) -> None:
    model, results = phasegate.load(save_model(tmp_path, VARIANTS[variant]()), None).requires_grad_(), []
    x = torch.randn(30, *model.input_shape).bfloat16()
    for enabled, given in ((True, x), (False, x.float())):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = model.model(given, n_tasks=3)
            loss = load_balance(output.routings[0]) + sum(y.square().mean() for y in (model(given), *output.logits))
        loss.backward()
        gradients = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
        results.append({"loss": loss, **gradients})
    assert all(value.isfinite().all() for value in results[0].values())
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_of_another_type_gives_about_the_same_and_refuses_other_inputs(dtype: torch.dtype) -> None:
    model = Reference(ReferenceSpec((1, 16), 4, (12,), None)).eval()
    x = torch.randn(16, 1, 16).transpose(0, 2)  # not contiguous
    with torch.inference_mode():
        wanted, found = model(x).logits[0], model.to(dtype)(x.to(dtype)).logits[0]
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05, check_dtype=False)
    with pytest.raises(RuntimeError, match="dtype"):
        model(x)


def test_a_chain_of_many_experts_is_loaded_in_linear_time(tmp_path: Path) -> None:
    small = {"blocks": 1, "width": 8, "n_routed": 2_000, "top_k": 1, "expert_width": 1}
    model, x = Model(ModelSpec(override(ARCHITECTURE, small, ""), (1, 8), (4,))), torch.randn(1, 30, 8)
    model.blocks[0].moe = chain(2_000)
    begun = time.perf_counter()
    model.layers[0].refresh()
    [moe] = phasegate.load(save_model(tmp_path, model), dataset=None).model.layers
    assert time.perf_counter() - begun < 15  # 0.2 s on an idle core
    left = (moe.margins(x)[0] <= 0).float()
    torch.testing.assert_close(moe(x)[1].experts[0, :, 0], torch.where(left.any(-1), left.argmax(-1), 1_999))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("variant", ["one expert per token", "two blocks"])
def test_a_compiled_model_gives_the_same_numbers_without_a_warning(variant: str, tmp_path: Path) -> None:
    model = phasegate.load(save_model(tmp_path, VARIANTS[variant]()), dataset=None)
    compiled = torch.compile(model, backend="aot_eager")  # the default, but for the compilation to machine code
    for size in (9, 2):
        x = torch.randn(size, *model.input_shape)
        torch.testing.assert_close(compiled(x), model(x))


def test_the_page_on_using_models_is_true(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study)
    examples, names = blocks(ROOT / "docs/models.md", "python"), dict[str, object]()
    assert len(examples) == 6
    for block in examples:
        exec(block, names)
