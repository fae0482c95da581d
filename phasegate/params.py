"""The parameters of the study: params.yaml, parsed once into frozen, typed objects.

Unknown keys, wrong types and impossible combinations are refused with a sentence that names the key, the value
and what would be right. Library functions take these objects or plain values, never YAML.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from phasegate.errors import UserError
from phasegate.sections import (
    LARGEST,
    MOST,
    Count,
    Fraction,
    Index,
    Name,
    NonNegative,
    Number,
    Positive,
    Probability,
    Scalar,
    Section,
    Seeds,
    Size,
    Text,
    load_yaml,
    override,
    parse,
    suggestion,
)

RAW = "data/raw"  # where downloads go, and the path of data sets that need no file
BASE = "base"  # a search's own base configuration, as a candidate
Phase = Literal["p7a", "p7b1", "p7b2", "p7b3", "p7b4", "surgery"]

ARMS: dict[str, tuple[str, ...]] = {
    "p7b1": ("noise_acting", "noise", "noise_detached", "random_acting", "random_split", "random_clone"),
    "p7b2": (
        *("split", "clone", "reinit", "split_thresholds", "clone_thresholds", "reinit_thresholds"),
        "entropy_loss",
    ),
    "p7b3": ("task_gates", "heads", "single"),
    "p7b4": ("counterfactual_head", "oracle", "frequency", "keep"),
    "surgery": (
        *("split", "clone", "reinit", "remove_by_usage", "remove_by_loss", "merge"),
        *("split_principal", "split_loss", "split_trained", "split_balanced"),
    ),
}
"""The arms of each phase that is decided on."""
START, START_ARMS = "p7a", ("baseline", "continue")
"""The phase whose checkpoints all later phases start from; its second arm is the control."""
PRIMARY = "primary"
"""Stands for the arm that decides a phase."""
EVALUATED_PHASES = ("references", "p7a", "continue", *ARMS)
"""Everything that leaves checkpoints to be evaluated."""


class Data(Section):
    """Which data set, and how it is split."""

    name: Literal["mnist1d", "fashion_mnist", "cifar10", "cifar100", "npz"]
    path: Text
    validation: Count
    split_seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)]
    tasks: dict[str, dict[str, list[Index]]]

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.name in ("npz", "cifar10", "cifar100") and self.path == RAW:
            raise ValueError(f"path is {RAW}, but data set {self.name} is read from a file: give its path")
        return self


class Training(Section):
    """One training configuration."""

    steps: Count
    batch: Count
    lr: Positive
    warmup: Index
    weight_decay: NonNegative
    label_smoothing: Fraction
    noise: NonNegative
    shift: Index

    @model_validator(mode="after")
    def _check(self) -> "Training":
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup}: it must be less than steps = {self.steps}")
        return self


class Architecture(Section):
    """One mixture-of-experts architecture, and how its load is balanced."""

    stem: Literal["mlp", "conv"]
    width: Size
    blocks: Size
    n_routed: Size
    n_shared: Annotated[int, Field(ge=0, le=LARGEST, strict=True)]
    top_k: Size
    expert_width: Size
    dropout: Fraction
    balance_loss: NonNegative
    balance_bias: NonNegative
    z_loss: NonNegative

    @model_validator(mode="after")
    def _check(self) -> "Architecture":
        if self.top_k > self.n_routed:
            raise ValueError(f"top_k is {self.top_k}: it must be at most n_routed = {self.n_routed}")
        return self


class Reference(Section):
    """A published model: a perceptron (`hidden` widths) or a strided convolutional network (`channels`)."""

    hidden: tuple[Size, ...] | None = None
    channels: tuple[Size, ...] | None = None
    steps: Count
    batch: Count
    lr: Positive
    weight_decay: NonNegative
    published: Annotated[Number, Field(ge=0, le=100)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Reference":
        if (self.hidden is None) == (self.channels is None):
            raise ValueError("exactly one of hidden and channels must be given")
        return self

    def training(self) -> Training:
        """As a training configuration: neither warm-up nor augmentation nor smoothing."""
        return Training(
            steps=self.steps,
            batch=self.batch,
            lr=self.lr,
            warmup=0,
            weight_decay=self.weight_decay,
            label_smoothing=0,
            noise=0,
            shift=0,
        )


class Search(Section):
    """A search: named overrides of a base configuration, each over several seeds."""

    seeds: Seeds
    candidates: dict[Name, dict[str, Scalar]]

    @model_validator(mode="after")
    def _check(self) -> "Search":
        if BASE in self.candidates:
            raise ValueError(f"a candidate is named {BASE}: that is the base configuration itself, always a candidate")
        return self


class Baseline(Section):
    """Phase 7a's baseline."""

    n_routed: Size


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


class Headline(Section):
    """What metrics.json holds."""

    phase: Phase
    arm: Text  # of the phase; "primary" for the one that decides it

    @model_validator(mode="after")
    def _check(self) -> "Headline":
        known = (PRIMARY, *({START: START_ARMS} | ARMS)[self.phase])
        if self.arm not in known:
            raise ValueError(f"arm is {self.arm!r}, no arm of {self.phase}: {suggestion(self.arm, known)}")
        return self


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
    decisions: Decisions
    headline: Headline

    @model_validator(mode="after")
    def _check(self) -> "Params":
        self._check_searches()
        self._check_surgery()
        self._check_ground_truth()
        if "default" not in self.references:
            raise ValueError("references.default is missing: the models of data sets that have none of their own")
        return self

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

    def architectures(self) -> dict[str, Architecture]:
        """The architectures of Q2, by the key they stand under: the base and every candidate."""
        return {"model": self.model} | {
            key: override(self.model, changes, key)
            for key, changes in ((f"q2.candidates.{name}", changes) for name, changes in self.q2.candidates.items())
        }

    def references_of(self, name: str) -> dict[str, Reference]:
        """The reference models of a data set; those under `default` where it has none of its own."""
        return self.references.get(name, self.references["default"])


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check the whole file.

    Raises:
        UserError: if the file is missing, is not YAML, or holds something that is not allowed.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: run from the folder that holds dvc.yaml")
    return parse(Params, load_yaml(path))
