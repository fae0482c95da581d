"""Define the parameters of the phases after 7a: schedule, signals, people's own arms, and the claims of each phase."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from phasegate.params import fields
from phasegate.params.fields import Count, Hypothesis, Index, Name, NonNegative, Number, Positive, Section, Size, Text
from phasegate.params.names import COMPARED, CONTINUED, MEASURED, PHASES, PLUGINS, PREDICTED, RESERVED, SIGNALS
from phasegate.params.plugins import Plugin

Grow = Literal["split", "clone", "reinit"]
GrowMany = Literal["birth", "handover", "upcycle"]  # which add any number of experts at once
Prune = Literal["remove", "merge"]
Chance = Annotated[Number, Field(gt=0.5, lt=1)]
Arm = Annotated[str, Field(pattern=r"^[a-z0-9_]+/[a-z0-9_]+$", max_length=201)]
BIRTH_STEPS = 100
"""Steps of training until a birth is over."""
NEVER = "none"
SURGERIES: dict[str, tuple[str, ...]] = {
    "grow": (*get_args(Grow), *get_args(GrowMany), NEVER),
    "prune": (*get_args(Prune), NEVER),
}
"""The built-in surgeries, by the parameter that may name one."""


class Schedule(Section):
    """Describe what every 7b trial and its control share."""

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

    ordered = (("min_experts", "max_experts"), ("eval_every", "steps"))

    def check_together(self) -> None:
        first = self.act_every + self.settle
        fields.check_at_most("act_every + settle", first, "steps", self.steps, ", else no controller ever acts")

    @property
    def last_decision(self) -> int:
        """Return the last step at which controllers decide."""
        return (self.steps - self.settle) // self.act_every * self.act_every


class RandomLabels(Section):
    """Describe phase 7b.1."""

    grow: fields.Probability
    prune: fields.Probability
    loss_weight: NonNegative
    head_lr: Positive

    def check_together(self) -> None:
        if self.grow + self.prune > 1:
            raise ValueError(f"grow + prune is {self.grow + self.prune}: it must be at most 1")


class EntropyLabels(Section):
    """Say when routing entropy, as a multiple of the batch's, means grow or prune; and describe the head."""

    grow_below: NonNegative
    prune_above: NonNegative
    head_lr: Positive

    ordered = (("grow_below", "prune_above"),)


class RoutingEntropy(Section):
    """Describe phase 7b.2."""

    labels: EntropyLabels
    entropy_weight: Number


class MultiTask(Section):
    """Describe phase 7b.3."""

    task_weight: NonNegative


class UsageLabels(Section):
    """Say when an expert's load, as a multiple of the even share, means grow or prune."""

    grow_above: NonNegative
    prune_below: NonNegative

    ordered = (("prune_below", "grow_above"),)


class Growing(Section):
    """Describe what every trial of 7c.1 and 7c.2 shares: a model that starts too small, and may grow."""

    steps: Count
    small: Size  # experts at the start
    large: Size  # experts once it has grown
    top_k: Size
    expert_width: Size
    act_every: Count
    settle: Count
    eval_every: Count
    seeds: fields.Seeds  # of the trials that choose rates
    rates: Annotated[tuple[Positive, ...], Field(min_length=1)]  # of expert matrices, once a model may have grown

    ordered = (("top_k", "small"), ("eval_every", "steps"))

    def check_together(self) -> None:
        if self.small >= self.large:
            raise ValueError(f"small is {self.small}: it must be below large = {self.large}")
        named = Counter(f"{rate:g}" for rate in self.rates)  # as trials and tables name them
        if twice := [rate for rate, often in named.items() if often > 1]:
            raise ValueError(f"rates has {twice[0]} twice: rates must differ in their first six digits")

    def added(self, way: str) -> int:
        """Return how many experts growing in some way adds; those that a handover retires are replaced, too."""
        return self.large - (0 if way == "handover" else self.small)

    def schedule(self, shared: Schedule) -> Schedule:
        """Return the schedule of the trials; what `Growing` does not say is as in `shared`."""
        own = {"steps": self.steps, "lr_scale": 1.0, "act_every": self.act_every, "settle": self.settle, "cooldown": 0}
        own |= {"eval_every": self.eval_every, "min_experts": self.small, "max_experts": self.large}
        return shared.model_copy(update=own)


class GrowingTimes(Section):
    """Describe phase 7c.1: when models grow."""

    early: Count
    at: Count
    late: Count

    ordered = (("early", "at"), ("at", "late"))


class Arriving(Section):
    """Describe phase 7c.2: classes from `classes` on arrive at step `at`."""

    classes: Count
    at: Count
    recovery_steps: Count
    repeats: Annotated[int, Field(ge=2, le=fields.MOST, strict=True)]


class Repairing(Section):
    """Describe phase 7c.3: `dead` experts of each 7a checkpoint are killed."""

    dead: Count


class GroundTruth(Section):
    """Describe phase 7b.4: how changes of the loss are measured, and what they must be worth."""

    recovery_steps: Count
    repeats: Annotated[int, Field(ge=2, le=fields.MOST, strict=True)]
    surveys: Count
    survey_every: Count
    surveyed: Count
    candidates: Count
    every: Count
    certainty: Chance
    price: NonNegative
    usage: UsageLabels

    @property
    def last_survey(self) -> int:
        """Return the step of the last survey."""
        return self.survey_every * (self.surveys - 1)


class SurgeryStudy(Section):
    """Describe the study of surgery apart from any signal."""

    operations: Annotated[int, Field(ge=2, le=fields.MOST, multiple_of=2, strict=True)]
    in_a_row: Count


class Assay(Section):
    """Name two arms, `phase/arm`, whose order is known: a phase that does not tell them apart gets no verdict."""

    better: Arm
    worse: Arm
    margin_pp: NonNegative  # the lower bound of better minus worse must lie above it


class Stated(Section):
    """State what is claimed, before it runs."""

    claim: Literal["harmless", "gain"]
    hypothesis: Hypothesis
    expected: Literal["GO", "NO-GO"]  # the verdict if the hypothesis is right
    assay: Assay


class Claim(Stated):
    """State what a phase claims, and by which of its arms."""

    arms: Annotated[tuple[Name, ...], Field(min_length=1)]  # the arms that run, by the names that its stage gives them
    primary: Text
    control: Arm = CONTINUED  # what the arms are compared with
    controls: dict[Name, Arm] = Field(default_factory=dict)  # of arms that are compared with another one

    def control_of(self, arm: str) -> str:
        """Return what an arm is compared with."""
        return self.controls.get(arm, self.control)

    def check_together(self) -> None:
        if self.primary not in self.arms:
            raise ValueError(f"primary is {self.primary!r}, no arm: {fields.suggestion(self.primary, self.arms)}")
        for arm in self.controls:
            if arm not in self.arms:
                raise ValueError(f"controls names {arm!r}, no arm: {fields.suggestion(arm, self.arms)}")


def acting_in(phase: str, claims: Mapping[str, Claim]) -> list[tuple[str, str]]:
    """Return phase and arm of all that acts in a phase: its own arms, then those of plugins with the same control."""
    own = claims.get(PLUGINS)
    plugins = [arm for arm in own.arms if own.control_of(arm) == COMPARED.get(phase)] if own else []
    return [*((phase, arm) for arm in claims[phase].arms), *((PLUGINS, arm) for arm in plugins)]


class Decisions(Section):
    """Say how verdicts are reached. Shares are of the control's mean error in the run, or of its mean NLL."""

    margin: NonNegative  # share: a loss within it does no harm
    gain: NonNegative  # share: the smallest gain worth having
    spread_pp: NonNegative  # standard deviation over seeds of a difference, in earlier runs
    confidence: Chance
    phases: dict[str, Claim]

    def check_together(self) -> None:
        if odd := sorted(set(self.phases) ^ set(PHASES)):
            said = f"has {odd[0][:80]!r}, which is none" if odd[0] in self.phases else f"lacks {odd[0]}"
            raise ValueError(f"phases {said}: it must have just {', '.join(PHASES)}")


class PluginArm(Section):
    """Describe an arm by the files in `plugins/`, by name, that hold its signal and perhaps its surgeries."""

    signal: Name
    grow_above: Number = 1.5  # thresholds of the scores, in standard deviations over the experts
    prune_below: Number = -1.5
    grow: fields.FileName = "split"
    prune: fields.FileName = "remove"
    phase: Literal["p7b", "p7c2", "p7c3"] = "p7b"  # where it acts: on 7a checkpoints, as classes arrive, among the dead

    def check_together(self) -> None:
        if self.grow == "handover" and self.phase != "p7c2":
            raise ValueError(f"grow is handover, but phase is {self.phase}: only in p7c2 are all experts replaced")
        if self.signal in (*SIGNALS, PREDICTED, MEASURED):
            said, path = f"signal is {self.signal!r}, the name of a built-in signal", self.find("signal").path
            raise ValueError(f"{said}, scored in the same tables: give the file {path} another name")

    def find(self, key: str) -> Any:
        """Return what `signal`, `grow` or `prune` names: a built-in surgery as it is, or else a file of `plugins/`.

        None for the surgery that the arm never does.
        """
        name = getattr(self, key)
        if name == NEVER and key in SURGERIES:
            return None
        if name in SURGERIES.get(key, ()):
            return name
        return Plugin(name, "signal" if key == "signal" else "operate")


class Plugins(Stated):
    """Describe people's own arms, the first of which decides the phase."""

    arms: dict[Name, PluginArm]

    def check_together(self) -> None:
        if taken := self.arms.keys() & RESERVED.keys():
            raise ValueError(f"arms has {(name := min(taken))!r}, which means {RESERVED[name]}: take another name")


class Headline(Section):
    """Say what metrics.json holds."""

    phase: Text
    arm: Text  # of the phase; "primary" for the one that decides it
