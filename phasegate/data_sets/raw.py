"""Define what every source returns: arrays as published, before splits and standardisation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from phasegate.records.prepared import Split

LEAST = 4  # examples of a validation, two for each half: a head can't learn from one, which has no standard error


@dataclass(frozen=True, eq=False)
class Raw:
    """Hold a data set as its source publishes it; labels are 0..C-1 for C classes, each of them in `train`."""

    train: Split
    test: Split
    validation: Split | None = None  # None: it is taken from train
    published: Split | None = None  # the published test split, where `test` is a larger one
    class_names: tuple[str, ...] = ()  # empty: unknown
    tasks: Mapping[str, list[int]] = field(default_factory=dict)  # the data set's own label maps
    remarks: tuple[str, ...] = ()  # sentences for the terminal: how the source was read
    standardise: bool = True  # False: the source's own scale is part of the benchmark


def some(names: Sequence[str], most: int = 5) -> str:
    """Return names as part of a sentence, not too many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
