"""A killed trial resumes from its last snapshot, to the bit; one that diverges leaves what was last good."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from phasegate.base.errors import Diverged
from phasegate.model.classifier import ModelSpec
from phasegate.model.references import ReferenceSpec
from phasegate.params.phases import GroundTruth, GrowMany, Schedule
from phasegate.params.pretraining import Training
from phasegate.pretraining.pretrain import pretrain
from phasegate.records.trial_folder import CURVE, LAST_GOOD
from phasegate.signals.ground_truth import MeasuredPolicy, PredictedPolicy
from phasegate.signals.survey import survey
from phasegate.surgery.continuation import Arm, run_arm
from phasegate.surgery.controllers import HeadPolicy, LabelPolicy, PlannedPolicy, TimedPolicy
from phasegate.surgery.growing import Plan, grow
from phasegate.surgery.surgeon import Treatment
from phasegate.surgery.tasks import Tasks
from phasegate.training import checkpoint, killed_trials, loop
from phasegate.training.adamw import AdamW
from phasegate.training.batches import Examples
from phasegate.training.killed_trials import SNAPSHOT, Snapshots
from phasegate.training.loop import fit
from tests.bits import ENTROPY, NOISE, TASKS
from tests.small_study import content

BORN = 12  # the step of the birth in trials of 7c
ARMS = "continue noise split clone merge entropy_loss task_gates oracle counterfactual_head trained_hyperplanes"
Run = Callable[[Path], None]
Runs = dict[str, Run]
Kill = Callable[[int, Run, Path], None]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(autouse=True)
def every_snapshot_goes_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHASEGATE_SNAPSHOT", "0")


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kill]:
    """Run a trial and kill it right after its snapshot of a step or a later one."""
    take, at = Snapshots.take, [math.inf]

    def take_and_die(self: Snapshots, step: int) -> None:
        take(self, step)
        if at[0] <= step:
            raise Killed

    def kill(step: int, run: Run, folder: Path) -> None:
        at[0] = step
        with pytest.raises(Killed):
            run(folder)
        at[0] = math.inf

    monkeypatch.setattr(Snapshots, "take", take_and_die)
    yield kill


@pytest.fixture
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="module")
def early(
    prepared: Path, spec: ModelSpec, training: Training, schedule: Schedule, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of the early steps of a trial of 7c."""
    folder, plan = tmp_path_factory.mktemp("early"), Plan(spec, training, schedule, until=8)
    grow(folder, prepared=prepared, start=None, phase="early", name="at", seed=0, plan=plan)
    return folder


@pytest.fixture
def runs(
    prepared: Path, baselines: Path, heads: Path, spec: ModelSpec, training: Training, schedule: Schedule,
    truth: GroundTruth, early: Path,
) -> Runs:  # fmt: skip
    """Every kind of trial that trains, by name."""
    course: Any = {"prepared": prepared, "start": baselines / "seed-0", "seed": 0, "schedule": schedule}
    split = Treatment(HeadPolicy(ENTROPY, acts="argmax"))
    arms = {
        "continue": Arm(),
        "noise": Arm(Treatment(HeadPolicy(NOISE, acts="sample", detach=False), grow="reinit")),
        "split": Arm(split),
        "clone": Arm(Treatment(LabelPolicy(NOISE), grow="clone")),
        "merge": Arm(Treatment(PlannedPolicy(grow=2, prune=2), prune="merge")),
        "entropy_loss": Arm(entropy_weight=0.1),
        "task_gates": Arm(tasks=Tasks(TASKS, 0.5, own_gates=True)),
        "oracle": Arm(Treatment(MeasuredPolicy(1e-8, 0.9, 1, 3, 2, 1))),
        "counterfactual_head": Arm(Treatment(PredictedPolicy(heads, 1e-8, 0.9))),
    }
    proceed = partial(run_arm, **course, phase="p7b")
    trained = schedule.model_copy(update={"hyperplanes": "balanced", "split_direction": "loss"})
    begin = partial(pretrain, prepared=prepared, phase="p7a", arm="base", seed=0, training=training)
    longer = schedule.model_copy(update={"steps": 124, "max_experts": 12})

    def grown(way: GrowMany) -> Run:
        born = Treatment(TimedPolicy((BORN,)), way, None, count=7 if way == "handover" else 4, expert_rate=4.0)
        plan = Plan(spec, training, longer, begin=8, rate=2.0, arm=Arm(born))
        return partial(grow, prepared=prepared, start=early, phase="p7c1", name=way, seed=0, plan=plan)

    return {
        **{name: partial(proceed, name=name, arm=arm) for name, arm in arms.items()},
        "trained_hyperplanes": partial(proceed, name="trained", arm=Arm(split), schedule=trained),
        "birth": grown("birth"),
        "handover": grown("handover"),
        "pretraining": partial(begin, spec=spec, keep_optimizer=True),
        "reference": partial(begin, spec=ReferenceSpec((1, 8), 4, (6,), None)),
        "survey": partial(survey, **course, truth=truth, steps=truth.last_survey),
    }


@pytest.mark.parametrize("name", [*ARMS.split(), "pretraining", "reference", "survey"])
def test_a_trial_killed_three_times_ends_with_the_bits_of_an_undisturbed_one(
    runs: Runs, kill: Kill, tmp_path: Path, undisturbed: Path, name: str
) -> None:
    runs[name](undisturbed)
    for step in (0, 1, 4 if name == "survey" else 30):
        kill(step, runs[name], tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [SNAPSHOT]
        torch.manual_seed(step)  # whatever state another process has
    runs[name](tmp_path)
    assert content(tmp_path) == content(undisturbed)


@pytest.mark.parametrize("way", ["birth", "handover"])
def test_a_trial_killed_during_a_birth_and_after_it_ends_with_the_same_bits(
    runs: Runs, kill: Kill, tmp_path: Path, undisturbed: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, step = list[float](), AdamW.step

    def look(optimizer: Any, *arguments: Any) -> None:
        groups = [group for group in optimizer.param_groups if "lr_factor" in group]
        assert [[p.dim() for p in group["params"]] for group in groups] == [[3, 3, 3, 3]]
        rates.append(groups[0]["lr"] / optimizer.param_groups[0]["lr"])
        step(optimizer, *arguments)

    monkeypatch.setattr(AdamW, "step", look)
    runs[way](undisturbed)
    undisturbed_rates, factors = [*rates], [2.0] * (BORN - 8) + [4.0] * (124 - BORN)
    assert undisturbed_rates == pytest.approx(factors)
    for at in (8, BORN, 60, BORN + 96, BORN + 104):
        rates.clear()
        kill(at, runs[way], tmp_path)
        snapshot = safetensors.torch.load((tmp_path / SNAPSHOT).read_bytes()[: -killed_trials.DIGEST])
        wanted = [5, at - BORN, way == "handover"] if BORN <= at < BORN + 100 else [0, 0, 0]
        assert snapshot["model.blocks.1.moe.birth"].tolist() == wanted
        torch.manual_seed(at)
    rates.clear()
    runs[way](tmp_path)
    assert rates == undisturbed_rates[BORN + 104 - 8 :]
    assert content(tmp_path) == content(undisturbed)


def change_fit(
    monkeypatch: pytest.MonkeyPatch,
    after: Callable[[nn.Module, int], object] = lambda model, step: None,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> None:
    """Do something after each step of a training, before it goes on, and scale the loss of a step."""

    def changed(
        model: Any, optimizer: Any, batches: Any, objective: Any, rates: Any, after_step: Any, done: int = 0
    ) -> None:
        def both(step: int, loss: Tensor) -> None:
            after(model, step)
            after_step(step, loss)

        fit(model, optimizer, batches, lambda x, y, step: objective(x, y, step) * factor(step), rates, both, done)

    monkeypatch.setattr(loop, "fit", changed)


def test_what_was_trained_before_the_snapshot_is_not_trained_again(
    runs: Runs, kill: Kill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(28, runs["continue"], tmp_path)
    steps = list[int]()
    change_fit(monkeypatch, after=lambda model, step: steps.append(step))
    runs["continue"](tmp_path)
    assert steps == list(range(29, 61))


def test_time_before_snapshots_counts(runs: Runs, kill: Kill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for step in (8, 30):
        monkeypatch.setattr(time, "perf_counter", iter(range(0, 100_000, 100)).__next__)
        kill(step, runs["continue"], tmp_path)
        found.append(killed_trials.seconds(tmp_path))
    assert 0 < found[0] < found[1] and found[1] - found[0] >= 100


def test_a_model_that_overflows_before_a_controller_looks_at_it_has_diverged(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blow_up(model: nn.Module, step: int) -> None:
        if step == 4:  # at which a controller acts
            model.get_parameter("norm.weight").data.fill_(1e38)

    change_fit(monkeypatch, after=blow_up)
    with pytest.raises(Diverged, match=r"^a loss on the signal split is not finite at step 4$"):
        runs["noise"](tmp_path)


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty"])
def test_a_damaged_snapshot_is_not_used(runs: Runs, kill: Kill, tmp_path: Path, undisturbed: Path, harm: str) -> None:
    kill(30, runs["noise"], tmp_path)
    whole = (tmp_path / SNAPSHOT).read_bytes()
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    (tmp_path / SNAPSHOT).write_bytes({"truncated": whole[:-100], "flipped": flipped, "empty": b""}[harm])
    for folder in (tmp_path, undisturbed):
        runs["noise"](folder)
    assert content(tmp_path) == content(undisturbed)


def poison(monkeypatch: pytest.MonkeyPatch, what: str, at: int, done: int) -> None:
    """From step `at` on, after `done` of another process, make the loss, a gradient or a weight infinite or NaN."""
    step, count = AdamW.step, [done]

    def poisoned(self: AdamW, *arguments: Any) -> None:
        count[0] += 1
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        victim = next(p for p in parameters if p.dim() == 3 and p.grad is not None)
        if count[0] >= at and what == "gradient":
            victim.grad.view(-1)[0] = float("inf")
        step(self, *arguments)
        if count[0] >= at and what == "value":
            victim.data.view(-1)[0] = float("-inf")

    monkeypatch.setattr(AdamW, "step", poisoned)
    change_fit(monkeypatch, factor=lambda step: math.nan if step >= at and what == "loss" else 1.0)


@pytest.mark.parametrize("what", ["loss", "gradient", "value"])
@pytest.mark.parametrize(("name", "resumed"), [("split", False), ("split", True), ("pretraining", False)])
def test_a_trial_that_diverges_stops_and_leaves_its_last_good_checkpoint(
    runs: Runs, kill: Kill, tmp_path: Path, undisturbed: Path, gate: Examples,
    monkeypatch: pytest.MonkeyPatch, what: str, name: str, resumed: bool,
) -> None:  # fmt: skip
    runs[name](undisturbed)
    if resumed:
        kill(28, runs[name], tmp_path)
    poison(monkeypatch, what, at=31, done=28 * resumed)
    said = "the loss is nan" if what == "loss" else rf"the {what} of blocks\.0\.moe\.\w+ is not finite"
    with pytest.raises(Diverged, match=rf"^{said} at step 31$"):
        runs[name](tmp_path)
    good = checkpoint.load(tmp_path / LAST_GOOD, gate)  # which verifies it
    assert all(parameter.isfinite().all() for parameter in good.model.parameters())
    assert not (tmp_path / checkpoint.RECORD).exists()
    curve = pd.read_csv(undisturbed / CURVE)
    accuracy = checkpoint.summary(tmp_path / LAST_GOOD)[1]
    assert accuracy == curve[curve["step"] <= 30]["accuracy"].iloc[-1]
