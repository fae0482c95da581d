"""The parameters of the study: params.yaml, parsed once into frozen, typed objects.

Unknown keys, wrong types and impossible combinations are refused with a sentence that names the key, the value
and what would be right. Library functions take these objects or plain values, never YAML.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from phasegate.errors import UserError


def _no_bool(value: object) -> object:
    """Python takes True for 1; a parameter file must not."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    return value


Count = Annotated[int, Field(ge=1, strict=True)]
Index = Annotated[int, Field(ge=0, strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Probability = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Text = Annotated[str, Field(min_length=1)]
RAW = "data/raw"  # where downloads go, and the path of data sets that need no file
BASE = "base"  # a search's own base configuration, as a candidate
Scalar = bool | int | float | str
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


class Section(BaseModel):
    """A frozen group of parameters that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Which data set, and how it is split."""

    name: Literal["mnist1d", "fashion_mnist", "cifar10", "cifar100", "npz"]
    path: Text
    validation: Count
    split_seed: Index
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
    width: Count
    blocks: Count
    n_routed: Count
    n_shared: Index
    top_k: Count
    expert_width: Count
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

    hidden: tuple[Count, ...] | None = None
    channels: tuple[Count, ...] | None = None
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

    seeds: Count
    candidates: dict[Name, dict[str, Scalar]]

    @model_validator(mode="after")
    def _check(self) -> "Search":
        if BASE in self.candidates:
            raise ValueError(f"a candidate is named {BASE}: that is the base configuration itself, always a candidate")
        return self


class Baseline(Section):
    """Phase 7a's baseline."""

    n_routed: Count


class Schedule(Section):
    """What every 7b trial and its control share."""

    steps: Count
    lr_scale: Positive
    act_every: Count
    settle: Index
    cooldown: Index
    min_experts: Count
    max_experts: Count
    eval_every: Count
    split_direction: Literal["random", "principal", "loss"]
    hyperplanes: Literal["fixed", "trained", "balanced"]
    sibling_balance: NonNegative

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.min_experts > self.max_experts:
            raise ValueError(f"min_experts is {self.min_experts}: it must be at most max_experts = {self.max_experts}")
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
    repeats: Annotated[int, Field(ge=2, strict=True)]
    surveys: Count
    survey_every: Count
    surveyed: Count
    candidates: Count
    price: NonNegative
    usage: UsageLabels


class SurgeryStudy(Section):
    """The study of surgery apart from any signal."""

    operations: Annotated[int, Field(ge=2, multiple_of=2, strict=True)]
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
                    f"the primary arm of {phase} is {claim.primary!r}: it must be one of {', '.join(ARMS[phase])}"
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
            raise ValueError(f"arm is {self.arm!r}, but the arms of {self.phase} are {', '.join(known)}")
        return self


class Params(Section):
    """All of params.yaml."""

    seeds: Count
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
        for name, changes in self.q1.candidates.items():
            override(self.training, changes, f"q1.candidates.{name}")
        architectures = [
            override(self.model, changes, f"q2.candidates.{name}") for name, changes in self.q2.candidates.items()
        ]
        if self.p7a.n_routed not in {model.n_routed for model in (self.model, *architectures)}:
            raise ValueError(
                f"p7a.n_routed is {self.p7a.n_routed}, but no candidate of q2 has that many experts: give it one"
            )
        slots = (self.p7b.steps - self.p7b.settle) // self.p7b.act_every
        if self.surgery.operations > slots:
            raise ValueError(
                f"surgery.operations is {self.surgery.operations}, but p7b has time for {slots}: one every act_every = "
                f"{self.p7b.act_every} of the steps = {self.p7b.steps}, without the last settle = {self.p7b.settle}"
            )
        if self.p7a.n_routed + self.surgery.operations > self.p7b.max_experts:
            raise ValueError(
                f"surgery.operations is {self.surgery.operations}: added to p7a.n_routed = {self.p7a.n_routed} it must "
                f"be at most p7b.max_experts = {self.p7b.max_experts}"
            )
        if self.p7a.n_routed < self.p7b.min_experts:
            raise ValueError(
                f"p7b.min_experts is {self.p7b.min_experts}: p7a.n_routed = {self.p7a.n_routed} is below it"
            )
        if self.p7b.cooldown > (wait := self.p7b.act_every * self.surgery.operations // 2):
            raise ValueError(
                f"p7b.cooldown is {self.p7b.cooldown}: it must be at most {wait} (act_every * surgery.operations / 2), "
                "else the surgery study has no rested halves to merge"
            )
        if self.seeds < 2:
            raise ValueError("seeds is 1: 7b.4's control head learns from the other seeds, so it must be at least 2")
        if self.p7b4.recovery_steps > self.p7b.settle:
            raise ValueError(
                f"p7b4.recovery_steps is {self.p7b4.recovery_steps}: it must be at most p7b.settle = "
                f"{self.p7b.settle}, else the last forks would outlast the phase"
            )
        last = self.p7b4.survey_every * (self.p7b4.surveys - 1)
        if last + self.p7b4.recovery_steps > self.p7b.steps:
            raise ValueError(
                f"the last of p7b4.surveys = {self.p7b4.surveys}, one every survey_every = {self.p7b4.survey_every}, "
                f"is at step {last}: with recovery_steps = {self.p7b4.recovery_steps} it must end by p7b.steps = "
                f"{self.p7b.steps}"
            )
        if "default" not in self.references:
            raise ValueError("references.default is missing: the models of data sets that have none of their own")
        return self

    def references_of(self, name: str) -> dict[str, Reference]:
        """The reference models of a data set; those under `default` where it has none of its own."""
        return self.references.get(name, self.references["default"])


SectionT = TypeVar("SectionT", bound=Section)


def override(base: SectionT, changes: Mapping[str, Scalar], where: str) -> SectionT:
    """`base` with some of its values replaced, checked as if it had been written so in full.

    Raises:
        UserError: naming the key under `where`.
    """
    return parse(type(base), {**base.model_dump(), **changes}, where)


def parse(section: type[SectionT], values: object, where: str = "") -> SectionT:
    """Values as read from YAML -> a checked section; `where` is the key they stand under.

    Raises:
        UserError: the first thing wrong, in one sentence.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, section, where)) from None


def load_section(path: Path, key: str, section: type[SectionT]) -> SectionT:
    """A section that an earlier stage wrote under `key` of a YAML file.

    Raises:
        UserError: if the file is missing or does not hold it.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {' '.join(str(error).split())}") from None
    return parse(section, content.get(key) if isinstance(content, dict) else None, f"{path}: {key}")


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check the whole file.

    Raises:
        UserError: if the file is missing, is not YAML, or holds something that is not allowed.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the folder that holds dvc.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return parse(Params, values)


def _explain(error: ValidationError, section: type[Section], where: str) -> str:
    """The first of pydantic's findings as a sentence with key, value and what would be right."""
    first = error.errors(include_url=False)[0]
    key = ".".join(part for part in (where, *map(str, first["loc"])) if part)
    message, name = first["msg"], str(first["loc"][-1]) if first["loc"] else ""
    match first["type"]:
        case "extra_forbidden":
            allowed = _fields(section, first["loc"][:-1])
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known there: {', '.join(allowed)}"
            return f"{key} is not a parameter; {hint}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            sentence = message.removeprefix("Value error, ")
            return f"{key}: {sentence}" if key else sentence
        case _:
            return f"{key} is {first['input']!r}: {message[0].lower()}{message[1:]}"


def _fields(section: type[Section], path: tuple[int | str, ...]) -> list[str]:
    """The parameters of the section at `path` below `section`."""
    annotation: Any = section
    for part in path:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            annotation = annotation.model_fields[str(part)].annotation
        else:  # dict[str, Section]
            annotation = get_args(annotation)[1]
    return list(annotation.model_fields)
