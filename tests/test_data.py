"""Prepared data are split fairly, come back as written, and are never silently damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasegate.base.errors import UserError
from phasegate.data_sets import prepare as preparing
from phasegate.data_sets.prepare import merge_tasks, prepare, shuffled, split_validation
from phasegate.data_sets.raw import Raw
from phasegate.records.prepared import FIT, TEST, Split, load_meta, load_splits

SIGNALLING = np.frombuffer(b"\1\0\0\0\0\0\xf0\x7f")  # a NaN that complains when it is converted
TINY = np.random.default_rng(0).normal(0, 1e-40, (60, 2, 7))


def own_data(folder: Path, **changed: Any) -> Path:
    """A small data set of a user: 60 train and 9 test examples (2, 7) of 3 classes."""
    x, y = np.random.default_rng(0).normal(5, 3, (60, 2, 7)), np.arange(60) % 3
    np.savez(folder / "own.npz", **({"x_train": x, "y_train": y, "x_test": x[:9], "y_test": y[:9]} | changed))
    return folder / "own.npz"


def prepare_own(folder: Path, **changed: Any) -> Path:
    prepare("npz", folder / "out", own_data(folder, **changed), 12, 0, {"first": [1, 0, 0]})
    return folder / "out"


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 60), st.booleans())
def test_the_first_examples_have_nearly_every_classs_share(labels: list[int], count: int, even: bool) -> None:
    y = np.arange(len(labels) // 5 * 5) % 5 if even else np.array(labels)
    split = shuffled(Split(np.arange(len(y)), y), np.random.default_rng(3))
    assert sorted(split.x) == list(range(len(y))) and (y[split.x] == split.y).all()
    counts, found = (np.bincount(labels, minlength=5) for labels in (y, split.y[:count]))
    away = np.abs(found - counts * len(split.y[:count]) / max(len(y), 1))
    assert (away < (1 if even else 1 + 3 * counts / len(y))).all()


def test_a_sorted_source_is_shuffled_like_any_other() -> None:
    y = np.arange(8) // 4  # each example of a class comes at each of the first two places equally often
    first = np.array([shuffled(Split(np.arange(8), y), np.random.default_rng(seed)).x[:2] for seed in range(1000)])
    assert np.abs(np.bincount(first.ravel(), minlength=8) - 250).max() < 60
    assert (y[first].sum(1) == 1).all() and 400 < y[first[:, 0]].sum() < 600


def test_every_split_of_a_sorted_source_begins_with_all_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Split(np.arange(60.0)[:, None, None], np.arange(60) // 20)
    monkeypatch.setattr(preparing, "load_source", lambda *_: Raw(own, own, published=own))
    prepare("own", tmp_path, tmp_path, 12, 0, {"first": [1, 0, 0]})
    splits = load_splits(tmp_path / FIT) | load_splits(tmp_path / TEST)
    assert list(splits) == ["train", "signal", "gate", "test", "published"]
    for split in splits.values():
        assert (np.sort(split.y.reshape(-1, 3)) == [0, 1, 2]).all()


def test_splits_lose_no_example_share_none_and_follow_the_seed() -> None:
    own = Split(np.arange(60)[:, None, None], np.arange(60) % 3)
    one, same, other = (split_validation(Raw(own, own), 12, np.random.default_rng(s)) for s in (0, 0, 1))
    assert [len(split) for split in one] == [48, 6, 6]
    assert sorted(np.concatenate([split.x.ravel() for split in one])) == list(range(60))
    assert all((a.x == b.x).all() for a, b in zip(one, same, strict=True)) and (one[1].x != other[1].x).any()
    assert [len(split) for split in split_validation(Raw(own, own), 4, np.random.default_rng(0))] == [56, 2, 2]
    for wrong in (1, 2, 3, 60, 59):
        with pytest.raises(UserError, match=f"validation is {wrong}: it must"):
            split_validation(Raw(own, own), wrong, np.random.default_rng(0))


def test_prepared_data_come_back_standardised_by_train(tmp_path: Path) -> None:
    folder = prepare_own(tmp_path)
    train, test, meta = load_splits(folder / FIT)["train"], load_splits(folder / TEST)["test"], load_meta(folder)
    np.testing.assert_allclose([train.x.mean((0, 2)), train.x.std((0, 2))], [[0, 0], [1, 1]], atol=1e-6)
    source = test.x * np.array(meta.std)[:, None] + np.array(meta.mean)[:, None]
    given = np.load(tmp_path / "own.npz")["x_test"]
    np.testing.assert_allclose(np.sort(source, axis=0), np.sort(given, axis=0), rtol=1e-5, atol=1e-5)
    assert meta.splits == {"train": 48, "signal": 6, "gate": 6, "test": 9, "published": 0}
    assert (meta.input_shape, meta.class_names, meta.tasks) == ((2, 7), ("0", "1", "2"), {"first": (1, 0, 0)})
    assert train.x.dtype == np.float32 and train.y.dtype == np.int64
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    assert before == [path.read_bytes() for path in sorted(prepare_own(tmp_path).iterdir())]


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"x_train .* dtype complex128: it must be integer or float", {"x_train": np.zeros((60, 2, 7), complex)}),
        (r"840 values like 1e.300: all must be finite", {"x_train": np.full((60, 2, 7), 1e300)}),
        (r"840 values like nan: all must be finite", {"x_train": np.full((60, 2, 7), SIGNALLING)}),
        (r"shape \(2, 7\) in x_train but \(7,\) in x_test", {"x_test": np.zeros((9, 7))}),
        (r"x_test .* shape \(9,\): it must be", {"x_test": np.zeros(9)}),
        (r"8 rows in x_test but 9 in y_test", {"x_test": np.zeros((8, 2, 7))}),
        (r"3 different labels from 1 to 3: n classes", {"y_train": np.arange(60) % 3 + 1}),
        (r"y_train .* dtype float64: it must be integer", {"y_train": np.zeros(60)}),
        (r"labels from 3 to 3: they must be in 0\.\.2", {"y_test": np.full(9, 3)}),
        (r"test has values beyond float32", {"x_train": TINY, "x_test": np.full((9, 2, 7), 1e38)}),
    ],
)
def test_unusable_arrays_are_refused(tmp_path: Path, message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=message):
        prepare_own(tmp_path, **changed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [[0, 1], [0, 2, 2], [1, 1, 2], [0, 0, 1, 1], [0, 0, 0]])
def test_task_maps_must_cover_every_class(wrong: list[int]) -> None:
    assert merge_tasks({"half": [0, 0, 1]}, {"own": [1, 0, 1]}, 3) == {"half": (0, 0, 1), "own": (1, 0, 1)}
    with pytest.raises(UserError, match=r"task half maps .* each of the 3 classes"):
        merge_tasks({"half": wrong}, {}, 3)
    with pytest.raises(UserError, match="task own differs"):
        merge_tasks({"own": [0, 0, 1]}, {"own": [1, 0, 1]}, 3)
