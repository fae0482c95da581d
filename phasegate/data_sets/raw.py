"""Define what every source returns: arrays as published, before splits and standardisation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from phasegate.records.prepared import Split


@dataclass(frozen=True, eq=False)
class Raw:
    """Hold a data set as its source publishes it; labels are 0..C-1 for C classes, each of them in `train`."""

    train: Split
    test: Split
    validation: Split | None = None  # None: it is taken from train
    published: Split | None = None  # the published test split, where `test` is a larger one
    class_names: tuple[str, ...] = ()  # empty: unknown
    tasks: Mapping[str, list[int]] = field(default_factory=dict)  # the data set's own label maps
    standardise: bool = True  # False: the source's own scale is part of the benchmark
