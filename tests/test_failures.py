"""A study in which trials failed has verdicts, tables and a page all the same, and each of them says so."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from phasegate import search
from phasegate.decisions import CONTROL, relabel_control
from phasegate.errors import UserError
from phasegate.experiments import came_to
from phasegate.failure import FAILURE, FAILURE_COLUMNS, Failure, finished, read_failure, write_failure
from phasegate.model import ModelSpec
from phasegate.params import load_params
from phasegate.pretraining_params import Training
from phasegate.report import drawing, lineage_plots, plots, surgery_plots, tables
from phasegate.report.documents import TABLES, blocks
from phasegate.scoring import SCORES
from phasegate.search import COLUMNS, run_search
from phasegate.study import ARMS, EVALUATED_PHASES, START
from phasegate.surgery_summary import surgery_summary
from phasegate.trials import Trial
from stages import decide, headline, repeat_surgery, report, score_signals
from tests.test_report import BORN, HALVES, LOADS, PRESERVATION, SURGERIES, board, curves, decided

ROOT = Path(__file__).parent.parent
PER_TRIAL = ("trials", "classes", "tasks", "routing", "loads", "curves", "surgeries", "halves")
NAN = "the loss is nan"
ENDED = f"its start models/p7a/baseline/seed-0 failed: {NAN}"


def failures() -> pd.DataFrame:
    """The first seed of 7a, and with it that of all that follows; a trial of 7b.2; and all of an arm of 7b.1."""
    later = [(CONTROL, CONTROL), *((phase, arm) for phase, arms in ARMS.items() for arm in arms)]
    rows = [(START, "baseline", 0, 900, NAN), *((*key, 0, 0, ENDED) for key in later), ("p7b2", "split", 3, 17, NAN)]
    rows += [("p7b1", "noise_acting", seed, 40 + seed, NAN) for seed in range(1, 10)]
    return pd.DataFrame(rows, columns=FAILURE_COLUMNS)


@pytest.fixture(scope="module")
def study(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed study as it would be if these trials had failed, decided and reported."""
    folder, failed = tmp_path_factory.mktemp("study"), failures()
    lost = set(zip(failed["phase"], failed["arm"], failed["seed"], strict=True))
    for name in PER_TRIAL:
        table = pd.read_csv(ROOT / f"reports/{name}.csv")
        if name in ("routing", "loads"):
            table["seed"] = 1  # what is kept of a study is its first seed: take it for that of another
        table.loc[table["arm"] == CONTROL, "phase"] = CONTROL
        keys = zip(table["phase"], table["arm"], table["seed"], strict=True)
        table = table[[key not in lost for key in keys]]
        for phase in EVALUATED_PHASES:
            write(table[table["phase"] == phase], folder / f"data/evaluated/{phase}/{name}.csv")
    for phase in EVALUATED_PHASES:
        write(failed[failed["phase"] == phase], folder / f"data/evaluated/{phase}/failures.csv")
    for name in ("signals", "preservation"):
        write(pd.read_csv(ROOT / f"reports/{name}.csv").query("seed > 0"), folder / f"reports/{name}.csv")
    tried = pd.DataFrame({"candidate": name, "seed": seed} for name in ("base", "fast") for seed in range(2))
    tried = tried.assign(accuracy=80.0, params_total=9, params_active=3, flops_per_example=5, train_seconds=1.0)
    tried = tried.assign(settings="base", failure=None)
    tried.loc[3, ["accuracy", "failure"]] = None, "q1, fast, seed 1, step 5: the loss is nan"
    for name in ("q1", "q2", "references"):
        write(tried, folder / f"models/{name}.csv")
        (folder / f"models/{name}.yaml").write_text(yaml.safe_dump({"candidate": "base"}))
    shutil.copytree(prepared, folder / "data/prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = load_params(ROOT / "params.yaml")
        for stage in (decide, report, headline):
            stage.main(params.model_copy(update={"headline": params.headline.model_copy(update={"phase": "p7b1"})}))
    return folder


def write(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)


def test_every_verdict_row_states_its_failures(study: Path) -> None:
    rows = pd.read_csv(study / "reports/decisions.csv").set_index(["phase", "arm"])
    assert rows.loc[("p7b2", "split"), "n_failed"] == 1 and rows.loc[("p7b2", "split"), "verdict"] != "GO"
    assert rows.loc[("p7b1", "noise_acting"), "n_failed"] == 9
    others = rows.drop([("p7b2", "split"), ("p7b1", "noise_acting"), (START, "baseline"), (START, CONTROL)])
    assert (others["n_failed"] == 0).all() and (others["n_seeds"] == 9).all()
    verdict = str(rows.loc[("p7b2", "split"), "verdict"])
    cells = {
        **{"baseline": "BASELINE, 1 of 10 trials failed", "continue": "CONTROL, 1 of 10 trials failed"},
        **{r"noise\_acting": "NO-GO, all 9 trials failed", "split": f"{verdict}, 1 of 9 trials failed"},
    }
    tables = {name: pd.read_csv(study / f"reports/{name}.csv") for name in TABLES}
    hypotheses = dict.fromkeys(tables["decisions"]["phase"], "It costs no more than the margin.")
    shown = blocks({"mnist1d": tables, "fashion_mnist": tables}, hypotheses, 1.0, 0.95)["results"]
    assert all(f"\n\nFailed trials on {data}:\n\n- 7a" in shown for data in ("MNIST-1D", "Fashion-MNIST"))
    for text in ((study / "reports/decisions.md").read_text(), shown):
        for arm, cell in cells.items():
            assert re.search(rf"\| \**{re.escape(arm)}\** \| \**{re.escape(cell)}", text), arm
        assert "- 7b.2 split, seed 3, step 17: the loss is nan" in text
        assert "- 7b.3 task\\_gates, heads, single, seed 0, step 0: its start models/p7a" in text
    assert "NO-GO: noise_acting, all 9 trials failed.**" in (study / "reports/decisions.md").read_text()


def test_the_page_lists_the_failed_trials_and_has_no_blank_taken_for_a_number(study: Path) -> None:
    page = (study / "reports/report.html").read_text()
    assert all(recorded in page for recorded in ("versions.torch", "machine.processor", "machine.threads_per_trial"))
    assert '<span class="verdict no-go">NO-GO, all 9 trials failed</span>' in page
    listed = re.findall("<li>(.*)</li>", page[page.index("<h3>Failed trials") : page.index("<h2>Beside")])
    assert len(listed) == 7 + 1 + 9 and listed[0] == "7a baseline, seed 0, step 900: the loss is nan"
    words = re.sub(r"<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL).replace("loss is nan", "")
    assert not re.search(r"\bnan\b|\[, \]|\(\W*\)", words)
    assert "7b.1 noise_acting: no seed finished, so there is nothing to share out" in words
    assert "<td>1, 1 failed</td>" in words  # in the searches


def test_the_failures_are_a_table_and_the_headline_counts_them(study: Path) -> None:
    table = pd.read_csv(study / "reports/failures.csv")
    assert table.columns.tolist() == FAILURE_COLUMNS and len(table) == len(failures())
    assert set(table["phase"]) == {START, *ARMS}  # the control under the name that it has in reports
    metrics = json.loads((study / "metrics.json").read_text())
    assert (metrics["verdict"], metrics["n_failed"], metrics["n_seeds"]) == ("NO-GO", 9, 0)
    assert came_to(metrics) == "noise_acting, NO-GO, no trial finished"
    for name in ("routing", "loads"):
        assert set(pd.read_csv(study / f"reports/{name}.csv")["seed"]) == {1}


def test_a_finding_says_what_failed_and_why_an_interval_within_the_margin_is_no_go_ahead() -> None:
    rows = {row.phase: row for row in tables.headline_rows(decided())}
    inconclusive = rows["p7b2"]._replace(verdict="INCONCLUSIVE", n_seeds=2, n_failed=1)
    assert re.match(
        r"INCONCLUSIVE: split stands at \+2.* against continue, but 1 of 3 trials failed$",
        tables.finding(inconclusive, 1.0),
    )
    assert tables.outcome(inconclusive, decided(), 1.0).endswith("but 1 of 3 trials failed (2 seeds).")
    no_go = tables.finding(rows["p7b1"]._replace(n_seeds=2, n_failed=1), 1.0)
    assert no_go.startswith("NO-GO: noise_acting loses 4.90 pp") and no_go.endswith(", and 1 of 3 trials failed")
    equal = tables.finding(rows["surgery"]._replace(verdict="INCONCLUSIVE", n_seeds=2, n_failed=1), 1.0)
    assert equal.startswith("INCONCLUSIVE: split changed nothing and equals continue in every seed that finished, but")
    for total, text in ((1, "the one trial failed"), (3, "all 3 trials failed")):
        nothing = rows["p7b1"]._replace(n_seeds=0, n_failed=total)
        assert tables.outcome(nothing, decided(), 1.0) == f"NO-GO: noise_acting, {text}."


def test_failures_alike_share_a_line() -> None:
    rows = [("p7b1", "a_b", 0, 0, "x"), ("p7b1", "c", 0, 0, "x"), ("p7b1", "c", 1, 0, "x")]
    said = tables.failure_list(pd.DataFrame(rows, columns=FAILURE_COLUMNS))
    assert said == ["7b.1 a_b, c, seed 0, step 0: x", "7b.1 c, seed 1, step 0: x"]


def test_a_leaderboard_names_what_failed_and_compares_the_chosen_with_what_finished() -> None:
    table = board().assign(n_failed=[0, 1, 0, 0])  # wide, deep, plain, cnn
    figure = plots.leaderboard(table, "7a Q1")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["wide", "deep (1 of 3 trials failed)", "plain"]
    assert figure.get_suptitle().endswith("10.0 pp ahead of plain")


def test_figures_live_with_arms_and_seeds_that_are_missing(tmp_path: Path) -> None:
    decisions = decided()
    gone = decisions["arm"].isin(["noise_acting", "clone"])
    blank = ["accuracy", "delta_pp", "delta_lo", "delta_hi", "n_routed_end", "params_total"]
    decisions.loc[gone, blank], decisions.loc[gone, ["n_seeds", "n_failed"]] = np.nan, [0, 3]
    kept = curves().query("arm not in ['noise_acting', 'clone'] and (phase != 'p7b2' or seed > 0)")
    steps = relabel_control(kept.assign(routing_entropy=0.8))
    titles = [axes.get_title(loc="left") for axes in lineage_plots.entropy(steps, decisions, 0.95).axes]
    assert titles[0] == "7b.1 noise_acting: all 3 trials failed" and "the same as" in titles[1]
    noted = [text.get_text() for text in plots.differences(decisions, 1.0).axes[0].texts]
    assert len([text for text in noted if text.endswith("  all 3 trials failed")]) == 2
    nobody = lineage_plots.lineage(LOADS.assign(arm="other"), BORN, decisions)
    assert nobody.get_suptitle().replace("\n", " ").endswith("no primary arm finished it")
    drawing.save(nobody, tmp_path / "nobody")
    drawing.save(plots.learning_curves(kept, decisions, 1.0, 0.95, SURGERIES), tmp_path / "curves")
    few = surgery_summary(SURGERIES.query("arm != 'clone'"), HALVES.head(0), kept, decisions, 0.95)
    drawing.save(surgery_plots.surgery(few, SURGERIES, 1.0), tmp_path / "surgery")
    drawing.save(
        surgery_plots.halves(PRESERVATION, HALVES.head(0), few.query("arm != 'split'"), 9), tmp_path / "halves"
    )


def test_a_damaged_failure_is_refused_and_a_missing_one_is_none(tmp_path: Path) -> None:
    assert read_failure(tmp_path) is None
    failure = Failure("survey", "", 3, 0, NAN)
    write_failure(tmp_path, failure)
    assert read_failure(tmp_path) == failure and str(failure) == "survey, seed 3, step 0: the loss is nan"
    (tmp_path / FAILURE).write_text('{"phase": "survey"}')
    with pytest.raises(UserError, match="damaged"):
        read_failure(tmp_path)


def test_of_trials_that_all_failed_the_first_is_named(tmp_path: Path) -> None:
    folders = [tmp_path / f"seed-{seed}" for seed in range(3)]
    for seed in (1, 0):
        write_failure(folders[seed], Failure("survey", "", seed, 4, NAN))
    assert finished(folders) == [folders[2]]
    with pytest.raises(UserError, match="all 2 trials failed; the first: survey, seed 0, step 4: the loss is nan"):
        finished(folders[:2])


def test_operations_in_a_row_leave_out_starts_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    monkeypatch.setattr(repeat_surgery, "in_a_row", lambda _, start, seed, *rest: pd.DataFrame({"seed": [seed]}))
    params = load_params(ROOT / "params.yaml").model_copy(update={"seeds": 3})
    write_failure(tmp_path / "models/p7a/baseline/seed-0", Failure(START, "baseline", 0, 900, NAN))
    repeat_surgery.main(params)
    assert pd.read_csv("reports/preservation.csv")["seed"].tolist() == [1, 2] * 2


def test_the_scores_are_those_of_the_seeds_that_did_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_trials(trials: list[Trial], folder: Path, label: str) -> None:
        for trial in trials[1:]:
            write(pd.DataFrame({"seed": [trial.name]}), folder / trial.name / SCORES)
        write_failure(folder / trials[0].name, Failure(label, "", 0, 0, ENDED))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    monkeypatch.setattr(score_signals, "run_trials", run_trials)
    score_signals.main(load_params(ROOT / "params.yaml").model_copy(update={"seeds": 3}))
    assert pd.read_csv("reports/signals.csv")["seed"].tolist() == ["seed-1", "seed-2"]


def test_a_search_writes_what_failed_beside_what_finished(
    baselines: Path, spec: ModelSpec, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_trials(trials: list[Trial], folder: Path, label: str) -> None:
        write_failure(folder / "fast/seed-0", Failure(label, "fast", 0, 3, NAN))
        for name in ("base/seed-0", "base/seed-1", "fast/seed-1"):
            shutil.copytree(baselines / "seed-0", folder / name)

    monkeypatch.setattr(search, "run_trials", run_trials)
    candidates = {"fast": (spec, training), "base": (spec, training)}
    table = run_search("q1", candidates, {"fast": {"lr": 1}}, 2, tmp_path, tmp_path / "q1")
    assert table.columns.tolist() == COLUMNS
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "q1.csv"), table)
    assert table[["candidate", "seed", "settings"]].values.tolist() == [
        *(["fast", 0, "lr=1"], ["fast", 1, "lr=1"], ["base", 0, "base"], ["base", 1, "base"]),
    ]
    assert table["failure"].dropna().tolist() == ["q1, fast, seed 0, step 3: the loss is nan"]
    measured = table.columns.drop(["candidate", "seed", "settings", "failure"])
    assert table[measured].isna().all(axis=1).tolist() == table[measured].isna().any(axis=1).tolist()
    assert table["accuracy"].isna().tolist() == [True, False, False, False]
