"""The parameters of the study: params.yaml, parsed once into frozen, typed objects.

Unknown keys, wrong types and impossible combinations are refused with a sentence that names the key, the value
and what would be right. Library functions take these objects or plain values, never YAML.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from phasegate.errors import UserError
from phasegate.phase_params import (
    Claim,
    Decisions,
    GroundTruth,
    Headline,
    MultiTask,
    Own,
    RandomLabels,
    RoutingEntropy,
    Schedule,
    SurgeryStudy,
)
from phasegate.pretraining_params import Architecture, Baseline, Data, Reference, Search, Training
from phasegate.sections import Name, Section, Seeds, load_yaml, override, parse, suggestion
from phasegate.study import ARMS, OWN, PRIMARY, START, START_ARMS

PARAMS = Path("params.yaml")


class Params(Section):
    """All of params.yaml."""

    seeds: Seeds
    data: Data
    training: Training
    model: Architecture
    references: dict[Name, Annotated[dict[Name, Reference], Field(min_length=1)]]
    q1: Search
    q2: Search
    p7a: Baseline
    p7b: Schedule
    p7b1: RandomLabels
    p7b2: RoutingEntropy
    p7b3: MultiTask
    p7b4: GroundTruth
    surgery: SurgeryStudy
    own: Own
    decisions: Decisions
    headline: Headline

    @model_validator(mode="after")
    def _check(self) -> "Params":
        self.check_headline(self.headline)
        self._check_searches()
        self._check_surgery()
        self._check_ground_truth()
        if "default" not in self.references:
            raise ValueError("references.default is missing: the models of data sets that have none of their own")
        return self

    def check_headline(self, headline: Headline) -> None:
        """Raises UserError for a phase or an arm that is not in the study."""
        phases = {START: START_ARMS} | ARMS | {OWN: tuple(self.own.arms)}
        if headline.phase not in phases:
            raise UserError(f"headline.phase is {headline.phase!r}: {suggestion(headline.phase, phases)}")
        known = (PRIMARY, *phases[headline.phase])
        if headline.arm not in known:
            raise UserError(
                f"headline.arm is {headline.arm!r}, no arm of {headline.phase}: {suggestion(headline.arm, known)}"
            )
        if not phases[headline.phase]:
            raise UserError(f"headline.phase is {OWN}, but own.arms is empty")

    def _check_searches(self) -> None:
        for name, changes in self.q1.candidates.items():
            override(self.training, changes, f"q1.candidates.{name}")
        if self.p7a.n_routed not in {model.n_routed for model in self.architectures().values()}:
            raise ValueError(
                f"p7a.n_routed is {self.p7a.n_routed}, but no candidate of q2 has that many experts: give it one"
            )

    def _check_surgery(self) -> None:
        start, schedule, operations = self.p7a.n_routed, self.p7b, self.surgery.operations
        slots = (schedule.steps - schedule.settle) // schedule.act_every
        if operations > slots:
            raise ValueError(
                f"surgery.operations is {operations}, but p7b has time for {slots}: one every act_every = "
                f"{schedule.act_every} of the steps = {schedule.steps}, without the last settle = {schedule.settle}"
            )
        if start + operations > schedule.max_experts:
            raise ValueError(
                f"surgery.operations is {operations}: added to p7a.n_routed = {start} it must "
                f"be at most p7b.max_experts = {schedule.max_experts}"
            )
        if start < schedule.min_experts:
            raise ValueError(f"p7b.min_experts is {schedule.min_experts}: p7a.n_routed = {start} is below it")
        if schedule.cooldown > (wait := schedule.act_every * operations // 2):
            raise ValueError(
                f"p7b.cooldown is {schedule.cooldown}: it must be at most {wait} (act_every * surgery.operations / 2), "
                "else the surgery study has no rested halves to merge"
            )

    def _check_ground_truth(self) -> None:
        truth, schedule = self.p7b4, self.p7b
        if self.seeds < 2:
            raise ValueError("seeds is 1: 7b.4's control head learns from the other seeds, so it must be at least 2")
        if truth.recovery_steps > schedule.settle:
            raise ValueError(
                f"p7b4.recovery_steps is {truth.recovery_steps}: it must be at most p7b.settle = "
                f"{schedule.settle}, else the last forks would outlast the phase"
            )
        last = truth.survey_every * (truth.surveys - 1)
        if last + truth.recovery_steps > schedule.steps:
            raise ValueError(
                f"the last of p7b4.surveys = {truth.surveys}, one every survey_every = {truth.survey_every}, "
                f"is at step {last}: with recovery_steps = {truth.recovery_steps} it must end by p7b.steps = "
                f"{schedule.steps}"
            )
        if last < schedule.last_decision:
            right = "surveys must be at least 2"
            if truth.surveys > 1:
                right = f"it must be at least {-(-schedule.last_decision // (truth.surveys - 1))}"
            raise ValueError(
                f"p7b4.survey_every is {truth.survey_every}: the last of surveys = {truth.surveys} is at step {last}, "
                f"before p7b's last decision at step {schedule.last_decision}, and heads know no later times: {right}"
            )

    def architectures(self) -> dict[str, Architecture]:
        """The architectures of Q2, by the key they stand under: the base and every candidate."""
        return {"model": self.model} | {
            key: override(self.model, changes, key)
            for key, changes in ((f"q2.candidates.{name}", changes) for name, changes in self.q2.candidates.items())
        }

    def claims(self) -> dict[str, Claim]:
        """What each phase that has arms claims."""
        if not self.own.arms:
            return self.decisions.phases
        return self.decisions.phases | {OWN: Claim(primary=next(iter(self.own.arms)), hypothesis=self.own.hypothesis)}

    def references_of(self, name: str) -> dict[str, Reference]:
        """The reference models of a data set; those under `default` where it has none of its own."""
        return self.references.get(name, self.references["default"])


def load_params(path: Path = PARAMS) -> Params:
    """Read and check the whole file.

    Raises:
        UserError: if the file is missing, is not YAML, or holds something that is not allowed; of any but the study's
            own, it says which.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: run from the folder that holds dvc.yaml")
    values = load_yaml(path)
    try:
        return parse(Params, values)
    except UserError as error:
        raise error if path == PARAMS else UserError(f"{path}: {error}") from None
