"""A trial that was killed goes on from its last snapshot, to the bit; one that diverges leaves what was last good."""

import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from phasegate import checkpoint, phase, snapshots
from phasegate.control import HeadControl, LabelControl, Plan
from phasegate.errors import Diverged
from phasegate.failure import LAST_GOOD
from phasegate.ground_truth import MeasuredControl, PredictedControl
from phasegate.logs import CURVE
from phasegate.model import ModelSpec
from phasegate.phase import Arm, Tasks, run_arm
from phasegate.phase_params import EntropyLabels, GroundTruth, RandomLabels, Schedule
from phasegate.pretraining import pretrain
from phasegate.pretraining_params import Training
from phasegate.references import ReferenceSpec
from phasegate.snapshots import SNAPSHOT, Snapshots
from phasegate.surgeon import Treatment
from phasegate.survey import survey
from phasegate.training import Examples, fit

NOISE = RandomLabels(grow=0.4, prune=0.3, loss_weight=1.0, head_lr=0.02)
ENTROPY = EntropyLabels(grow_below=1.0, prune_above=1.0, head_lr=0.02)
TASKS = ((0, 0, 1, 1), (0, 1, 0, 1))
Run = Callable[[Path], None]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(autouse=True)
def every_snapshot_goes_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHASEGATE_SNAPSHOT", "0")


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Have trials killed right after their snapshot of this step or a later one; below 0 for never."""
    take, at = Snapshots.take, [-1]

    def and_die(self: Snapshots, step: int) -> None:
        take(self, step)
        if 0 <= at[0] <= step:
            raise Killed

    monkeypatch.setattr(Snapshots, "take", and_die)
    yield partial(at.__setitem__, 0)


def left(folder: Path) -> dict[str, bytes]:
    """The content of all files of a trial, but for its snapshot and what a survey says of seconds."""
    found = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != SNAPSHOT
    }
    if "survey.csv" in found:
        rows = [line.rsplit(b",", 2)[0] for line in found["survey.csv"].splitlines()]
        found["survey.csv"] = b"\n".join(rows)
    return found


@pytest.fixture
def runs(
    prepared: Path,
    baselines: Path,
    heads: Path,
    spec: ModelSpec,
    training: Training,
    schedule: Schedule,
    truth: GroundTruth,
) -> dict[str, Run]:
    """Every kind of trial that trains, by name."""
    start = baselines / "seed-0"
    arms = [
        Arm("continue"),
        Arm("noise", Treatment(HeadControl(NOISE, acts="sample", detach=False), grow="reinit")),
        Arm("split", Treatment(HeadControl(ENTROPY, acts="argmax"))),
        Arm("clone", Treatment(LabelControl(NOISE), grow="clone")),
        Arm("merge", Treatment(Plan(grow=2, prune=2), prune="merge")),
        Arm("entropy_loss", entropy_weight=0.1),
        Arm("task_gates", tasks=Tasks(TASKS, 0.5, own_gates=True)),
        Arm("oracle", Treatment(MeasuredControl(1e-8, 1, 3, 2))),
        Arm("counterfactual_head", Treatment(PredictedControl(heads, 1e-8))),
    ]
    go_on = partial(run_arm, prepared=prepared, start=start, phase="p7b", seed=0, schedule=schedule)
    trained = schedule.model_copy(update={"hyperplanes": "balanced", "split_direction": "loss"})
    begin = partial(pretrain, prepared=prepared, phase="p7a", arm="base", seed=0, training=training)
    reference = ReferenceSpec((1, 8), 4, (6,), None)
    return {
        **{arm.name: partial(go_on, arm=arm) for arm in arms},
        "trained hyperplanes": partial(go_on, arm=arms[2], schedule=trained),
        "pretraining": partial(begin, spec=spec, keep_optimizer=True),
        "reference": partial(begin, spec=reference, keep_optimizer=False),
        "survey": partial(survey, prepared=prepared, start=start, seed=0, schedule=schedule, truth=truth),
    }


NAMES = (
    *("continue", "noise", "split", "clone", "merge", "entropy_loss", "task_gates", "oracle", "counterfactual_head"),
    *("trained hyperplanes", "pretraining", "reference", "survey"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_killed_three_times_ends_with_the_bits_of_one_that_was_left_alone(
    runs: dict[str, Run], kill: Callable[[int], None], tmp_path: Path, name: str
) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder in (undisturbed, disturbed):
        folder.mkdir()
    runs[name](undisturbed)
    for step in (0, 1, 4 if name == "survey" else 30):
        kill(step)
        with pytest.raises(Killed):
            runs[name](disturbed)
        assert [path.name for path in disturbed.iterdir()] == [SNAPSHOT]
        torch.manual_seed(step)  # whatever state another process has
    kill(-1)
    runs[name](disturbed)
    assert left(disturbed) == left(undisturbed)


def test_what_was_trained_before_the_snapshot_is_not_trained_again(
    runs: dict[str, Run], kill: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(28)
    with pytest.raises(Killed):
        runs["continue"](tmp_path)
    kill(-1)
    steps, after_step = [], phase._Trial.after_step

    def counting(self: phase._Trial, step: int, loss: Tensor) -> None:
        steps.append(step)
        after_step(self, step, loss)

    monkeypatch.setattr(phase._Trial, "after_step", counting)
    runs["continue"](tmp_path)
    assert steps == list(range(29, 61))


def test_the_seconds_before_a_snapshot_count(
    runs: dict[str, Run], kill: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for step in (8, 30):
        kill(step)
        monkeypatch.setattr(time, "perf_counter", iter(range(0, 100_000, 100)).__next__)
        with pytest.raises(Killed):
            runs["continue"](tmp_path)
        found.append(snapshots.seconds(tmp_path))
    assert 0 < found[0] < found[1] and found[1] - found[0] >= 100


def test_a_model_that_overflows_before_a_controller_looks_at_it_has_diverged(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blow_up(self: phase._Trial, step: int, loss: Tensor) -> None:
        if step == 4:  # at which a controller acts
            with torch.no_grad():
                self.model.norm.weight.fill_(1e38)
        after_step(self, step, loss)

    after_step = phase._Trial.after_step
    monkeypatch.setattr(phase._Trial, "after_step", blow_up)
    with pytest.raises(Diverged, match=r"^a loss on the signal split is not finite at step 4$"):
        runs["noise"](tmp_path)


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty"])
def test_a_damaged_snapshot_is_not_used(
    runs: dict[str, Run], kill: Callable[[int], None], tmp_path: Path, harm: str
) -> None:
    kill(30)
    with pytest.raises(Killed):
        runs["noise"](tmp_path)
    path = tmp_path / SNAPSHOT
    content = path.read_bytes()
    flipped = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    path.write_bytes({"truncated": content[:-100], "flipped": flipped, "empty": b""}[harm])
    kill(-1)
    runs["noise"](tmp_path)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    runs["noise"](undisturbed)
    whole = left(undisturbed)
    shutil.rmtree(undisturbed)
    assert left(tmp_path) == whole


def poison(monkeypatch: pytest.MonkeyPatch, what: str, at: int, done: int) -> None:
    """From step `at` on, after `done` of another process, make the loss, a gradient or a weight infinite or NaN."""
    step = torch.optim.AdamW.step
    count = [done]

    def objective_of(objective: Any) -> Any:
        return lambda x, y, step: objective(x, y, step) * (float("nan") if step >= at and what == "loss" else 1)

    def poisoned(self: torch.optim.AdamW, *arguments: Any) -> None:
        count[0] += 1
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        victim = next(p for p in parameters if p.dim() == 3 and p.grad is not None)
        if count[0] >= at and what == "gradient":
            assert victim.grad is not None
            victim.grad.view(-1)[0] = float("inf")
        step(self, *arguments)
        if count[0] >= at and what == "value":
            victim.data.view(-1)[0] = float("-inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)

    def fitted(model: Any, optimizer: Any, batches: Any, objective: Any, *rest: Any) -> None:
        fit(model, optimizer, batches, objective_of(objective), *rest)

    for module in ("phase", "pretraining", "survey", "counterfactual"):
        monkeypatch.setattr(f"phasegate.{module}.fit", fitted)


@pytest.mark.parametrize("what", ["loss", "gradient", "value"])
@pytest.mark.parametrize(("name", "resumed"), [("split", False), ("split", True), ("pretraining", False)])
def test_a_trial_that_diverges_stops_at_once_and_leaves_its_last_good_checkpoint(
    runs: dict[str, Run],
    kill: Callable[[int], None],
    tmp_path: Path,
    gate: Examples,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    name: str,
    resumed: bool,
) -> None:
    if resumed:
        kill(28)
        with pytest.raises(Killed):
            runs[name](tmp_path)
        kill(-1)
    poison(monkeypatch, what, at=31, done=28 * resumed)
    said = "the loss is nan" if what == "loss" else rf"the {what} of blocks\.0\.moe\.\w+ is not finite"
    with pytest.raises(Diverged, match=rf"^{said} at step 31$"):
        runs[name](tmp_path)
    good = checkpoint.load(tmp_path / LAST_GOOD, gate)  # which verifies it
    assert all(parameter.isfinite().all() for parameter in good.model.parameters())
    assert not (tmp_path / checkpoint.RECORD).exists()
    accuracy = checkpoint.summary(tmp_path / LAST_GOOD)[1]
    monkeypatch.undo()
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    runs[name](undisturbed)
    curve = pd.read_csv(undisturbed / CURVE)
    assert accuracy == curve[curve["step"] <= 30]["accuracy"].iloc[-1]
