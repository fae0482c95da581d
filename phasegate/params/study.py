"""Read params.yaml into frozen, typed objects, and refuse what cannot be right with one sentence."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from phasegate.base.errors import UserError
from phasegate.params import names, phases
from phasegate.params.fields import Name, Section, Seeds, check_at_most, override, parse, suggestion
from phasegate.params.pretraining import BASE, Architecture, Baseline, Data, Reference, Search, Training
from phasegate.params.reading import load_yaml

PARAMS = Path("params.yaml")


class Params(Section):
    """Hold all of params.yaml."""

    seeds: Seeds
    data: Data
    training: Training
    model: Architecture
    references: dict[Name, Annotated[dict[Name, Reference], Field(min_length=1)]]
    q1: Search
    q2: Search
    p7a: Baseline
    p7b: phases.Schedule
    p7b1: phases.RandomLabels
    p7b2: phases.RoutingEntropy
    p7b3: phases.MultiTask
    p7b4: phases.GroundTruth
    surgery: phases.SurgeryStudy
    p7c: phases.Growing
    p7c1: phases.GrowingTimes
    p7c2: phases.Arriving
    p7c3: phases.Repairing
    plugins: phases.Plugins
    decisions: phases.Decisions
    headline: phases.Headline

    def check_together(self) -> None:
        self.check_headline(self.headline)
        more, why = phases.BIRTH_STEPS + 1, ", else the shortest trials of 7c only warm up"
        for key, training in self.trainings().items():
            check_at_most(f"{key}.warmup + {more}", training.warmup + more, "p7c.steps", self.p7c.steps, why)
        if self.p7a.n_routed not in {model.n_routed for model in self.architectures().values()}:
            raise ValueError(f"p7a.n_routed is {self.p7a.n_routed}, but no candidate of q2 has that many: add one")
        if self.seeds.count < 2:
            raise ValueError("seeds.count is 1: 7b.4's control head learns from other seeds, so it must be at least 2")
        self._check_times()
        for key, model in self.architectures().items():
            if model.n_routed == self.p7a.n_routed == model.top_k:
                why = "no expert of such a baseline can be removed, and 7b.4's control head learns from removals"
                raise ValueError(f"{key} has top_k = n_routed = {model.top_k} = p7a.n_routed: {why}")
        for data, models in self.references.items():
            if shared := models.keys() & {BASE, *self.q1.candidates}:
                both = "as q1 names a candidate, and both stand in one table"
                raise ValueError(f"references.{data} has {min(shared)!r}, {both}: rename one")
        if "default" not in self.references:
            raise ValueError("references.default is missing: the models of data sets that have none of their own")

    def arms(self) -> dict[str, tuple[str, ...]]:
        """Return the arms of each phase, by name."""
        listed = {phase: claim.arms for phase, claim in self.decisions.phases.items()}
        return {names.START: (names.BASELINE, names.CONTROL), **listed, names.PLUGINS: tuple(self.plugins.arms)}

    def check_headline(self, headline: phases.Headline) -> None:
        """Raise `UserError` for a phase or an arm that is not in the study."""
        phase, arm, arms = headline.phase, headline.arm, self.arms()
        if phase not in arms:
            raise UserError(f"headline.phase is {phase!r}: {suggestion(phase, arms)}")
        if not arms[phase]:
            raise UserError(f"headline.phase is {names.PLUGINS}, but plugins.arms is empty")
        if arm not in (known := (names.PRIMARY, *arms[phase])):
            raise UserError(f"headline.arm is {arm!r}, no arm of {phase}: {suggestion(arm, known)}")

    def _check_times(self) -> None:
        """Check what surgery, controllers and surveys need of the schedule."""
        truth, schedule, start, operations = self.p7b4, self.p7b, self.p7a.n_routed, self.surgery.operations
        survey, measured = "p7b4.survey_every * (p7b4.surveys - 1)", truth.last_survey + truth.recovery_steps
        growing, last = self.p7c, "p7c.steps - p7c.settle"
        decisions, half = schedule.last_decision // schedule.act_every, schedule.act_every * operations // 2
        for name, value, limit_name, limit in (
            ("surgery.operations", operations, "(p7b.steps - p7b.settle) / p7b.act_every", decisions),
            ("p7a.n_routed + surgery.operations", start + operations, "p7b.max_experts", schedule.max_experts),
            ("p7b.min_experts + surgery.operations / 2", schedule.min_experts + operations // 2, "p7a.n_routed", start),
            ("p7b.cooldown", schedule.cooldown, "p7b.act_every * surgery.operations / 2", half),
            ("p7b4.recovery_steps", truth.recovery_steps, "p7b.settle", schedule.settle),
            (f"{survey} + p7b4.recovery_steps", measured, "p7b.steps", schedule.steps),
            ("p7c1.late", self.p7c1.late, last, growing.steps - growing.settle),
            ("p7c2.at", self.p7c2.at, last, growing.steps - growing.settle),
            (f"p7c1.at + {phases.BIRTH_STEPS + 1}", self.p7c1.at + phases.BIRTH_STEPS + 1, "p7c.steps", growing.steps),
            ("p7c3.dead + p7b.min_experts", self.p7c3.dead + schedule.min_experts, "p7a.n_routed", start),
        ):
            check_at_most(name, value, limit_name, limit)
        if truth.last_survey < schedule.last_decision:
            least = f"{schedule.last_decision}, the step of the last decision of p7b, since heads know no later times"
            said = f"{survey} is {truth.last_survey}, the step of the last survey"
            raise ValueError(f"{said}: it must be at least {least}")

    def trainings(self) -> dict[str, Training]:
        """Return the training configurations of Q1, by the key they stand under: the base and every candidate."""
        found = self.q1.variants(self.training, "q1").items()
        return {"training" if name == BASE else f"q1.candidates.{name}": training for name, training in found}

    def architectures(self) -> dict[str, Architecture]:
        """Return the architectures of Q2, by the key they stand under: the base and every candidate."""
        models = self.q2.variants(self.model, "q2").items()
        return {"model" if name == BASE else f"q2.candidates.{name}": model for name, model in models}

    def growing_model(self, n_routed: int) -> Architecture:
        """Return the architecture of 7c.1 and 7c.2 with so many experts."""
        changes = {"n_routed": n_routed, "top_k": self.p7c.top_k, "expert_width": self.p7c.expert_width}
        return override(self.model, changes, "p7c")

    def claims(self) -> dict[str, phases.Claim]:
        """Return the claim of each phase that has arms."""
        if not (arms := tuple(self.plugins.arms)):
            return self.decisions.phases
        controls = {name: names.COMPARED[arm.phase] for name, arm in self.plugins.arms.items()}
        stated = self.plugins.model_dump(exclude={"arms"})
        claim = phases.Claim(arms=arms, primary=arms[0], controls=controls, **stated)
        return self.decisions.phases | {names.PLUGINS: claim}


def load_params(path: Path = PARAMS) -> Params:
    """Read and check a parameter file; `UserError` says what is wrong, and in which file if it is not params.yaml."""
    if not path.exists():
        raise UserError(f"{path} is missing: run from the folder that holds dvc.yaml")
    values = load_yaml(path)
    try:
        return parse(Params, values)
    except UserError as error:
        raise error if path == PARAMS else UserError(f"{path}: {error}") from None
