"""A checkpoint comes back to the bit, in any process, or it is refused in one sentence."""

import copy
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import phasegate
from phasegate.base.errors import UserError
from phasegate.base.files import sha256
from phasegate.model.classifier import Model, ModelSpec, cost
from phasegate.model.references import Reference, ReferenceSpec
from phasegate.params.fields import override
from phasegate.surgery.operations import ExpertManager
from phasegate.training import checkpoint
from phasegate.training.adamw import AdamW
from phasegate.training.batches import Batches, Examples
from phasegate.training.checkpoint import RECORD, WEIGHTS, Checkpoint, load, save, summary
from phasegate.training.loop import fit
from phasegate.training.losses import main_loss
from phasegate.training.predictions import correct, predict
from tests.models import ARCHITECTURE

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], None]


@pytest.fixture(scope="module")
def many(gate: Examples) -> Examples:
    """A gate split of 2,000 examples."""
    return Examples(gate.x.repeat(10, 1, 1), gate.y.repeat(10))


@pytest.fixture(scope="module")
def trial(baselines: Path, gate: Examples) -> Checkpoint:
    """The 7a model after surgery of every kind, and its optimizer; a step of training follows half of it."""
    trial = load(baselines / "seed-0", gate)
    managers = [ExpertManager(moe, trial.optimizer) for moe in trial.model.layers]
    random = torch.Generator().manual_seed(0)
    for manager in managers:
        for expert in (0, 1, 5):  # the tree of expert 0 is now (0, (5, 7))
            manager.split(expert, torch.randn(16, generator=random), 0.1)
        manager.clone(6)
        manager.remove(2)
    next_step(trial, gate)
    for manager in managers:
        manager.merge(7, 5, 0.4)
        manager.split(3, torch.randn(16, generator=random), 0.1)
        manager.reinit(random)
        manager.remove(0)
    return trial


@pytest.fixture(scope="module")
def saved(trial: Checkpoint, many: Examples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(folder, trial.model, trial.optimizer, trial.record, many)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved checkpoint, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def moments(trial: Checkpoint) -> Tensors:
    """What the optimizer keeps, by parameter and key."""
    assert isinstance(trial.optimizer, AdamW)
    named = {name: trial.optimizer.state.get(parameter, {}) for name, parameter in trial.model.named_parameters()}
    return {f"{name}.{key}": value for name, state in named.items() for key, value in state.items()}


def next_step(trial: Checkpoint, examples: Examples) -> str:
    """A hash of the logits, and after one more step of training, of all weights, buffers and moments."""
    found = [predict(trial.model, examples.x)[0].logits[0]]

    def objective(x: Tensor, y: Tensor, step: int) -> Tensor:
        return main_loss(trial.model, trial.model(x), y, 0.0)

    assert trial.optimizer
    batches = Batches(examples, 32, 7, trial.record.training)
    fit(trial.model, trial.optimizer, batches, objective, [0.01], lambda step, loss: None)
    for tensors in (trial.model.state_dict(), moments(trial)):
        found += [tensors[name] for name in sorted(tensors)]
    assert all(trial.optimizer.state.get(p) for p in trial.model.parameters() if len(p))
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in found)).hexdigest()


def test_a_new_process_continues_bit_for_bit_after_surgery(saved: Path, trial: Checkpoint, many: Examples) -> None:
    safetensors.torch.save_file({"x": many.x, "y": many.y}, saved / "gate.safetensors")
    code = (
        "import sys, torch, safetensors.torch; from pathlib import Path; from tests.test_checkpoint import *;"
        "torch.set_num_threads(1); folder = Path(sys.argv[1]);"
        "gate = Examples(**safetensors.torch.load_file(folder / 'gate.safetensors'));"
        "print(next_step(load(folder, gate), gate))"
    )
    result = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == next_step(load(saved, many), many) == next_step(copy.deepcopy(trial), many)


def test_every_number_of_model_and_optimizer_comes_back(saved: Path, trial: Checkpoint, many: Examples) -> None:
    loaded = load(saved, many)
    weights = trial.model.state_dict()
    assert all("load" not in name or value.any() for name, value in weights.items())
    assert sum("moe.node" in name for name in moments(trial)) == 2 * 2 * 3  # blocks, parts of a node, moments
    for kept, found in ((weights, loaded.model.state_dict()), (moments(trial), moments(loaded))):
        assert kept.keys() == found.keys()
        assert all(torch.equal(kept[name], found[name]) and kept[name].dtype == found[name].dtype for name in kept)


def edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def test_reinitialised_weights_are_refused_with_both_counts(folder: Path, trial: Checkpoint, many: Examples) -> None:
    fresh = {f"model.{name}": value for name, value in Model(trial.model.spec).state_dict().items()}
    edit_weights(folder, lambda tensors: tensors.update((k, v) for k, v in fresh.items() if "moe" not in k))
    right = correct(trial.model, many)
    assert right > 1_000
    with pytest.raises(UserError, match=rf"expected {right:,} of 2,000 correct, got (1,)?\d+ of 2,000$"):
        load(folder, many)


@pytest.mark.parametrize("file", [WEIGHTS, RECORD])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe nothing that we know", 0.01, 0.5, 0.99])
def test_files_that_are_missing_truncated_or_foreign_are_refused(
    folder: Path, many: Examples, file: str, content: bytes | float
) -> None:
    path = folder / file
    if isinstance(content, float):
        content = path.read_bytes()[: int(content * path.stat().st_size)]
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}\b.*(damaged|not a checkpoint)") as refusal:
        load(folder, many)
    assert "\n" not in str(refusal.value)
    path.unlink()
    with pytest.raises(UserError, match=rf"{file} is missing"):
        load(folder, many)


@settings(max_examples=150)
@given(st.data())
def test_one_flipped_bit_in_the_weights_is_refused(saved: Path, many: Examples, data: st.DataObject) -> None:
    content = bytearray((saved / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    spans = {name: info["data_offsets"] for name, info in json.loads(content[8:header]).items()}
    name = data.draw(st.sampled_from(["header", *(name for name, (start, end) in spans.items() if start < end)]))
    start, end = (0, header) if name == "header" else (header + offset for offset in spans[name])
    content[data.draw(st.integers(start, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / WEIGHTS).write_bytes(content)
        shutil.copy(saved / RECORD, temporary)
        with pytest.raises(UserError) as refusal:
            load(Path(temporary), many)
    assert "\n" not in str(refusal.value)


def test_weights_that_claim_more_than_the_memory_are_not_read(folder: Path, many: Examples) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(UserError, match=r"weights.safetensors is damaged \(it claims 1,099,511,627,776 bytes, more"):
        load(folder, many)


def cut(name: str, *index: Any) -> Change:
    """Replace a tensor by a part of it."""
    return lambda tensors: tensors.update({f"model.{name}": tensors[f"model.{name}"][index].contiguous()})


def only_one(tensors: Tensors) -> None:
    tensors.clear()
    tensors["a"] = torch.ones(2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (only_one, "a model that runs on this data: its 2 layers or heads have only 1 tensors"),
        (cut("heads.0.weight", ..., slice(-3)), "heads.0.weight should have shape (4, 16), and has (4, 13)"),
        (cut("blocks.1.moe.router", ..., slice(-3)), "moe.router should have shape (1, 6, 16), and has (1, 6, 13)"),
        (cut("blocks.0.moe.w_out", ..., slice(-3)), "moe.w_out should have shape (8, 8, 16), and has (8, 8, 13)"),
        (cut("blocks.0.moe.w_out", slice(-1)), "moe.w_out should have shape (8, 8, 16), and has (7, 8, 16)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, many: Examples, change: Change, said: str) -> None:
    edit_weights(folder, change)
    with pytest.raises(UserError, match=re.escape(said)):
        load(folder, many)


def test_moments_that_do_not_fit_are_named(folder: Path, many: Examples) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("optimizer.heads.0.weight.step"))
    record = json.loads((folder / RECORD).read_text())
    record["weights"]["sha256"] = sha256(folder / WEIGHTS)
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"optimizer: heads.0.weight.step should have shape \(\), and has None"):
        load(folder, many)


def test_logits_must_be_the_same_and_where_nothing_is_promised_the_count_but_for_ti(
    folder: Path, many: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((folder / RECORD).read_text())
    right = record["gate"]["correct"]
    record["gate"]["logits"] = "0" * 64
    (folder / RECORD).write_text(json.dumps(record))
    if phasegate.PROMISED:
        with pytest.raises(UserError, match=rf"expected {right:,} of 2,000 correct, got {right:,} of 2,000, by other"):
            load(folder, many)
    monkeypatch.setattr(phasegate, "PROMISED", False)
    load(folder, many)
    record["gate"]["correct"] -= 1
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"expected {right - 1:,} of 2,000 correct, got {right:,} of 2,000$"):
        load(folder, many)
    monkeypatch.setattr(checkpoint, "NEAR", math.inf)  # then all examples are ties
    load(folder, many)


def test_another_data_set_is_refused(saved: Path, gate: Examples) -> None:
    with pytest.raises(UserError, match=r"expected [\d,]+ of 2,000 correct, got \d+ of 200$"):
        load(saved, gate)


def test_the_summary_has_the_trial_its_accuracy_and_its_cost(saved: Path, trial: Checkpoint, many: Examples) -> None:
    assert load(saved, many).record == trial.record
    assert summary(saved) == (trial.record, 100 * correct(trial.model, many) / 2_000, cost(trial.model))


@pytest.mark.parametrize(("hidden", "channels"), [((), None), ((12, 6), None), (None, (5, 7))])
def test_reference_models_come_back_too(
    tmp_path: Path, gate: Examples, trial: Checkpoint, hidden: tuple[int, ...] | None, channels: tuple[int, ...] | None
) -> None:
    model = Reference(ReferenceSpec((1, 8), 4, hidden, channels))
    record = trial.record.model_copy(update={"phase": "references", "n_routed_start": 0})
    save(tmp_path, model, None, record, gate)
    loaded = load(tmp_path, gate)
    assert isinstance(loaded.model, Reference) and loaded.model.spec == model.spec
    assert loaded.optimizer is None and loaded.record == record
    assert torch.equal(loaded.model(gate.x).logits[0], model(gate.x).logits[0])


@pytest.mark.parametrize("claim", [{"hidden": [1] * 5_000}, {"hidden": [1], "channels": [1] * 5_000}])
def test_more_layers_than_weights_are_refused_before_they_are_built(
    tmp_path: Path, gate: Examples, trial: Checkpoint, claim: dict[str, list[int]]
) -> None:
    save(tmp_path, Reference(ReferenceSpec((1, 8), 4, (), None)), None, trial.record, gate)
    content = json.loads((tmp_path / RECORD).read_text())
    content["model"] |= claim
    (tmp_path / RECORD).write_text(json.dumps(content))
    with pytest.raises(UserError, match="its 5,000 layers or heads have only 2 tensors"):
        load(tmp_path, gate)


def test_a_checkpoint_of_many_parts_is_read_in_linear_time() -> None:
    def calls(heads: int) -> int:
        small = {"blocks": heads // 4, "width": 1, "n_routed": 1, "top_k": 1, "expert_width": 1}
        model = Model(ModelSpec(override(ARCHITECTURE, small, ""), (1, 8), (2,) * heads))
        state, found, before = model.state_dict(), list[str](), sys.getprofile()
        sys.setprofile(lambda frame, event, of: found.append(event))
        checkpoint.fill(model, state, "many")
        sys.setprofile(before)
        return len(found)

    assert calls(400) < 5 * calls(100)  # 4 times; 9 times if each part looked at all others
