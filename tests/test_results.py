"""What is committed under reports/ is what the committed code and parameters produce."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from phasegate.base.paths import SCHEMA, TABLES
from phasegate.tools.documents import DOCUMENTS, refreshed, written
from stages.check import schema
from tests.small_study import ROOT

FOLDERS = sorted(lock.parent for lock in (ROOT / "reports").glob("*/dvc.lock"))  # other data sets' results
RESULTS = [pytest.param(ROOT, id="study"), *(pytest.param(folder, id=folder.name) for folder in FOLDERS)]


def run(folder: Path, *words: str) -> str:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of everything that git keeps, as a repository of its own."""
    for name in run(ROOT, "git", "ls-files").splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    run(tmp_path, "git", "init", "-q")
    return tmp_path


def take_over(results: Path, clone: Path) -> None:
    """Let a copy hold another data set's results, with the parameters and the lock file that made them."""
    for path in results.iterdir():
        top = "." if path.name in ("params.yaml", "dvc.lock", "metrics.json") else "reports"
        target = clone / top / path.name
        if path.is_dir():
            shutil.rmtree(target)
            shutil.copytree(path, target)
        else:
            shutil.copy(path, target)


@pytest.mark.parametrize("results", RESULTS)
def test_nothing_is_left_to_run_in_a_clone_without_a_cache(clone: Path, results: Path) -> None:
    if results != ROOT:
        take_over(results, clone)
    output = run(clone, str(Path(sys.executable).parent / "dvc"), "repro", "--dry", "--allow-missing")
    assert "Running stage" not in output
    assert len(re.findall("didn't change, skipping", output)) >= 15


@pytest.mark.parametrize("results", RESULTS)
def test_the_lock_knows_the_schema_that_the_first_stage_writes(results: Path) -> None:
    locked = yaml.safe_load((results / "dvc.lock").read_text())["stages"]["check"]["outs"]
    [written] = [out["md5"] for out in locked if out["path"] == str(SCHEMA)]
    assert written == hashlib.md5(schema().encode()).hexdigest()


@pytest.mark.parametrize("results", RESULTS)
def test_the_decisions_follow_from_the_trials_by_textbook_formulas(results: Path) -> None:
    claims = yaml.safe_load((results / "params.yaml").read_text())["decisions"]
    folder = ROOT / TABLES if results == ROOT else results / "tables"
    trials, decisions = (pd.read_csv(folder / f"{name}.csv") for name in ("trials", "decisions"))
    keys = ["phase", "arm"]
    expected = textbook(trials[trials["phase"] != "references"], **claims).sort_values(keys, ignore_index=True)
    found = decisions[expected.columns].sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-6, atol=1e-9)


def textbook(trials: pd.DataFrame, margin_pp: float, confidence: float, phases: dict[Any, Any]) -> pd.DataFrame:
    """Paired t intervals, t-tests against the margin, Holm's correction by hand, and the rule of the verdicts."""
    accuracy = {key: rows.set_index("seed")["accuracy"] for key, rows in trials.groupby(["phase", "arm"])}
    rows = []
    for (phase, arm), values in accuracy.items():
        deltas = (values - accuracy["p7a", "continue"]).round(9)
        if deltas.nunique() == 1:  # without variance there is no t statistic, but nothing uncertain either
            mean = lo = hi = deltas.iloc[0]
            p = float(mean == -margin_pp)
        else:
            test = stats.ttest_1samp(deltas, -margin_pp)
            mean, p, (lo, hi) = deltas.mean(), float(test.pvalue), test.confidence_interval(confidence)
        primary = arm == ("baseline" if phase == "p7a" else phases[phase]["primary"])
        rows.append((phase, arm, primary, mean, lo, hi, np.nan if phase == "p7a" else p))
    columns = ["phase", "arm", "primary", "delta_pp", "delta_lo", "delta_hi", "p_value"]
    table = pd.DataFrame(rows, columns=columns).assign(p_holm=np.nan, verdict="INCONCLUSIVE")
    for phase in phases:
        ordered = table[(table["phase"] == phase) & ~table["primary"]]["p_value"].sort_values()
        table.loc[ordered.index, "p_holm"] = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
    certain = table["primary"] | (table["p_holm"] < 1 - confidence)
    table.loc[certain & (table["delta_lo"] >= -margin_pp), "verdict"] = "GO"
    table.loc[certain & (table["delta_hi"] < -margin_pp), "verdict"] = "NO-GO"
    table.loc[table["phase"] == "p7a", "verdict"] = table["arm"].map({"baseline": "BASELINE", "continue": "CONTROL"})
    return table


def test_the_documents_show_the_committed_results() -> None:
    texts, blocks = [(ROOT / name).read_text() for name in DOCUMENTS], written(ROOT)
    assert [refreshed(text, blocks) for text in texts] == texts, "run `make docs`"
    assert all(sum(f"<!-- {name} -->\n" in text for text in texts) >= 1 for name in blocks)


def test_the_documents_go_by_the_parameters_that_made_the_tables(clone: Path) -> None:
    changed = (ROOT / "params.yaml").read_text().replace("name: mnist1d", "name: fashion_mnist")
    (clone / "params.yaml").write_text(changed)
    assert written(clone)["results"] == written(ROOT)["results"]
    take_over(ROOT / "reports/fashion_mnist", clone)  # as after `dvc repro` with these parameters
    shutil.rmtree(clone / "reports/fashion_mnist/tables")
    assert "| phase | arm | Fashion-MNIST |\n" in written(clone)["results"]


def test_the_recipes_show_what_dvc_metrics_diff_prints() -> None:
    recipes = (ROOT / "docs/recipes.md").read_text()
    lines = re.findall(r"^metrics\.json +(\w+) +(\S+) +(\S+) +\S+$", recipes, re.MULTILINE)
    decisions = pd.read_csv(ROOT / TABLES / "decisions.csv").query("primary").set_index("phase")
    assert len(lines) >= 15
    for name, *shown in lines:
        for phase, text in zip(("p7a", "p7b2"), shown, strict=True):
            value = phase if name == "phase" else decisions.loc[phase, name]
            if text == "-" or isinstance(value, str):
                assert text == ("-" if pd.isna(value) else value)
            else:
                assert float(text) == pytest.approx(value, abs=1e-5)


def test_the_reference_models_reach_their_published_accuracy() -> None:
    board = pd.read_csv(ROOT / TABLES / "leaderboard_q1.csv").set_index("candidate")
    for reference, tolerance in {"logistic": 1.5, "mlp": 2.5, "cnn": 1.5}.items():
        row = board.loc[reference]
        assert abs(row["test_accuracy"] - row["published_accuracy"]) <= tolerance


def test_nine_in_ten_splits_keep_a_quarter_of_their_tokens_on_each_side() -> None:
    summary = pd.read_csv(ROOT / TABLES / "surgery_summary.csv")
    row = summary.query("phase == 'surgery' and arm == 'split'").to_dict("records")[0]
    assert row["balanced"] >= 0.9 and row["output_change_max"] <= 1e-6
