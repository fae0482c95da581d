"""`make plan` says what would run, why, and how long it takes, and where it knows that from."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from phasegate import changes
from phasegate.durations import RECORD, record, recorded
from phasegate.errors import UserError
from phasegate.estimates import COMMITTED, HERE, ROUGH, START, TRIAL_STAGES, UNKNOWN, Estimate, Estimator, locked
from phasegate.params import Params, load_params
from phasegate.plan import said
from phasegate.report.current import refuse_others
from phasegate.sections import parse
from tests.small_study import ROOT, Checkout, merge

STAGES = changes.expanded(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
VALUES: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
THEN = locked(ROOT / "dvc.lock")
MISSING = {"changed outs": {"models/p7b1": "not in cache"}}


def params(**changed: Any) -> Params:
    return parse(Params, merge(VALUES, changed))


def planned(status: dict[str, Any], **changed: Any) -> changes.Plan:
    return changes.plan(STAGES, status, THEN, merge(VALUES, changed))


def test_the_stages_are_those_that_dvc_knows() -> None:
    assert set(STAGES) == set(THEN)
    assert STAGES["evaluate@p7b2"].outs == {"data/evaluated/p7b2"} and "models/p7b2" in STAGES["evaluate@p7b2"].deps


def test_a_changed_parameter_is_named_with_both_values_and_takes_along_what_follows() -> None:
    entry = [{"changed deps": {"params.yaml": {"p7b2": "modified"}}}]
    found = planned({"check": entry, "p7b2": entry}, p7b2={"entropy_weight": 0.5})
    change = "p7b2.entropy_weight 0.1 → 0.5"
    assert found.absent == {} and found.stale == {
        "check": change,
        "p7b2": change,
        "evaluate@p7b2": "after p7b2",
        "decide": "after evaluate@p7b2",
        "report": "after decide",
        "headline": "after decide",
    }


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("changed command", "its command changed"),
        ({"changed deps": {"stages/report.py": "modified", "a.py": "new"}}, "stages/report.py changed and 1 more"),
        ({"changed deps": {"data/raw": "deleted"}}, "data/raw is missing"),
        ({"changed outs": {"reports/report.html": "modified"}}, "reports/report.html is not as it was written"),
    ],
)  # fmt: skip
def test_every_other_reason_is_said_in_a_few_words(entry: Any, reason: str) -> None:
    assert planned({"report": [entry]}).stale == {"report": reason}


def test_what_is_only_not_here_is_no_change() -> None:
    found = planned({"p7b1": [{"changed deps": {"models/p7a": "deleted"}}, MISSING]})
    assert found.stale == {} and found.absent == {
        "p7b1": "models/p7b1 not here",
        "evaluate@p7b1": "after p7b1",
        "decide": "after evaluate@p7b1",
        "report": "after decide",
        "headline": "after decide",
    }


@pytest.mark.parametrize(
    ("stage", "path", "what"),
    [("p7b1", "models/p7b1", "deleted"), ("prepare", "data/prepared/dataset.json", "not in cache")],
)
def test_nothing_follows_what_comes_back_with_the_same_bits(stage: str, path: str, what: str) -> None:
    found = planned({stage: [{"changed outs": {path: what}}]})
    assert found == changes.Plan({}, {stage: f"{path} not here"})


def test_without_a_lock_file_everything_never_ran() -> None:
    assert set(changes.plan(STAGES, {}, {}, VALUES).stale.values()) == {"never ran"}


def test_the_committed_study_tells_of_every_stage_that_trains() -> None:
    estimator = Estimator(ROOT, params(), workers=2)
    estimates = {name: estimator.estimate(name) for name in STAGES}
    assert {estimates[name].source for name in TRIAL_STAGES} == {COMMITTED, ROUGH}
    total = sum(estimate.seconds or math.nan for estimate in estimates.values())
    assert 30 * 60 < total < 45 * 60  # 37 minutes were measured, on two slow cores
    assert estimator.estimate("a new stage") == Estimate(None, UNKNOWN)
    unknown = Estimator(ROOT, params(data={"name": "cifar10", "path": "data/cifar"}), 2)
    assert unknown.estimate("q1") == Estimate(None, UNKNOWN)
    other = Estimator(ROOT, params(data={"name": "fashion_mnist"}), 2).estimate("q1")
    assert other.source == COMMITTED and other != estimates["q1"]


@pytest.mark.parametrize(
    ("changed", "workers", "times"),
    [
        ({}, 1, 1),
        ({"seeds": 20}, 1, 2),
        ({"p7b": {"steps": 1200}, "p7b4": {"survey_every": 1040}}, 1, 2),
        ({"training": {"steps": 6000}}, 1, 1),
        ({}, 2, 1 / 2),
        ({}, 1000, 1 / 60),
    ],
)
def test_seconds_grow_with_seeds_and_steps_and_shrink_with_workers(
    tmp_path: Path, changed: dict[str, Any], workers: int, times: float
) -> None:
    noted = {"mnist1d": {"p7b1": {"seconds": 600.0, "params": params().model_dump(mode="json")}}}
    (tmp_path / ".phasegate").mkdir()
    (tmp_path / ".phasegate" / RECORD).write_text(json.dumps(noted))
    found = Estimator(tmp_path, params(**changed), workers).estimate("p7b1")
    assert found.source == HERE and found.seconds == pytest.approx(START + 600 * times)


@pytest.mark.parametrize("content", ["", "[]", '{"mnist1d": 1}', '{"mnist1d": {"q1": {"seconds": "x"}}}', "{"])
def test_a_damaged_record_is_none_and_is_written_anew(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / RECORD).write_text(content)
    assert recorded(tmp_path, "mnist1d") == {}
    record(tmp_path, "q1", 3.5)
    record(tmp_path, "q2", 4.0)
    assert recorded(tmp_path, "mnist1d") == {"q1": (3.5, load_params()), "q2": (4.0, load_params())}
    (tmp_path / "file").touch()
    record(tmp_path / "file", "q1", 1.0)  # can't be written: not missed


def test_the_plan_says_what_it_rests_on() -> None:
    estimates = {"q1": Estimate(600, HERE), "q2": Estimate(None, UNKNOWN), "report": Estimate(20, ROUGH)}
    lines = said(changes.Plan({"q1": "q1.seeds 3 → 4", "q2": "after q1"}, {"report": "x" * 99}), estimates, workers=1)
    text = "\n".join(lines)
    assert (
        lines[0] == "3 of 3 stages would run:"
        and "All of it: an unknown time: 1 stage never ran on this data set, the rest takes about 10 min." in lines
    )
    assert "An estimate for 1 worker (" in text and "1: what their trials last took on this machine" in text
    assert max(map(len, lines)) < 100 and "kept" in lines[-1]
    assert said(changes.Plan({}, {}), estimates, 1) == [
        "Nothing would run: the results are those of the parameters and the code."
    ]
    assert said(changes.Plan({}, {"report": "gone"}), estimates, 1)[0].startswith("Nothing would run but for missing")


def test_a_first_run_is_planned_from_nothing(tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study", PHASEGATE_WORKERS="3")
    text = study.command("python", "-m", "phasegate.plan")
    assert text.startswith("29 of 29 stages would run:") and "for 3 workers" in text and "never ran" in text
    assert "14: unknown, since no run on this data set is known" in text


def test_the_page_is_not_made_from_tables_of_other_parameters(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    params.write_text(text.replace("phase: p7b2", "phase: p7b1"))  # which is no matter of the page
    refuse_others(ROOT / "dvc.lock", params)
    for old, new in (("margin_pp: 1.0", "margin_pp: 8.0"), ("name: mnist1d", "name: fashion_mnist")):
        assert text.count(old) == 1
        params.write_text(text.replace(old, new))
        said = re.escape(f"({'decisions' if 'margin' in old else 'data'}.{old.replace(': ', ' ')} → {new.split()[1]})")
        with pytest.raises(UserError, match=said):
            refuse_others(ROOT / "dvc.lock", params)
