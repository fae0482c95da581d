"""CIFAR's archives, in their exact binary form, go through the whole pipeline, every stage in this process."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from phasegate.data import load_meta
from phasegate.params import Params
from phasegate.sources.cifar import CIFAR10, CIFAR100, CifarFormat
from phasegate.study import ARMS
from tests.cifar_archives import write_archive
from tests.one_process import run_all
from tests.small_study import ROOT, merge

TRAINED = {"steps": 20, "batch": 64, "lr": 0.01, "weight_decay": 0.0}
BRIEF = {  # the small profile, and a little less
    "seeds": 2,
    "data": {"validation": 1000},
    "training": {"steps": 40, "warmup": 5},
    "references": {"default": {"logistic": TRAINED | {"hidden": []}, "mlp": TRAINED | {"hidden": [16]}}},
    "q1": {"seeds": 1, "candidates": {}},
    "q2": {"seeds": 1, "candidates": {}},
}


@pytest.mark.parametrize(
    ("name", "form", "task", "labels"), [("cifar10", CIFAR10, "vehicle", 2), ("cifar100", CIFAR100, "coarse", 20)]
)
def test_an_archive_goes_through_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: CifarFormat, task: str, labels: int
) -> None:
    archive = write_archive(tmp_path / "cifar.tar.gz", form)
    run_all(parameters(name, archive), tmp_path, monkeypatch)

    meta = load_meta(tmp_path / "data/prepared")
    assert meta.splits == {"train": 49_000, "signal": 500, "gate": 500, "test": 10_000}
    assert meta.input_shape == (3, 32, 32) and meta.classes == form.names[[*form.names][-1]]
    assert list(meta.tasks) == [task] and len(set(meta.tasks[task])) == labels

    decisions = pd.read_csv(tmp_path / "reports/decisions.csv")
    found = set(zip(decisions["phase"], decisions["arm"], strict=True))
    assert found == {("p7a", "baseline"), ("p7a", "continue")} | {(p, arm) for p in ARMS for arm in ARMS[p]}
    assert (decisions["accuracy"] > 1.5 * 100 / meta.classes).all()  # it learned, in forty steps
    tasks = pd.read_csv(tmp_path / "reports/tasks.csv")
    assert set(tasks["task"]) == {task} and set(tasks["arm"]) == {"task_gates", "heads"}
    assert tasks["accuracy"].between(100 / labels, 100).all()
    assert json.loads((tmp_path / "metrics.json").read_text())["phase"] == "p7b2"
    assert "CIFAR-10" in (tmp_path / "reports/report.html").read_text()


@pytest.mark.parametrize("form", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_the_published_sizes_are_asked_for(form: CifarFormat) -> None:
    sizes = {"cifar-10-batches-bin": 6 * 30_730_000, "cifar-100-binary": 153_700_000 + 30_740_000}
    assert sum(form.sizes.values()) == sizes[form.folder]


def parameters(name: str, archive: Path) -> Params:
    values, small = (yaml.safe_load((ROOT / path).read_text()) for path in ("params.yaml", "tests/small.yaml"))
    data = {"data": {"name": name, "path": str(archive)}, "own": {"arms": {}}}
    return Params.model_validate(merge(merge(merge(values, small), BRIEF), data))
