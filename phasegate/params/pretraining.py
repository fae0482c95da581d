"""Define the parameters of the data, the model, its training and the searches of phase 7a."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from phasegate.base.paths import RAW
from phasegate.params import fields
from phasegate.params.fields import Count, Fraction, Index, Name, NonNegative, Positive, Section, SectionT, Size
from phasegate.params.names import DATA_SETS

NO_FILE = "data/none"  # a file in git, the path of data sets that need none: DVC wants some path
OF_FILES = ("npz", "cifar10", "cifar100")  # data sets that are read from a file of yours
BASE = "base"  # the candidate of a search that changes nothing


class Data(Section):
    """Say which data set is used, and how it is split."""

    name: Literal[*DATA_SETS]  # type: ignore[valid-type]
    path: fields.Text
    layout: Literal["channels_first", "channels_last", "no_channels"]
    validation: Count
    split_seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)]
    tasks: dict[Name, dict[Name, list[Index]]]

    def check_together(self) -> None:
        if (self.name in OF_FILES) == (self.path == NO_FILE):
            needs = "is read from a file: give its path" if self.path == NO_FILE else f"needs none: set it to {NO_FILE}"
            raise ValueError(f"path is {self.path}, but data set {self.name} {needs}")

    @property
    def source(self) -> Path:
        """Return the file or folder that the data are read from; downloads go into the folder."""
        return Path(self.path) if self.name in OF_FILES else RAW


class Training(Section):
    """Describe one training configuration."""

    steps: Count
    batch: Count
    lr: Positive
    warmup: Index
    weight_decay: NonNegative
    label_smoothing: Fraction
    noise: NonNegative
    shift: Index

    def check_together(self) -> None:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup}: it must be less than steps = {self.steps}")


class Architecture(Section):
    """Describe one mixture-of-experts architecture, and how its load is balanced."""

    stem: Literal["mlp", "conv"]
    width: Size
    blocks: Size
    n_routed: Size
    n_shared: Annotated[int, Field(ge=0, le=fields.LARGEST, strict=True)]
    top_k: Size
    expert_width: Size
    dropout: Fraction
    balance_loss: NonNegative
    balance_bias: NonNegative
    z_loss: NonNegative

    ordered = (("top_k", "n_routed"),)


class Reference(Section):
    """Describe a published model: a perceptron (`hidden` widths) or a strided convolutional network (`channels`)."""

    hidden: tuple[Size, ...] | None = None
    channels: tuple[Size, ...] | None = None
    steps: Count
    batch: Count
    lr: Positive
    weight_decay: NonNegative
    published: Annotated[fields.Number, Field(ge=0, le=100)] | None = None

    def check_together(self) -> None:
        if (self.hidden is None) == (self.channels is None):
            raise ValueError("exactly one of hidden and channels must be given")

    def training(self) -> Training:
        """Return the training configuration: neither warm-up nor augmentation nor smoothing."""
        values = self.model_dump(include={"steps", "batch", "lr", "weight_decay"})
        return Training(**values, warmup=0, label_smoothing=0, noise=0, shift=0)


class Search(Section):
    """Describe a search: named changes of a base configuration, and when one of them replaces another."""

    seeds: fields.Seeds  # at most, of each candidate
    gain: Fraction
    confidence: Annotated[fields.Number, Field(gt=0.5, lt=1)]
    candidates: dict[Name, dict[str, fields.Scalar]]

    def check_together(self) -> None:
        if BASE in self.candidates:
            raise ValueError(f"a candidate is named {BASE}: that is the base configuration itself, always a candidate")

    def variants(self, base: SectionT, key: str) -> dict[str, SectionT]:
        """Return the base configuration and each candidate's configuration, by name, of the search under `key`."""
        named = self.candidates.items()
        return {BASE: base} | {name: fields.override(base, new, f"{key}.candidates.{name}") for name, new in named}


class Baseline(Section):
    """Describe the baseline of phase 7a."""

    n_routed: Size
