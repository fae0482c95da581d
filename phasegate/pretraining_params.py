"""Parameters of the data, the model, its training and the searches of phase 7a."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from phasegate.sections import (
    LARGEST,
    Count,
    Fraction,
    Index,
    Name,
    NonNegative,
    Number,
    Positive,
    Scalar,
    Section,
    Seeds,
    Size,
    Text,
)

RAW = "data/raw"  # where downloads go, and the path of data sets that need no file
BASE = "base"  # a search's own base configuration, as a candidate


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
