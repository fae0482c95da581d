"""Prepared data are split fairly, come back as written, and are never silently damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasegate.base.errors import UserError
from phasegate.data_sets import prepare as preparing
from phasegate.data_sets.prepare import load_source, merge_tasks, prepare, shuffled, split_validation
from phasegate.data_sets.raw import Raw
from phasegate.records.prepared import FIT, TEST, Split, load_meta, load_splits

SIGNALLING = np.frombuffer(b"\1\0\0\0\0\0\xf0\x7f")  # a NaN that complains when it is converted
TINY = np.random.default_rng(0).normal(0, 1e-40, (60, 2, 7))


def own_data(folder: Path, **changed: Any) -> Path:
    """A small data set of a user: 60 train and 9 test examples (2, 7) of 3 classes."""
    x, y = np.random.default_rng(0).normal(5, 3, (60, 2, 7)), np.arange(60) % 3
    arrays = {"x_train": x, "y_train": y, "x_test": x[:9], "y_test": y[:9]} | changed
    np.savez(folder / "own.npz", **{name: array for name, array in arrays.items() if array is not None})
    return folder / "own.npz"


def prepare_own(folder: Path, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
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


def test_each_split_of_a_sorted_source_begins_with_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


ROWS = {"x_train": 60, "x_test": 9}


@pytest.mark.parametrize(
    ("layout", "shape", "example", "said"),
    [
        ("channels_first", (7,), (7, 1), "(N, F): 7 features (data.layout: channels_first)"),
        ("no_channels", (7,), (1, 7), "(N, L): 1 channel of length 7 (data.layout: no_channels)"),
        ("no_channels", (28, 20), (1, 28, 20), "(N, H, W): 1 channel of 28 x 20 (data.layout: no_channels)"),
        ("channels_last", (9, 2), (2, 9), "it would be (N, C, L) by channels_first, or (N, H, W) by no_channels"),
        ("channels_last", (8, 9, 3), (3, 8, 9), "(N, H, W, C): 3 channels of 8 x 9 (data.layout: channels_last)"),
        ("channels_last", (3, 8, 9), (9, 3, 8), "; it would be (N, C, H, W) by channels_first"),
        ("channels_first", (1, 9), (1, 9), "(N, C, L): 1 channel of length 9 (data.layout: channels_first)"),
        ("channels_first", (28, 28), (28, 28), "28 channels of length 28 (data.layout: channels_first); it would be"),
        ("channels_first", (20, 28), (20, 28), "(N, L, C) by channels_last, or (N, H, W) by no_channels"),
        ("channels_first", (3, 8, 9), (3, 8, 9), "3 channels of 8 x 9 (data.layout: channels_first)"),
        ("channels_first", (8, 9, 3), (8, 9, 3), "; it would be (N, H, W, C) by channels_last"),
    ],
)
def test_the_layout_of_arrays_is_said_and_can_be_named(
    tmp_path: Path, layout: str, shape: tuple[int, ...], example: tuple[int, ...], said: str
) -> None:
    arrays = {name: np.random.default_rng(n).random((n, *shape)) for name, n in ROWS.items()}
    raw = load_source("npz", own_data(tmp_path, **arrays), layout)
    assert raw.train.x.shape[1:] == raw.test.x.shape[1:] == example
    axis = -1 if layout == "channels_last" and len(shape) > 1 else 1
    np.testing.assert_array_equal(raw.train.x, np.moveaxis(arrays["x_train"], axis, 1).reshape(60, *example))
    assert raw.remarks[0].startswith(f"x_train, {(60, *shape)}, is read as (N, ") and said in raw.remarks[0]
    assert ("would be" in raw.remarks[0]) == (" by " in said or "would be" in said)


def test_arrays_as_keras_has_them_need_one_option(tmp_path: Path) -> None:
    labels = {"y_train": (np.arange(60) % 3)[:, None].astype(np.uint8), "y_test": (np.arange(9) % 3)[:, None]}
    for layout, shape in {"no_channels": (28, 28), "channels_last": (32, 32, 3)}.items():
        images = {name: np.zeros((n, *shape), np.uint8) for name, n in ROWS.items()}
        raw = load_source("npz", own_data(tmp_path, **images, **labels), layout)
        assert raw.train.x.shape == (60, shape[2] if shape[2:] else 1, *shape[:2]) and raw.train.y.shape == (60,)
    with pytest.raises(UserError, match=r"x_train .* must be \(N, L\) or \(N, H, W\) \(data.layout: no_channels\)"):
        load_source("npz", tmp_path / "own.npz", "no_channels")


@pytest.mark.parametrize("kind", ["F", ">f8", "f2", ">i2", "<u8"])
def test_arrays_come_back_alike_however_they_are_stored(tmp_path: Path, kind: str) -> None:
    x = np.random.default_rng(0).integers(0, 200, (60, 2, 7))
    stored = np.asfortranarray(x) if kind == "F" else x.astype(kind)
    labels = (np.arange(60) % 3).astype(">i2")
    plain, odd = (
        load_splits(prepare_own(tmp_path / name, x_train=x_train, y_train=labels) / FIT)
        for name, x_train in {"plain": x, "odd": stored}.items()
    )
    for name in plain:
        np.testing.assert_array_equal(plain[name].x, odd[name].x)


def test_a_validation_of_ones_own_is_used_and_what_is_not_used_is_named(tmp_path: Path) -> None:
    x, y = np.random.default_rng(1).normal(size=(40, 2, 7)), np.arange(40) // 20
    path = own_data(tmp_path, x_val=x, y_val=y, x_valid=x, weights=y)
    said = prepare("npz", tmp_path / "out", path, 12, 0, {"first": [1, 0, 0]})
    assert said[1:3] == [
        "x_val and y_val are the validation, so data.validation is not used",
        f"{path} also holds weights, x_valid: not used",
    ]
    splits, meta = load_splits(tmp_path / "out" / FIT), load_meta(tmp_path / "out")
    assert meta.splits == {"train": 60, "signal": 20, "gate": 20, "test": 9, "published": 0}
    given = np.concatenate([splits[name].x for name in ("signal", "gate")]) * np.array(meta.std)[:, None]
    np.testing.assert_allclose(np.sort(given + np.array(meta.mean)[:, None], axis=0), np.sort(x, axis=0), atol=1e-5)
    for name in ("signal", "gate"):  # the file is sorted, and the first examples are not
        assert (np.sort(splits[name].y.reshape(-1, 2)) == [0, 1]).all()


NAMES = ("zero", "Ünique\u00a0name", "null")


@pytest.mark.parametrize("names", [np.array(NAMES), np.array([*map(str.encode, NAMES)]), np.array(NAMES, ">U20")])
def test_names_of_classes_come_from_the_file(tmp_path: Path, names: Any) -> None:
    assert load_meta(prepare_own(tmp_path, class_names=names)).class_names == NAMES


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
        (r"lacks y_val: it must hold .*, y_test, x_val, y_val, each", {"x_val": np.zeros((9, 2, 7))}),
        (r"8 rows in x_val but 9 in y_val", {"x_val": np.zeros((8, 2, 7)), "y_val": np.arange(9) % 3}),
        (r"labels from 3 to 3: they", {"x_val": np.zeros((9, 2, 7)), "y_val": np.full(9, 3)}),
        (r"x_val, y_val .* 3 examples: they need at least 4", {"x_val": np.zeros((3, 2, 7)), "y_val": np.arange(3)}),
        (r"class_names .* shape \(2,\) .* must be 3 strings, a name for each", {"class_names": np.array(["a", "b"])}),
        (r"class_names .* dtype int64: it must be 3 strings", {"class_names": np.arange(3)}),
        (r"class_names .* must hold Unicode strings, or bytes in UTF-8", {"class_names": np.array([b"\xff"] * 3)}),
        (r"class_names .* must hold Unicode strings", {"class_names": np.array([1 << 21] * 3, "u4").view("U1")}),
        (r"class 1 is named 'a': it must have a name of its own", {"class_names": np.array(["b", "a", "a"])}),
        (r"class 2 is named '': .* one to 100 characters", {"class_names": np.array(["b", "a", " "])}),
        (r"class 0 is named '\\x1b\[2J': .* can be printed", {"class_names": np.array(["\x1b[2J", "a", "b"])}),
        (r"test has values beyond float32", {"x_train": TINY, "x_test": np.full((9, 2, 7), 1e38)}),
        (r"^mean .*e-42 with std .*e-41: std must be at least 1.2e-38", {"x_train": TINY, "x_test": TINY[:9]}),
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
