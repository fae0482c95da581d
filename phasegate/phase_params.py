"""Parameters of the phases after 7a: their schedule, their signals, one's own arms, and what is claimed of each."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from phasegate.plugins import Plugin
from phasegate.sections import (
    MOST,
    Count,
    Index,
    Name,
    NonNegative,
    Number,
    Positive,
    Probability,
    Section,
    Size,
    Text,
    suggestion,
)
from phasegate.study import ARMS, MEASURED, PREDICTED, SIGNALS

Grow = Literal["split", "clone", "reinit"]
Prune = Literal["remove", "merge"]
SURGERIES: dict[str, tuple[str, ...]] = {"grow": get_args(Grow), "prune": get_args(Prune)}
"""The built-in surgeries, by the parameter that may name one."""


class Schedule(Section):
    """What every 7b trial and its control share."""

    steps: Count
    lr_scale: Positive
    act_every: Count
    settle: Index
    cooldown: Index
    min_experts: Size
    max_experts: Size
    eval_every: Count
    split_direction: Literal["random", "principal", "loss"]
    hyperplanes: Literal["fixed", "trained", "balanced"]
    sibling_balance: NonNegative

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.min_experts > self.max_experts:
            raise ValueError(f"min_experts is {self.min_experts}: it must be at most max_experts = {self.max_experts}")
        if self.eval_every > self.steps:
            raise ValueError(f"eval_every is {self.eval_every}: it must be at most steps = {self.steps}")
        if self.act_every + self.settle > self.steps:
            raise ValueError(
                f"act_every + settle is {self.act_every + self.settle}: it must be at most steps = "
                f"{self.steps}, else no controller ever acts"
            )
        return self

    @property
    def last_decision(self) -> int:
        """The last step at which controllers decide."""
        return (self.steps - self.settle) // self.act_every * self.act_every


class RandomLabels(Section):
    """Phase 7b.1."""

    grow: Probability
    prune: Probability
    loss_weight: NonNegative
    head_lr: Positive

    @model_validator(mode="after")
    def _check(self) -> "RandomLabels":
        if self.grow + self.prune > 1:
            raise ValueError(f"grow + prune is {self.grow + self.prune}: it must be at most 1")
        return self


class EntropyLabels(Section):
    """When routing entropy, as a multiple of the batch's, says grow or prune; and the head that learns it."""

    grow_below: NonNegative
    prune_above: NonNegative
    head_lr: Positive

    @model_validator(mode="after")
    def _check(self) -> "EntropyLabels":
        if self.grow_below > self.prune_above:
            raise ValueError(f"grow_below is {self.grow_below}: it must be at most prune_above = {self.prune_above}")
        return self


class RoutingEntropy(Section):
    """Phase 7b.2."""

    labels: EntropyLabels
    entropy_weight: Number


class MultiTask(Section):
    """Phase 7b.3."""

    task_weight: NonNegative


class UsageLabels(Section):
    """When an expert's load, as a multiple of the even share, says grow or prune."""

    grow_above: NonNegative
    prune_below: NonNegative

    @model_validator(mode="after")
    def _check(self) -> "UsageLabels":
        if self.prune_below > self.grow_above:
            raise ValueError(f"prune_below is {self.prune_below}: it must be at most grow_above = {self.grow_above}")
        return self


class GroundTruth(Section):
    """Phase 7b.4: how changes of the loss are measured, and what they must be worth."""

    recovery_steps: Count
    repeats: Annotated[int, Field(ge=2, le=MOST, strict=True)]
    surveys: Count
    survey_every: Count
    surveyed: Count
    candidates: Count
    price: NonNegative
    usage: UsageLabels


class SurgeryStudy(Section):
    """The study of surgery apart from any signal."""

    operations: Annotated[int, Field(ge=2, le=MOST, multiple_of=2, strict=True)]
    in_a_row: Count


class Claim(Section):
    """What a phase claims, written before it runs."""

    primary: Text
    hypothesis: Text


class Decisions(Section):
    """How verdicts are reached."""

    margin_pp: NonNegative
    confidence: Annotated[Number, Field(gt=0.5, lt=1)]
    phases: dict[str, Claim]

    @model_validator(mode="after")
    def _check(self) -> "Decisions":
        if set(self.phases) != set(ARMS):
            raise ValueError(f"phases has {', '.join(self.phases)}: it must have {', '.join(ARMS)}")
        for phase, claim in self.phases.items():
            if claim.primary not in ARMS[phase]:
                raise ValueError(
                    f"the primary arm of {phase} is {claim.primary!r}: {suggestion(claim.primary, ARMS[phase])}"
                )
        return self


class OwnArm(Section):
    """An arm of one's own: the files in `plugins/`, by name, that hold its signal and perhaps its surgery."""

    signal: Name
    grow_above: Number = 1.5  # thresholds of the scores, in standard deviations over the experts
    prune_below: Number = -1.5
    grow: Name = "split"
    prune: Name = "remove"

    @model_validator(mode="after")
    def _check(self) -> "OwnArm":
        if self.signal in (*SIGNALS, PREDICTED, MEASURED):
            raise ValueError(
                f"signal is {self.signal!r}, the name of a built-in signal, scored in the same tables: "
                f"give the file {self.signal_plugin.path} another"
            )
        return self

    @property
    def signal_plugin(self) -> Plugin:
        """The signal."""
        return Plugin(self.signal, "signal")

    @property
    def grow_by(self) -> Grow | Plugin:
        """How an expert is added."""
        grow: Grow | Plugin = _surgery(self.grow, "grow")
        return grow

    @property
    def prune_by(self) -> Prune | Plugin:
        """How an expert is taken away."""
        prune: Prune | Plugin = _surgery(self.prune, "prune")
        return prune

    @property
    def plugins(self) -> dict[str, Plugin]:
        """All of them, by the parameter that names them."""
        named = {"signal": self.signal_plugin, "grow": self.grow_by, "prune": self.prune_by}
        return {key: plugin for key, plugin in named.items() if isinstance(plugin, Plugin)}


class Own(Section):
    """Arms of one's own, the first of which decides the phase."""

    hypothesis: Text
    arms: dict[Name, OwnArm]


class Headline(Section):
    """What metrics.json holds."""

    phase: Text
    arm: Text  # of the phase; "primary" for the one that decides it


def _surgery(name: str, key: str) -> Any:
    """A kind of surgery by name: a built-in one, or else a file."""
    return name if name in SURGERIES[key] else Plugin(name, "operate")
