"""One 7b trial: go on from a 7a checkpoint under an arm's treatment.

All trials of all phases share the schedule, the batches of their seed and this code; an arm only says what is
added: a controller that may operate, a regulariser, further tasks. The arm that adds nothing is the control.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from phasegate import checkpoint, execution
from phasegate.checkpoint import RECORD, WEIGHTS, Checkpoint, Record
from phasegate.data import fit_file, meta_file
from phasegate.hyperplanes import sibling_balance
from phasegate.lineage import LOADS, Loads
from phasegate.logs import CURVE, SURGERIES, SURGERY_COLUMNS, Curve
from phasegate.model import Model
from phasegate.moe import routing_entropy
from phasegate.multitask import add_tasks, further_losses
from phasegate.phase_params import Schedule
from phasegate.randomness import derived_seed
from phasegate.snapshots import Snapshots, Stateful
from phasegate.surgeon import Surgeon, Treatment
from phasegate.training import Course, fit, load_examples, main_loss, nudge_selection
from phasegate.trials import Trial


@dataclass(frozen=True)
class Tasks:
    """Further tasks: label maps (class -> task label), their weight, and whether each has gates of its own."""

    label_maps: tuple[tuple[int, ...], ...]
    weight: float
    own_gates: bool


@dataclass(frozen=True)
class Arm:
    """A named variation of a phase."""

    name: str
    treatment: Treatment | None = None
    entropy_weight: float = 0.0  # of the routing entropy in the loss
    tasks: Tasks | None = None


def continuations(
    prepared: Path,
    baselines: Path,
    phase: str,
    arms: list[Arm],
    seeds: int,
    schedule: Schedule,
) -> list[Trial]:
    """The trials of all arms and seeds: seed s goes on from `baselines`/seed-s."""
    return [
        Trial(
            f"{arm.name}/seed-{seed}",
            run_arm,
            {"prepared": prepared, "start": start, "phase": phase, "arm": arm, "seed": seed, "schedule": schedule},
            (*begin_files(prepared, start), *(arm.treatment.files(seed) if arm.treatment else ())),
            (meta_file(prepared),),
        )
        for arm in arms
        for seed in range(seeds)
        for start in [baselines / f"seed-{seed}"]
    ]


def run_arm(folder: Path, *, prepared: Path, start: Path, phase: str, arm: Arm, seed: int, schedule: Schedule) -> None:
    """Run one trial and leave a checkpoint, the learning curve, the loads and the log of surgeries in `folder`."""
    start_from, course = begin(prepared, start, seed, schedule)
    trial = _Trial(start_from, arm, course, folder)
    record = Record(phase=phase, arm=arm.name, seed=seed, training=course.training, n_routed_start=trial.n_routed_start)
    save = partial(checkpoint.save, model=trial.model, optimizer=None, record=record, gate=course.gate)
    done = trial.snapshots.begin(lambda: trial.curve.measure(0))
    with trial.snapshots.last_good(save):
        fit(trial.model, trial.optimizer, course.batches, trial.objective, course.rates, trial.after_step, done)
    save(folder)
    trial.curve.table().to_csv(folder / CURVE, index=False)
    trial.loads.table().to_csv(folder / LOADS, index=False)
    pd.DataFrame(trial.surgeon.log if trial.surgeon else [], columns=SURGERY_COLUMNS).to_csv(
        folder / SURGERIES, index=False
    )


def begin_files(prepared: Path, start: Path) -> tuple[Path, ...]:
    """The files that `begin` reads."""
    return fit_file(prepared), start / WEIGHTS, start / RECORD


def begin(prepared: Path, start: Path, seed: int, schedule: Schedule) -> tuple[Checkpoint, Course]:
    """A verified 7a checkpoint, and what lies before it."""
    train, signal, gate = load_examples(prepared, execution.device())
    loaded = checkpoint.load(start, gate, train.x.device)
    return loaded, Course(train, signal, gate, loaded.record.training, schedule, seed)


class _Trial:
    """The moving parts of a trial: the loss of a step, and what happens after it."""

    def __init__(self, start: Checkpoint, arm: Arm, course: Course, folder: Path) -> None:
        assert isinstance(start.model, Model) and start.optimizer is not None, "not a 7a checkpoint"
        self.model, self.optimizer, self.arm, self.course = start.model, start.optimizer, arm, course
        self.n_routed_start = self.model.n_routed
        self.curve, self.loads = Curve(self.model, course.gate), Loads(self.model)
        label_maps = arm.tasks.label_maps if arm.tasks else ()
        self._label_maps = [torch.tensor(m, device=course.gate.x.device) for m in label_maps]
        if arm.tasks:
            torch.manual_seed(derived_seed(course.seed, "task heads"))
            add_tasks(self.model, self.optimizer, [max(m) + 1 for m in label_maps], arm.tasks.own_gates)
        for moe in self.model.layers:
            for hyperplane in (moe.node_weight, moe.node_offset):
                hyperplane.requires_grad_(course.schedule.hyperplanes != "fixed")
        self.surgeon: Surgeon | None = None
        if arm.treatment is not None:
            self.surgeon = Surgeon(self.model, self.optimizer, arm.treatment, course)
        parts: dict[str, Stateful] = {"curve": self.curve, "loads": self.loads}
        if self.surgeon:
            parts["surgeon"] = self.surgeon
        self.snapshots = Snapshots(folder, self.model, self.optimizer, parts)

    def objective(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        """The control arm's loss, plus what the arm adds to it."""
        output = self.model(x, n_tasks=1 + len(self._label_maps))
        nudge_selection(self.model, output)
        loss = main_loss(self.model, output, y, self.course.training.label_smoothing)
        if self.arm.tasks:
            loss = loss + self.arm.tasks.weight * further_losses(output, y, self._label_maps)
        if self.arm.entropy_weight:
            entropies = [routing_entropy(routing.probs).mean() for routing in output.routings]
            loss = loss + self.arm.entropy_weight * torch.stack(entropies).mean()
        if self.course.schedule.hyperplanes == "balanced":
            for moe, routing in zip(self.model.layers, output.routings, strict=True):
                loss = loss + self.course.schedule.sibling_balance * sibling_balance(moe, routing)
        return loss + self.surgeon.loss(output.routings, step) if self.surgeon else loss

    def after_step(self, step: int, loss: Tensor) -> None:
        """Operate where the controllers say so, and take a point of the learning curve."""
        self.curve.add_loss(loss)
        schedule = self.course.schedule
        point = step % schedule.eval_every == 0 or step == schedule.steps
        if point:
            self.loads.measure(step)
        if self.surgeon and step % schedule.act_every == 0 and step <= schedule.steps - schedule.settle:
            self.surgeon.act(step)
        if point:
            accuracy = 100 * self.curve.measure(step) / len(self.course.gate)
            if self.surgeon:
                self.surgeon.recovered(step, accuracy)
            self.snapshots.take(step)
