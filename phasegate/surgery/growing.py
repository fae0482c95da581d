"""Run a trial of 7c.1 or 7c.2: a model that starts too small, and may grow while it is trained.

All of them train on one course: its steps, rates and batches depend on the seed alone. Arms that do the same until a
step share the trial that trains until then.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from phasegate.base.paths import EARLY, MODELS, PREPARED
from phasegate.model.classifier import Model, ModelSpec
from phasegate.params import Params
from phasegate.params.fields import Name, Positive, Section, load_section, parse
from phasegate.params.phases import BIRTH_STEPS, Grow, Growing, GrowMany, Schedule
from phasegate.params.pretraining import Training
from phasegate.params.reading import load_yaml
from phasegate.records.prepared import FIT, META, load_meta
from phasegate.records.tables import read_table
from phasegate.records.trial_folder import CURVE
from phasegate.surgery.continuation import Arm, train_arm
from phasegate.surgery.controllers import TimedPolicy
from phasegate.surgery.moments import set_expert_rate
from phasegate.surgery.operations import Moments
from phasegate.surgery.surgeon import Treatment
from phasegate.training import loop
from phasegate.training.batches import Batches, Examples, load_examples
from phasegate.training.course import Course, load_baseline, set_hyperplanes, start_files
from phasegate.training.device import device
from phasegate.training.randomness import derived_seed
from phasegate.trials.trial import Trial

CONTINUE = Arm()


@dataclass(frozen=True)
class Plan:
    """Say which model a trial trains, from which step to which, and what it adds."""

    spec: ModelSpec
    training: Training
    schedule: Schedule
    begin: int = 0
    until: int | None = None  # None: the last step
    classes: int | None = None  # so many, the first; None: all
    rate: float = 1.0  # of the matrices of experts, relative to all others'
    arm: Arm = CONTINUE

    def then(self, arm: Arm, rate: float) -> "Plan":
        """Return the plan of an arm that continues after this one, with all classes, to the last step."""
        return replace(self, begin=self.until or 0, until=None, classes=None, rate=rate, arm=arm)


class Rates(Section):
    """Define the content of `models/rates.yaml`."""

    rates: dict[Name, Positive]


class GrowingCourse(Course):
    """Hold data and schedule of all trials of one seed; they train from scratch."""

    @cached_property
    def rates(self) -> list[float]:
        return loop.cosine(self.training.lr, self.schedule.steps, self.training.warmup)

    @cached_property
    def batches(self) -> Batches:
        return Batches(self.train, self.training.batch, self.seed, self.training)


def growing(phase: str, name: str, seed: int, plan: Plan, start: Path | None = None) -> Trial:
    """Return the trial that carries out a plan, from scratch or from the trial in the folder `start`."""
    arguments = {"prepared": PREPARED, "start": start, "phase": phase, "name": name, "seed": seed, "plan": plan}
    inputs = (*start_files(PREPARED, start), start / CURVE) if start else (PREPARED / FIT,)
    treatment = plan.arm.treatment
    files = treatment.files(seed) if treatment else ()
    return Trial(phase, name, seed, grow, arguments, (*inputs, *files), (PREPARED / META,))


def grow(folder: Path, *, prepared: Path, start: Path | None, phase: str, name: str, seed: int, plan: Plan) -> None:
    """Carry out a plan, and leave what `continuation.run_arm` leaves."""
    train, signal, gate = load_examples(prepared, device())
    if start:
        model, optimizer, _ = load_baseline(start, gate)
    else:
        torch.manual_seed(derived_seed(seed, "initial weights"))
        model = Model(plan.spec).to(train.x.device)
        optimizer = loop.make_optimizer(model.parameters(), plan.training)
    set_hyperplanes(model, plan.schedule)
    set_expert_rate(model, optimizer, plan.rate)
    if plan.classes:
        known = train.y < plan.classes
        train = Examples(train.x[known], train.y[known])
    course = GrowingCourse(train, signal, gate, plan.training, plan.schedule, seed, plan.begin)
    before = read_table(start / CURVE) if start else None
    train_arm(folder, model, optimizer, course, phase, name, plan.arm, before, plan.until)


def grown(params: Params, way: Grow | GrowMany, at: int, moments: Moments = "scaled") -> Arm:
    """Return the arm that grows in some way at a step, from the small number of experts to the large one."""
    return Arm(Treatment(TimedPolicy((at,)), way, None, moments, params.p7c.added(way)))


def operators(params: Params) -> dict[str, tuple[str, Arm]]:
    """Return the ways to have experts, each with the early steps that it starts from: rates are chosen for them."""
    at = params.p7c1.at
    return {
        "small": ("at", CONTINUE),
        "large": ("large", CONTINUE),
        "birth": ("at", grown(params, "birth", at)),
        "handover": ("at", grown(params, "handover", at)),
        "upcycle": ("at", grown(params, "upcycle", at)),
        "upcycle_carried": ("at", grown(params, "upcycle", at, "carried")),
        "reinit": ("at", grown(params, "reinit", at)),
        "split": ("at", grown(params, "split", at)),
    }


def early_plans(params: Params) -> dict[str, tuple[Plan, str | None]]:
    """Return the plans of early steps that arms share, each with the early steps that it continues.

    `short` has fewer steps in all: a birth in it costs no more expert products than `small`.
    """
    small, large, times, arrival = params.p7c.small, params.p7c.large, params.p7c1, params.p7c2
    shorter = params.p7c.model_copy(update={"steps": params.p7c.steps - BIRTH_STEPS})
    return {
        "early": (_plan(params, small, until=times.early), None),
        "at": (_plan(params, small, begin=times.early, until=times.at), "early"),
        "late": (_plan(params, small, begin=times.at, until=times.late), "at"),
        "large": (_plan(params, large, until=times.at), None),
        "short": (_plan(params, small, shorter, until=times.at), None),
        "few": (_plan(params, small, until=arrival.at, classes=arrival.classes), None),
        "few_large": (_plan(params, large, until=arrival.at, classes=arrival.classes), None),
    }


def early_trials(params: Params, phase: str, seeds: Iterable[int], names: Iterable[str]) -> list[Trial]:
    """List the trials of early steps, below `models/<phase>`."""
    plans = {name: plan for name, plan in early_plans(params).items() if name in names}
    return [
        growing(phase, name, seed, plan, MODELS / phase / before / f"seed-{seed}" if before else None)
        for name, (plan, before) in plans.items()
        for seed in seeds
    ]


def late_trials(
    params: Params, phase: str, seeds: Iterable[int], arms: Mapping[str, tuple[str, Arm, float]], early: Path = EARLY
) -> list[Trial]:
    """List the trials of arms: by name the early steps below `early` that it continues, the arm, and its rate."""
    plans = early_plans(params)
    return [
        growing(phase, name, seed, plans[start][0].then(arm, rate), early / start / f"seed-{seed}")
        for name, (start, arm, rate) in arms.items()
        for seed in seeds
    ]


def restart(params: Params, phase: str, name: str, seed: int, rate: float) -> Trial:
    """Return the trial that begins anew with the large number of experts when classes arrive."""
    return growing(phase, name, seed, _plan(params, params.p7c.large, begin=params.p7c2.at, rate=rate))


def load_rates() -> dict[str, float]:
    """Return the chosen rate of expert matrices of each operator, relative to all other parameters."""
    values = load_yaml(path := MODELS / "rates.yaml")
    return parse(Rates, values, str(path)).rates


def _plan(params: Params, n_routed: int, growing: Growing | None = None, **values: Any) -> Plan:
    growing, meta = growing or params.p7c, load_meta(PREPARED)
    spec = ModelSpec(params.growing_model(n_routed), meta.input_shape, (meta.classes,))
    training = load_section(MODELS / "q1.yaml", "training", Training)
    training = training.model_copy(update={"steps": growing.steps})
    return Plan(spec, training, growing.schedule(params.p7b), **values)
