"""A checkpoint comes back to the bit, in any process, or it is refused in one sentence."""

import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import AdamW

from phasegate.checkpoint import RECORD, WEIGHTS, Checkpoint, load, save, summary
from phasegate.errors import UserError
from phasegate.expert_manager import ExpertManager
from phasegate.model import Model, cost
from phasegate.references import Reference, ReferenceSpec
from phasegate.training import Batches, Examples, correct, fit, main_loss, predict


@pytest.fixture(scope="module")
def many(gate: Examples) -> Examples:
    """A gate split of 2,000 examples."""
    return Examples(gate.x.repeat(10, 1, 1), gate.y.repeat(10))


@pytest.fixture(scope="module")
def trial(baselines: Path, gate: Examples) -> Checkpoint:
    """The 7a model after surgery of every kind, and its optimizer; training goes on after half of it."""
    trial = load(baselines / "seed-0", gate)
    assert isinstance(trial.model, Model) and trial.optimizer is not None
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


def next_step(trial: Checkpoint, examples: Examples) -> str:
    """A hash of the logits, and after one more step of training, of all weights, buffers and moments."""
    assert isinstance(trial.optimizer, AdamW)
    found = [predict(trial.model, examples.x)[0].logits[0]]

    def objective(x: Tensor, y: Tensor, step: int) -> Tensor:
        return main_loss(trial.model, trial.model(x), y, 0.0)

    batches = Batches(examples, 32, 7, trial.record.training)
    fit(trial.model, trial.optimizer, batches, objective, [0.01], lambda step, loss: None)
    weights = trial.model.state_dict()
    found += [weights[name] for name in sorted(weights)]
    for name, parameter in trial.model.named_parameters():
        state = trial.optimizer.state.get(parameter, {})
        found += [state[key] for key in sorted(state)]
        assert state or not len(parameter), name
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in found)).hexdigest()


def test_a_new_process_goes_on_bit_for_bit_after_surgery(saved: Path, trial: Checkpoint, many: Examples) -> None:
    safetensors.torch.save_file({"x": many.x, "y": many.y}, saved / "gate.safetensors")
    code = (
        "import sys, torch, safetensors.torch; from pathlib import Path; from phasegate.checkpoint import load;"
        "from phasegate.training import Examples; from tests.test_checkpoint import next_step;"
        "torch.set_num_threads(1); folder = Path(sys.argv[1]);"
        "gate = Examples(**safetensors.torch.load_file(folder / 'gate.safetensors'));"
        "print(next_step(load(folder, gate), gate))"
    )
    result = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == next_step(load(saved, many), many) == next_step(copy.deepcopy(trial), many)


def test_every_number_of_the_model_and_of_its_optimizer_comes_back(
    saved: Path, trial: Checkpoint, many: Examples
) -> None:
    loaded = load(saved, many)
    weights, moments = trial.model.state_dict(), state_of(trial)
    assert all("load" not in name or value.any() for name, value in weights.items())
    assert {name for name in moments if "moe.node" in name} == {
        f"blocks.{block}.moe.node_{part}.{key}"
        for block in range(2)
        for part in ("weight", "offset")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    for kept, found in ((weights, loaded.model.state_dict()), (moments, state_of(loaded))):
        assert kept.keys() == found.keys()
        assert all(torch.equal(kept[name], found[name]) and kept[name].dtype == found[name].dtype for name in kept)


def state_of(trial: Checkpoint) -> dict[str, Tensor]:
    """What the optimizer keeps, by parameter and key."""
    assert trial.optimizer is not None
    named = {name: trial.optimizer.state.get(parameter, {}) for name, parameter in trial.model.named_parameters()}
    return {f"{name}.{key}": value for name, state in named.items() for key, value in state.items()}


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def test_reinitialised_weights_are_refused_with_both_counts(folder: Path, trial: Checkpoint, many: Examples) -> None:
    assert isinstance(trial.model, Model)
    fresh = {f"model.{name}": value for name, value in Model(trial.model.spec).state_dict().items()}
    edit_weights(folder, lambda tensors: tensors.update((k, v) for k, v in fresh.items() if "moe" not in k))
    right = correct(trial.model, many)
    assert right > 1_000
    with pytest.raises(UserError, match=rf"expected {right:,} of 2,000 correct, got (1,)?\d+ of 2,000$"):
        load(folder, many)


@pytest.mark.parametrize("file", [WEIGHTS, RECORD])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe nothing that we know", 0.01, 0.5, 0.99])
def test_files_that_are_missing_truncated_or_foreign_are_refused_in_one_sentence(
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
def test_one_flipped_bit_in_the_weights_is_refused_in_one_sentence(
    saved: Path, many: Examples, data: st.DataObject
) -> None:
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


def test_weights_that_claim_more_than_there_is_memory_are_refused_before_they_are_read(
    folder: Path, many: Examples
) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(
        UserError, match=r"weights.safetensors is damaged \(it claims 1,099,511,627,776 bytes, more than"
    ):
        load(folder, many)


def test_a_valid_file_of_other_tensors_is_refused(folder: Path, many: Examples) -> None:
    edit_weights(
        folder, lambda tensors: [tensors.pop(name) for name in list(tensors)] and tensors.update(a=torch.ones(2))
    )
    with pytest.raises(UserError, match=r"a model that runs on this data: its 2 layers or heads have only 1 tensors"):
        load(folder, many)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("heads.0.weight", (4, 16)), ("blocks.1.moe.router", (1, 6, 16)), ("blocks.0.moe.w_out", (8, 8, 16))],
)
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(
    folder: Path, many: Examples, name: str, shape: tuple[int, ...]
) -> None:
    key, found = f"model.{name}", (*shape[:-1], shape[-1] - 3)
    edit_weights(folder, lambda tensors: tensors.update({key: tensors[key][..., :-3].contiguous()}))
    with pytest.raises(UserError, match=re.escape(f"{name} should have shape {shape}, and has {found}")):
        load(folder, many)


def test_experts_that_some_tensors_lack_are_noticed(folder: Path, many: Examples) -> None:
    key = "model.blocks.0.moe.w_out"
    edit_weights(folder, lambda tensors: tensors.update({key: tensors[key][:-1].contiguous()}))
    with pytest.raises(UserError, match="w_out"):
        load(folder, many)


def test_another_data_set_is_refused(saved: Path, gate: Examples) -> None:
    with pytest.raises(UserError, match=r"expected [\d,]+ of 2,000 correct, got \d+ of 200$"):
        load(saved, gate)


def test_the_record_tells_the_trial_its_accuracy_and_its_cost(saved: Path, trial: Checkpoint, many: Examples) -> None:
    assert load(saved, many).record == trial.record
    accuracy = 100 * correct(trial.model, many) / 2_000
    assert summary(saved) == (trial.record, accuracy, cost(trial.model, (1, 8)))


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
