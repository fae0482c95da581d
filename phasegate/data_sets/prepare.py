"""Turn a source into a prepared data set: splits, standardisation, tasks. x is (N, C, ...), y is (N,)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np

from phasegate.base import used
from phasegate.base.errors import UserError, printable
from phasegate.data_sets.raw import LEAST, Raw, some
from phasegate.params.fields import UNREADABLE
from phasegate.records.prepared import Array, Split, check_memory, save

CHANNELS_FIRST = "channels_first"
LONGEST_NAME = 100  # characters in the name of a class
AT_ONCE = 1 << 20  # values that are standardised in one step: float64 takes memory


def prepare(
    name: str, out_dir: Path, path: Path, validation: int, split_seed: int, tasks: Mapping[str, Sequence[int]],
    layout: str = CHANNELS_FIRST,
) -> list[str]:  # fmt: skip
    """Write the splits of a data set, shuffled and standardised by train's channels, into `out_dir`.

    `tasks` are label maps (name -> task label of every class), joined by the source's own. `layout` is that of a user's
    arrays. Returns what people should know of the data, in sentences.
    """
    raw = load_source(name, path, layout)
    given = [split.x for split in (raw.train, raw.test, raw.validation, raw.published) if split]
    check_memory(name, sum(x.size for x in given), sum(x.nbytes for x in given))
    generator = np.random.default_rng(split_seed)
    train, signal, gate = split_validation(raw, validation, generator)
    class_names = raw.class_names or tuple(str(label) for label in np.unique(train.y))
    check_names(class_names)
    all_tasks = merge_tasks(tasks, raw.tasks, len(class_names))
    if not all_tasks:
        raise UserError(f"data.tasks has no label map for {name}: phase 7b.3 needs one, such as even: [0, 1, 0, …]")
    channels = train.x.shape[1]
    mean, std = channel_moments(train.x) if raw.standardise else ((0.0,) * channels, (1.0,) * channels)
    splits = {"train": train, "signal": signal, "gate": gate, "test": shuffled(raw.test, generator)}
    splits["published"] = shuffled(raw.published or _rows(raw.test, slice(0)), generator)
    remarks = raw.remarks
    del raw, given  # their memory
    for key, split in splits.items():
        splits[key] = Split(standardise(split.x, mean, std), split.y)
        if not np.isfinite(splits[key].x).all():
            raise UserError(f"{key} has values beyond float32 once train's channels have mean 0 and deviation 1")
    save(out_dir, splits, name=name, class_names=class_names, tasks=all_tasks, mean=mean, std=std)
    return [*remarks, *lacking(splits, class_names)]


def load_source(name: str, path: Path, layout: str = CHANNELS_FIRST) -> Raw:
    """Load a data set by `data_sets/<name>.py`, from the user's own file or a folder that keeps downloads."""
    try:
        if not (path.is_file() or path.is_dir()):
            state = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise UserError(f"data path is {str(path)!r}, which {state}")
        used.include(path)
        load = import_module(f"phasegate.data_sets.{name}").load
        return load(path, layout) if name == "npz" else load(path)  # type: ignore[no-any-return]
    except OSError as error:
        raise UserError(f"data path is {str(path)!r}, which can't be used ({error.strerror or error})") from error


def split_validation(raw: Raw, validation: int, generator: np.random.Generator) -> tuple[Split, Split, Split]:
    """Return train, signal and gate, shuffled: signal and gate are stratified halves of validation.

    Unless the source brings its own, validation is a stratified draw of `validation` examples from train.
    """
    train = shuffled(raw.train, generator)
    if raw.validation:
        held_out = shuffled(raw.validation, generator)
    else:
        if not LEAST <= validation < len(train):
            what = "a part of train with two examples for each of its halves, signal and gate"
            raise UserError(f"validation is {validation}: it must be from {LEAST} to {len(train) - 1}, {what}")
        held_out, train = _rows(train, slice(validation)), _rows(train, slice(validation, None))
        if lost := sorted(set(np.unique(raw.train.y)) - set(np.unique(train.y))):
            left = f"it must leave examples of class {lost[0]} in train, which has {(raw.train.y == lost[0]).sum()}"
            raise UserError(f"validation is {validation}: {left}: lower it, or take another data.split_seed")
    half = len(held_out) // 2
    return train, _rows(held_out, slice(half)), _rows(held_out, slice(half, None))


def shuffled(split: Split, generator: np.random.Generator) -> Split:
    """Return a split in random order, stratified: each part in a row has nearly its share of every class.

    So it never matters how a source is sorted, even to what looks at the first examples only.
    """
    place = np.empty(len(split))
    for label in np.unique(split.y):
        members = split.y == label
        count = members.sum()  # the class is spread evenly from 0 to 1, one at random in each interval of 1 / count
        place[members] = (generator.permutation(count) + generator.random(count)) / count
    return _rows(split, np.argsort(place, kind="stable"))


def merge_tasks(
    given: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]], classes: int
) -> dict[str, tuple[int, ...]]:
    """Return the given label maps, then the data set's own; `UserError` if one is malformed or they disagree."""
    tasks = {name: tuple(labels) for name, labels in {**given, **own}.items()}
    for name, labels in tasks.items():
        if tuple(given.get(name, labels)) != labels:
            raise UserError(f"task {name} differs from the data set's own labels of that name: leave it out")
        used = sorted(set(labels))
        if len(labels) != classes or used != list(range(max(2, len(used)))):
            raise UserError(
                f"task {name} maps {len(labels)} classes to the labels {used}:"
                f" it must map each of the {classes} classes to one of 0..n-1, n being at least two, all of them used"
            )
    return tasks


def check_names(names: Sequence[str]) -> None:
    """Raise `UserError` for names of classes that tables and figures can't show."""
    often = Counter(names)
    for place, name in enumerate(names):
        unreadable = UNREADABLE.search(name) or {"\t", "\n"} & {*name} or not name.strip()
        if unreadable or len(name) > LONGEST_NAME or often[name] > 1:
            raise UserError(
                f"class {place} is named '{printable(name[:LONGEST_NAME])}': it must have a name of its own, of one to"
                f" {LONGEST_NAME} characters that can be printed"
            )


def lacking(splits: Mapping[str, Split], class_names: Sequence[str]) -> list[str]:
    """Return a sentence for each split that has no example of some classes."""
    remarks = []
    for key, split in splits.items():
        absent = [class_names[label] for label in sorted({*range(len(class_names))}.difference(split.y.tolist()))]
        if len(split) and absent:
            remarks.append(
                f"{key} has no example of class {some(absent)}: nothing in it tells how well that is learned"
            )
    return remarks


def channel_moments(x: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of every channel of x (N, C, ...); a constant channel gets deviation 1."""
    channels = [x[:, channel] for channel in range(x.shape[1])]
    mean = tuple(float(channel.mean(dtype=np.float64)) for channel in channels)
    return mean, tuple(float(channel.std(dtype=np.float64)) or 1.0 for channel in channels)


def standardise(x: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Return (x - mean) / std per channel of x (N, C, ...), in float64, then rounded to float32 or infinity."""
    result, per_channel = np.empty(x.shape, np.float32), (-1, *(1 for _ in x.shape[2:]))
    centre, scale = np.reshape(mean, per_channel), np.reshape(std, per_channel)
    at_once = max(1, AT_ONCE // max(1, x[:1].size))
    for rows in (slice(start, start + at_once) for start in range(0, len(x), at_once)):
        with np.errstate(over="ignore"):
            result[rows] = (x[rows].astype(np.float64) - centre) / scale
    return result


def _rows(split: Split, rows: Array | slice) -> Split:
    return Split(split.x[rows], split.y[rows])
