"""Run a 7b trial: continue a 7a checkpoint under an arm's treatment.

All trials of all phases share the schedule, the batches of their seed and this code. An arm only says what is added:
controllers that may operate, a regulariser, further tasks. The arm that adds nothing is the control.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer

from phasegate.base.errors import UserError
from phasegate.base.paths import BASELINES, MODELS, PREPARED
from phasegate.model.classifier import Model
from phasegate.model.moe import routing_entropy
from phasegate.params import Params
from phasegate.params.fields import suggestion
from phasegate.params.phases import Schedule
from phasegate.records.prepared import META
from phasegate.records.tables import write_table
from phasegate.records.trial_folder import CURVE, LOADS, SURGERIES, SURGERY_COLUMNS
from phasegate.surgery.hyperplanes import sibling_balance
from phasegate.surgery.operations import grow_older, kill_some
from phasegate.surgery.surgeon import Surgeon, Treatment
from phasegate.surgery.tasks import Tasks, add_tasks, further_losses
from phasegate.training import checkpoint, loop, losses, randomness
from phasegate.training.course import Course, load_start, start_files
from phasegate.training.curves import Curve
from phasegate.training.killed_trials import Snapshots, Stateful
from phasegate.trials.run import run_trials
from phasegate.trials.trial import Trial


@dataclass(frozen=True)
class Arm:
    """Say what an arm adds to the control."""

    treatment: Treatment | None = None
    entropy_weight: float = 0.0  # of the routing entropy in the loss
    tasks: Tasks | None = None
    schedule: Schedule | None = None  # in place of the phase's
    dead: int = 0  # experts of each layer of the checkpoint that are killed at the start


def run_phase(phase: str, arms: Mapping[str, Arm], params: Params) -> None:
    """Run the arms that `params.yaml` lists for a phase, with every seed, and fill `models/<phase>`."""
    names = params.arms()[phase]
    if unknown := [name for name in names if name not in arms]:  # of a stage that runs without the first
        raise UserError(f"decisions.phases.{phase}.arms has {unknown[0]!r}: {suggestion(unknown[0], arms)}")
    listed = {name: arms[name] for name in names}
    run_trials(continuations(PREPARED, BASELINES, phase, listed, params.seeds.all, params.p7b), MODELS / phase)


def continuations(
    prepared: Path, baselines: Path, phase: str, arms: Mapping[str, Arm], seeds: range, schedule: Schedule
) -> list[Trial]:
    """List the trials of all arms and seeds: seed s starts from `baselines`/seed-s."""
    trials = []
    for name, arm in arms.items():
        for seed in seeds:
            start = baselines / f"seed-{seed}"
            arguments = {"prepared": prepared, "start": start, "phase": phase, "name": name, "arm": arm, "seed": seed}
            arguments["schedule"] = arm.schedule or schedule
            inputs = (*start_files(prepared, start), *(arm.treatment.files(seed) if arm.treatment else ()))
            trials.append(Trial(phase, name, seed, run_arm, arguments, inputs, (prepared / META,)))
    return trials


def run_arm(
    folder: Path, *, prepared: Path, start: Path, phase: str, name: str, arm: Arm, seed: int, schedule: Schedule
) -> None:
    """Run one trial and leave a checkpoint, the learning curve, the loads and the log of surgeries in `folder`."""
    model, optimizer, course = load_start(prepared, start, seed, schedule)
    kill_some(model.layers, optimizer, arm.dead, seed)
    train_arm(folder, model, optimizer, course, phase, name, arm)


def train_arm(
    folder: Path,
    model: Model,
    optimizer: Optimizer,
    course: Course,
    phase: str,
    name: str,
    arm: Arm,
    before: pd.DataFrame | None = None,
    until: int | None = None,
) -> None:
    """Train a model by an arm's treatment, and leave what `run_arm` leaves.

    A model that was trained on this course before brings the curve of it; its controllers act at once, too. If the
    course goes on after the step `until`, the checkpoint holds the optimizer.
    """
    training, n_routed, seed, schedule = course.training, model.n_routed, course.seed, course.schedule
    record = checkpoint.Record(phase=phase, arm=name, seed=seed, training=training, n_routed_start=n_routed)
    curve, last = Curve(model, course.gate), until or schedule.steps
    if arm.tasks:
        torch.manual_seed(randomness.derived_seed(seed, "task heads"))
        add_tasks(model, optimizer, [max(m) + 1 for m in arm.tasks.label_maps], arm.tasks.own_gates)
    surgeon = Surgeon(model, optimizer, arm.treatment, course) if arm.treatment else None
    parts: dict[str, Stateful] = {"curve": curve, **({"surgeon": surgeon} if surgeon else {})}
    snapshots = Snapshots(folder, model, optimizer, parts)

    def begin() -> None:
        if before is None:
            curve.measure(course.begun)
            return
        curve.points = before.to_dict("records")  # type: ignore[assignment]
        if surgeon:
            surgeon.act(course.begun)

    def after_step(step: int, loss: Tensor) -> None:
        curve.add_loss(loss)
        for moe in model.layers:
            grow_older(moe, optimizer)
        point = step % schedule.eval_every == 0 or step == last
        if point:
            curve.measure_loads(step)
        if surgeon and course.acts_at(step):
            surgeon.act(step)
        if point:
            accuracy = 100 * curve.measure(step) / len(course.gate)
            if surgeon:
                surgeon.mark_recovered(step, accuracy)
            snapshots.take(step)

    kept = optimizer if until else None
    save = partial(checkpoint.save, model=model, optimizer=kept, record=record, gate=course.gate)
    objective, done = _objective(model, arm, course, surgeon), snapshots.begin(begin, course.begun)
    with snapshots.last_good(save):
        loop.fit(model, optimizer, course.batches, objective, course.rates[:last], after_step, done)
    save(folder)
    log = pd.DataFrame(surgeon.log if surgeon else [], columns=SURGERY_COLUMNS)
    for file, table in zip((CURVE, LOADS, SURGERIES), (*curve.tables(), log), strict=True):
        write_table(folder / file, table, digits=None)


def _objective(model: Model, arm: Arm, course: Course, surgeon: Surgeon | None) -> losses.Objective:
    """Return the control arm's loss, plus what the arm adds to it."""
    tasks, schedule = arm.tasks, course.schedule
    label_maps = [torch.tensor(m, device=course.gate.x.device) for m in tasks.label_maps] if tasks else []

    def objective(x: Tensor, y: Tensor, step: int) -> Tensor:
        output = model(x, n_tasks=1 + len(label_maps))
        losses.nudge_selection(model, output)
        loss = losses.main_loss(model, output, y, course.training.label_smoothing)
        if tasks:
            loss = loss + tasks.weight * further_losses(output, y, label_maps)
        if arm.entropy_weight:
            entropies = [routing_entropy(routing.probs).mean() for routing in output.routings]
            loss = loss + arm.entropy_weight * torch.stack(entropies).mean()
        if schedule.hyperplanes == "balanced":
            for moe, routing in zip(model.layers, output.routings, strict=True):
                loss = loss + schedule.sibling_balance * sibling_balance(moe, routing)
        return loss + surgeon.loss(output.routings, step) if surgeon else loss

    return objective
