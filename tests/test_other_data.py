"""CIFAR's archives are prepared in their exact binary form; a smaller one, and own data, go through every stage."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from phasegate.base.paths import TABLES
from phasegate.data_sets.cifar import CIFAR10, CIFAR100, CifarFormat, load_cifar
from phasegate.params import Params
from phasegate.records.prepared import load_meta
from stages import prepare
from tests.one_process import run_all
from tests.small_study import ROOT, merge
from tests.test_data import own_data
from tests.test_data_sets import cifar_archive

TRAINED = {"steps": 20, "batch": 64, "lr": 0.01, "weight_decay": 0.0}
BRIEF = {  # the small profile, and a little less
    "seeds": {"count": 2},
    "data": {"validation": 400},
    "training": {"steps": 40, "warmup": 5, "batch": 32},
    "references": {"default": {"logistic": TRAINED | {"hidden": []}, "mlp": TRAINED | {"hidden": [16]}}},
    **{search: {"seeds": {"count": 1}, "candidates": {}} for search in ("q1", "q2")},
}
NOISE = 40  # standard deviation of an example's patches about those of its class, which has 74


def write_archive(path: Path, form: CifarFormat) -> None:
    """Write a .tar.gz with the files that the form lists, each of its size, of images that can be learned.

    An image (3, 32, 32) is made of 4 x 4 even patches, which have their class's colours and noise.
    """
    generator = np.random.default_rng(0)
    kinds = list(form.names.values())
    coarse = generator.permutation(kinds[-1]) % kinds[0]  # of every fine label; not stored by a form of one kind
    centres = generator.uniform(0, 255, (kinds[-1], 3, 4, 4))
    files = {file: "".join(f"label {n}\n" for n in range(labels)).encode() for file, labels in form.names.items()}
    for file, records in {**form.train, **form.test}.items():
        fine = generator.permutation(records) % kinds[-1]
        patches = centres[fine] + generator.normal(0, NOISE, (records, 3, 4, 4))
        pixels = patches.clip(0, 255).astype(np.uint8).repeat(8, axis=2).repeat(8, axis=3)
        stored = np.stack([coarse[fine], fine][-len(kinds) :], axis=1).astype(np.uint8)
        files[file] = np.hstack([stored, pixels.reshape(records, -1)]).tobytes()
    cifar_archive(path, files, form.folder)


def brief(**changed: Any) -> Params:
    """The parameters of a brief study without plugins."""
    values, small = (yaml.safe_load((ROOT / path).read_text()) for path in ("params.yaml", "tests/small.yaml"))
    return Params.model_validate(merge(merge(merge(values, small), BRIEF), changed | {"plugins": {"arms": {}}}))


@pytest.mark.parametrize(
    ("name", "form", "task", "labels"), [("cifar10", CIFAR10, "vehicle", 2), ("cifar100", CIFAR100, "coarse", 20)]
)
def test_an_archive_is_prepared_and_a_smaller_one_goes_through_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: CifarFormat, task: str, labels: int
) -> None:
    archive = tmp_path / "cifar.tar.gz"
    params = brief(data={"name": name, "path": str(archive)})
    monkeypatch.chdir(tmp_path)
    write_archive(archive, form)
    prepare.main(params)
    splits = {"train": 49_600, "signal": 200, "gate": 200, "test": 10_000, "published": 0}
    assert load_meta(tmp_path / "data/prepared").splits == splits

    train, test = ({file: count // 20 for file, count in records.items()} for records in (form.train, form.test))
    form = replace(form, train=train, test=test)
    monkeypatch.setattr(f"phasegate.data_sets.{name}.load", partial(load_cifar, form=form))
    write_archive(archive, form)
    run_all(params, tmp_path, monkeypatch, without="report" if name == "cifar10" else "")
    meta = load_meta(tmp_path / "data/prepared")
    assert meta.splits == splits | {"train": 2100, "test": 500}
    assert meta.input_shape == (3, 32, 32) and meta.classes == form.names[[*form.names][-1]]
    assert list(meta.tasks) == [task] and len(set(meta.tasks[task])) == labels

    decisions = pd.read_csv(tmp_path / "reports/tables/decisions.csv")
    found = set(zip(decisions["phase"], decisions["arm"], strict=True))
    assert found == {(phase, arm) for phase, arms in params.arms().items() for arm in arms}
    assert (decisions["accuracy"] > 1.5 * 100 / meta.classes).all()  # it learned, in forty steps
    tasks = pd.read_csv(tmp_path / "reports/tables/tasks.csv")
    assert set(tasks["task"]) == {task} and set(tasks["arm"]) == {"task_gates", "heads", "drowned"}
    assert tasks["accuracy"].between(100 / labels, 100).all()
    assert json.loads((tmp_path / "metrics.json").read_text())["phase"] == "p7b2"
    assert name == "cifar10" or "On CIFAR-100, 2 seeds per arm." in (tmp_path / "reports/report.html").read_text()


def test_data_that_lack_a_class_go_through_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    y = np.repeat([0, 2, 1], [1000, 997, 3])
    x = np.random.default_rng(0).normal(size=(2000, 2, 7)) + y[:, None, None]
    some = {"x_train": x, "y_train": y, "x_test": x[600:1100], "y_test": y[600:1100]}
    some |= {"x_val": x[900:1020], "y_val": y[900:1020], "class_names": np.array(["cat", "Größe", "dog"])}
    data = {"name": "npz", "path": str(own_data(tmp_path, **some)), "tasks": {"npz": {"first": [1, 0, 0]}}}
    run_all(brief(data=data, p7c2={"classes": 2}), tmp_path, monkeypatch)
    lack = r"(\w+) has no example of class Größe: nothing in it tells how well that is learned\n"
    assert re.findall(lack, capsys.readouterr().out) == ["signal", "gate", "test"]
    for path in TABLES.glob("*.csv"):
        full = pd.read_csv(ROOT / path).dropna(axis="columns").columns.drop("gap_closed", errors="ignore")
        assert pd.read_csv(path)[full].notna().all(axis=None)  # a gap that is none cannot be closed
    trials, routing = (pd.read_csv(TABLES / name) for name in ("trials.csv", "routing.csv"))
    assert routing.groupby("class")["tokens"].sum()["Größe"] == 0
    assert trials.query("phase == 'p7a' and not balanced_accuracy != accuracy > 80").empty
    assert trials[trials["phase"] != "references"].notna().all(axis=None) and pd.read_csv(TABLES / "failures.csv").empty
    said = Path("reports/decisions.md").read_text() + Path("metrics.json").read_text()
    assert "balanced accuracy, %" in said and not re.search(r"\bnan\b", said, re.IGNORECASE)
