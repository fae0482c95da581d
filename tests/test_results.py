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
from dvc.compare import diff_table
from dvc.utils.diff import diff
from scipy import stats

from phasegate.base.errors import UserError
from phasegate.base.paths import SCHEMA, TABLES
from phasegate.records.tables import read_table
from phasegate.tools.documents import DOCUMENTS, refreshed, written
from phasegate.verdicts.decisions import decide, metrics
from stages.check import schema
from tests.small_study import ROOT
from tests.test_decisions import RULE, controlled, tables_of

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
    trials, surgeries, decided = (pd.read_csv(folder / f"{name}.csv") for name in ("trials", "surgeries", "decisions"))
    operated = set(zip(surgeries["phase"], surgeries["arm"], strict=True))
    keys = ["phase", "arm"]
    expected = textbook(trials[trials["phase"] != "references"], operated, **claims)
    expected = expected.sort_values(keys, ignore_index=True)
    decided = decided[decided["phase"] != "plugins"]
    texts = dict.fromkeys(["verdict", "word", "as_expected"], "")
    found = decided[expected.columns].fillna(texts).sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-6, atol=1e-8)


def test_phases_with_controls_of_their_own_follow_by_textbook_formulas() -> None:
    study, claims = controlled()
    decisions = decide(tables_of(study), claims, RULE).sort_values(["phase", "arm"], ignore_index=True)
    rule = RULE.model_dump() | {"phases": {phase: claim.model_dump() for phase, claim in claims.items()}}
    expected = textbook(study, set(zip(study["phase"], study["arm"], strict=True)), **rule)
    expected = expected.sort_values(["phase", "arm"], ignore_index=True)
    pd.testing.assert_frame_equal(decisions[expected.columns], expected, rtol=1e-9)


def textbook(
    trials: pd.DataFrame, operated: set[tuple[str, str]], margin: float, gain: float, confidence: float,
    phases: dict[str, Any], **_: Any,
) -> pd.DataFrame:  # fmt: skip
    """Paired t intervals and tests by scipy, Holm's correction by hand, and the rules of the words and the verdicts."""
    arms = {key: rows.set_index("seed")[["accuracy", "nll"]] for key, rows in trials.groupby(["phase", "arm"])}
    rows = []
    primary: dict[Any, str] = {"p7a": "baseline"} | {phase: claim["primary"] for phase, claim in phases.items()}
    for (phase, arm), values in arms.items():
        if phase == "plugins":
            continue
        claim: dict[str, Any] = phases.get(str(phase), {})
        compared = claim.get("controls", {}).get(arm, claim.get("control", "p7a/continue"))
        control = arms[tuple(compared.split("/"))]
        error, nll, apart = 100 - control["accuracy"].mean(), control["nll"].mean(), compared == f"{phase}/{arm}"
        deltas = (values - control).round(9)
        mean, lo, hi, p = interval(deltas["accuracy"], confidence)
        row = {"phase": phase, "arm": arm, "primary": arm == primary[phase], "control": compared}
        row |= {"margin_pp": margin * error, "margin_nll": margin * nll, "gain_pp": gain * error}
        row |= {"delta_pp": mean, "delta_lo": lo, "delta_hi": hi, "worst_delta": deltas["accuracy"].min()}
        row |= dict(zip(("nll_delta", "nll_lo", "nll_hi"), interval(deltas["nll"], confidence)[:3], strict=True))
        idle = (phase, arm) not in operated and not deltas.to_numpy().any()
        rows.append(row | {"idle": idle, "p_value": np.nan if phase == "p7a" or apart or idle else p})
    table = pd.DataFrame(rows).assign(p_holm=np.nan)
    for phase in phases:
        explored = (table["phase"] == phase) & ~table["primary"] & (table["control"] != f"{phase}/" + table["arm"])
        ordered = table[explored]["p_value"].fillna(1).sort_values()
        adjusted = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
        table.loc[ordered.index, "p_holm"] = adjusted.mask(table["p_value"].isna())
    said = [judge(row, arms, confidence, phases.get(row["phase"])) for row in table.to_dict("records")]
    judged = pd.DataFrame(said, columns=["word", "verdict", "as_expected"])
    return pd.concat([table.drop(columns="idle"), judged], axis=1)


def interval(x: "pd.Series[float]", confidence: float) -> tuple[float, float, float, float]:
    """The mean, its t interval, and the p-value of no difference."""
    if x.nunique() == 1:  # without variance there is no t statistic, but nothing uncertain either
        return x.iloc[0], x.iloc[0], x.iloc[0], float(x.iloc[0] == 0)
    test: Any = stats.ttest_1samp(x, 0)
    lo, hi = test.confidence_interval(confidence)
    return x.mean(), lo, hi, test.pvalue


def judge(
    row: dict[Any, Any], arms: dict[Any, pd.DataFrame], confidence: float, claim: dict[str, Any] | None
) -> tuple[str, str, str]:
    """The word of a row, and of a primary arm the verdict, and whether it was expected."""
    if claim is None or row["control"] == f"{row['phase']}/{row['arm']}":
        return "", "BASELINE" if row["arm"] == "baseline" else "CONTROL", ""
    m, m_nll, gain = row["margin_pp"], row["margin_nll"], row["gain_pp"]
    lo, hi, certain = row["delta_lo"], row["delta_hi"], row["primary"] or row["p_holm"] < 1 - confidence
    word = "NO WORSE" if lo >= -m else "UNDECIDED"
    word = "EQUIVALENT" if -m <= lo and hi <= m else word
    word = "BETTER" if lo > 0 and certain else "WORSE" if hi < 0 and certain else word
    word = "NOTHING DONE" if row["idle"] else word
    if not row["primary"]:
        return word, "", ""
    better, worse = (arms[tuple(claim["assay"][end].split("/"))]["accuracy"] for end in ("better", "worse"))
    if claim["claim"] == "gain":
        go, no_go = lo > 0, hi < gain
    else:
        go, no_go = lo >= -m and row["nll_hi"] <= m_nll, hi < -m or row["nll_lo"] > m_nll
    verdict = "INCONCLUSIVE" if row["idle"] else "GO" if go else "NO-GO" if no_go else "INCONCLUSIVE"
    if not interval((better - worse).round(9), confidence)[1] > claim["assay"]["margin_pp"]:
        verdict = "NO ASSAY"
    return word, verdict, {claim["expected"]: "yes", "INCONCLUSIVE": "open", "NO ASSAY": "open"}.get(verdict, "no")


def test_the_documents_show_the_committed_results() -> None:
    texts, blocks = [(ROOT / name).read_text() for name in DOCUMENTS], written(ROOT)
    assert [refreshed(text, blocks) for text in texts] == texts, "run `make docs`"
    assert all(sum(f"<!-- {name} -->\n" in text for text in texts) >= 1 for name in blocks)


def test_the_documents_go_by_the_parameters_that_made_the_tables(clone: Path) -> None:
    assert written(clone)["results"] == written(ROOT)["results"]
    changed = (ROOT / "params.yaml").read_text().replace("name: mnist1d", "name: fashion_mnist")
    (clone / "params.yaml").write_text(changed)
    with pytest.raises(UserError, match=r"params.yaml was edited after the results beside it were made"):
        written(clone)


def test_the_recipes_show_what_dvc_metrics_diff_prints() -> None:
    decisions = read_table(ROOT / TABLES / "decisions.csv")
    old, new = ({"metrics.json": {"data": metrics(decisions, phase, "primary")}} for phase in ("p7a", "p7b2"))
    table = diff_table(diff(old, new), "Metric", precision=5, round_digits=True)
    lines = [line for line in (ROOT / "docs/recipes.md").read_text().splitlines() if line.startswith("metrics.json")]
    assert [line.split() for line in lines] == [list(map(str, row)) for row in table]


def test_the_reference_models_reach_their_published_accuracy() -> None:
    board = pd.read_csv(ROOT / TABLES / "leaderboard_q1.csv").set_index("candidate")
    for reference, tolerance in {"logistic": 1.5, "mlp": 2.5, "cnn": 1.5}.items():
        row = board.loc[reference]
        assert abs(row["test_accuracy"] - row["published_accuracy"]) <= tolerance


def test_nine_in_ten_splits_keep_a_quarter_of_their_tokens_on_each_side() -> None:
    summary = pd.read_csv(ROOT / TABLES / "surgery_summary.csv")
    row = summary.query("phase == 'surgery' and arm == 'split'").to_dict("records")[0]
    assert row["balanced"] >= 0.9 and row["output_change_max"] <= 1e-6
