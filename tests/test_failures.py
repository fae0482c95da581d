"""A study in which trials failed still has verdicts, tables and a page, and each of them says so."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from phasegate.base import processor
from phasegate.base.errors import UserError
from phasegate.base.paths import EVALUATED, MODELS, PREPARED, REPORTS, TABLES
from phasegate.model.classifier import ModelSpec
from phasegate.params import names
from phasegate.params.fields import Seeds
from phasegate.params.pretraining import Training
from phasegate.pretraining import search
from phasegate.records.tables import read_table, write_table
from phasegate.records.trial_folder import FAILURE, FAILURE_COLUMNS, Failure, finished, read_failure, write_failure
from phasegate.report.figures import draw
from phasegate.signals.signal_scores import SCORES
from phasegate.tools.documents import NEEDED, blocks
from phasegate.tools.experiments import summary
from phasegate.trials.trial import Trial
from phasegate.verdicts import wording
from stages import decide, headline, in_a_row, report, signals
from tests.small_study import ROOT
from tests.test_decisions import searched
from tests.test_report import PARAMS, decided

NAN = "the loss is nan"
ENDED = f"models/p7a/baseline/seed-0, which it needs, failed: {NAN}"


def failures() -> pd.DataFrame:
    """The first seed of 7a and of all that starts from it, a trial of 7b.2, and an arm of 7b.1."""
    phases = {phase: arms for phase, arms in PARAMS.arms().items() if phase not in ("p7c1", "p7c2")}
    later = [(phase, arm) for phase, arms in phases.items() for arm in arms if arm != "baseline"]
    rows = [(names.START, "baseline", 0, 900, NAN), ("p7b2", "split", 3, 17, NAN)]
    rows += [(*key, 0, 0, ENDED) for key in later]
    rows += [("p7b1", "noise_acting", seed, 40 + seed, NAN) for seed in range(1, 10)]
    return pd.DataFrame(rows, columns=FAILURE_COLUMNS)


def committed(name: str) -> pd.DataFrame:
    """A table of the study, whose first seed is taken for seed 0."""
    table = pd.read_csv(ROOT / TABLES / f"{name}.csv")
    return table.assign(seed=table["seed"] - PARAMS.seeds.first)


@pytest.fixture(scope="module")
def study(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed study as it would be if these trials had failed, decided and reported."""
    folder, failed = tmp_path_factory.mktemp("study"), failures()
    lost = pd.MultiIndex.from_frame(failed[["phase", "arm", "seed"]])
    for name in decide.COLLECTED:
        table = failed if name == "failures" else committed(name)
        if name in ("routing", "loads"):
            table["seed"] = 1  # a study keeps the first seed: take it for the second
        if name != "failures":
            table = table[~pd.MultiIndex.from_frame(table[["phase", "arm", "seed"]]).isin(lost)]
        folders = table["phase"].mask(table["arm"] == names.CONTROL, "control")
        for phase in names.EVALUATED:
            write_table(folder / EVALUATED / phase / f"{name}.csv", table[folders == phase])
    for name in ("signals", "in_a_row"):
        write_table(folder / MODELS / f"{name}.csv", committed(name).query("seed > 0"))
    tried = searched({"base": 80, "fast": 80}, "fast, seed 1")
    for name in ("q1", "q2", "references"):
        published = {"published_accuracy": 80.0} if name == "references" else {}
        write_table(folder / MODELS / f"{name}.csv", tried.assign(**published))
        (folder / MODELS / f"{name}.yaml").write_text(yaml.safe_dump({"candidate": "base"}))
    write_table(folder / MODELS / "rates.csv", pd.read_csv(ROOT / TABLES / "rates.csv").assign(seed=420))
    shutil.copytree(prepared, folder / PREPARED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(decide, "sampling", lambda *_: pd.read_csv(ROOT / TABLES / "sampling.csv"))
        patch.setattr(decide, "read_predictions", lambda _: ((), {}))
        patch.setattr(decide, "arrival", lambda *_: pd.read_csv(ROOT / TABLES / "arrival.csv"))
        for stage in (decide, report, headline):
            stage.main(PARAMS.model_copy(update={"headline": PARAMS.headline.model_copy(update={"phase": "p7b1"})}))
    return folder


def test_every_verdict_row_states_its_failures(study: Path) -> None:
    tables = {name: pd.read_csv(study / TABLES / f"{name}.csv") for name in NEEDED}
    rows = tables["decisions"].set_index(["phase", "arm"])
    failed = {("p7a", "baseline"): 1, ("p7a", "continue"): 1, ("p7b2", "split"): 1, ("p7b1", "noise_acting"): 9}
    failed |= {("p7c3", "leave"): 1}
    assert rows["n_failed"].to_dict() == dict.fromkeys(rows.index, 0) | failed
    whole = rows.drop(list(failed)).drop(["p7c1", "p7c2"], level="phase")
    assert (whole["n_seeds"] == 9).all() and rows["verdict"]["p7b2", "split"] != "GO"
    cells = {"baseline": "BASELINE, 1 of 10 trials failed", "continue": "CONTROL, 1 of 10 trials failed"}
    split = f"{rows['verdict']['p7b2', 'split']}, 1 of 9 trials failed"
    cells |= {r"noise\_acting": "NO-GO, all 9 trials failed", "split": split}
    written = blocks({"mnist1d": tables, "fashion_mnist": tables}, PARAMS)
    shown = "\n".join(written[name] for name in ("results", "verdicts"))
    assert all(f"\n\nFailed trials on {data}:\n\n- 7a" in shown for data in ("MNIST-1D", "Fashion-MNIST"))
    for text in (markdown := (study / REPORTS / "decisions.md").read_text(), shown):
        for arm, cell in cells.items():
            assert re.search(rf"\| \**{re.escape(arm)}\** \| (?:\w+ \| )?\**{re.escape(cell)}", text), arm
        assert "- 7b.2 split, seed 3, step 17: the loss is nan" in text
        assert "- 7b.3 task\\_gates, heads, drowned, seed 0, step 0: models/p7a" in text
    assert "NO-GO: noise_acting, all 9 trials failed.**" in markdown


def test_the_page_lists_failed_trials_and_takes_no_blank_for_a_number(study: Path) -> None:
    page = (study / REPORTS / "report.html").read_text()
    assert all(recorded in page for recorded in ("versions.torch", "data.sha256.train_x", "parameters.p7a.n_routed"))
    assert processor.name().partition(",")[0] not in page
    assert '<span class="verdict no-go">NO-GO, all 9 trials failed</span>' in page
    listed = re.findall("<li>(.*)</li>", page[page.index("<h3>Failed trials") : page.index("<h2>What broke it")])
    assert len(listed) == 8 + 1 + 9 and listed[0] == "7a baseline, seed 0, step 900: the loss is nan"
    words = re.sub(r"<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL)
    words = words.replace("loss is nan", "").replace("star (*)", "")
    assert not re.search(r"\bnan\b|\[, \]|\(\W*\)", words)
    assert "choosing the experts and not drawing them, no seed finished" in words
    assert "<td>1, 1 failed</td>" in words  # in the searches


def test_the_failures_are_a_table_and_the_headline_counts_them(study: Path) -> None:
    table = pd.read_csv(study / TABLES / "failures.csv")
    assert table.columns.tolist() == FAILURE_COLUMNS and len(table) == len(failures())
    metrics = json.loads((study / "metrics.json").read_text())
    assert (metrics["verdict"], metrics["n_failed"], metrics["n_seeds"]) == ("NO-GO", 9, 0)
    assert summary(metrics) == "noise_acting, NO-GO, no trial finished"
    seeds = {seed for name in ("routing", "loads") for seed in pd.read_csv(study / TABLES / f"{name}.csv")["seed"]}
    assert seeds == {1}


def test_figures_say_what_failed(study: Path) -> None:
    tables = {path.stem: read_table(path) for path in (study / TABLES).iterdir()}
    assert draw("entropy", tables, PARAMS).axes[0].get_title(loc="left") == "7b.1 noise_acting: all 9 trials failed"
    notes = [text.get_text() for text in draw("differences", tables, PARAMS).axes[0].texts]
    assert len([note for note in notes if note == "NO-GO  all 9 trials failed"]) == 1
    shown = [label.get_text() for label in draw("leaderboard_q1", tables, PARAMS).axes[0].get_yticklabels()]
    assert shown == ["base", "fast (1 of 2 trials failed)"]
    nobody = draw("lineage", tables | {"loads": tables["loads"].assign(arm="other")}, PARAMS).get_suptitle()
    assert nobody.replace("\n", " ").endswith("no primary arm finished it")


def test_a_finding_says_what_failed_and_failures_alike_share_a_line() -> None:
    rows = {row.phase: row for row in wording.headline_rows(decided())}
    unsure = rows["p7b2"]._replace(verdict="INCONCLUSIVE", word="UNDECIDED", as_expected="open", n_seeds=2, n_failed=1)
    text = wording.finding(unsure)
    assert re.match(r"INCONCLUSIVE: split is UNDECIDED against continue, \+2.*, but 1 of 3 trials failed$", text)
    assert wording.outcome(unsure, decided()).endswith("but 1 of 3 trials failed (2 seeds).")
    no_go = wording.finding(rows["p7b1"]._replace(n_seeds=2, n_failed=1))
    assert no_go.startswith("NO-GO: noise_acting is WORSE than") and no_go.endswith(", and 1 of 3 trials failed")
    idle = rows["surgery"]._replace(word="NOTHING DONE", verdict="INCONCLUSIVE", n_seeds=2, n_failed=1)
    assert "never operated and equals continue in every seed that finished (NOTHING" in wording.finding(idle)
    for total, text in ((1, "the one trial failed"), (3, "all 3 trials failed")):
        nothing = rows["p7b1"]._replace(n_seeds=0, n_failed=total)
        assert wording.outcome(nothing, decided()) == f"NO-GO: noise_acting, {text}."
    alike = [("p7b1", "a_b", 0, 0, "x"), ("p7b1", "c", 0, 0, "x"), ("p7b1", "c", 1, 0, "x")]
    said = wording.failure_list(pd.DataFrame(alike, columns=FAILURE_COLUMNS))
    assert said == ["7b.1 a_b, c, seed 0, step 0: x", "7b.1 c, seed 1, step 0: x"]


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


def test_stages_leave_out_failed_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_trials(trials: list[Trial], folder: Path) -> None:
        for trial in trials[1:]:
            write_table(folder / trial.name / SCORES, pd.DataFrame({"seed": [trial.seed]}))
        write_failure(folder / trials[0].name, Failure("signals", "", 0, 0, ENDED))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signals, "run_trials", run_trials)
    monkeypatch.setattr(in_a_row, "in_a_row", lambda _, start, seed, *rest: pd.DataFrame({"seed": [seed]}))
    write_failure(MODELS / "p7a/baseline/seed-0", Failure(names.START, "baseline", 0, 900, NAN))
    for stage in (signals, in_a_row):
        stage.main(PARAMS.model_copy(update={"seeds": Seeds(first=0, count=3)}))
    assert pd.read_csv(MODELS / "signals.csv")["seed"].tolist() == [1, 2]
    assert pd.read_csv(MODELS / "in_a_row.csv")["seed"].tolist() == [1, 2] * 2


def test_a_search_writes_what_failed_beside_what_finished(
    baselines: Path, spec: ModelSpec, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run_trials(trials: list[Trial], folder: Path, all_may_fail: bool) -> None:
        asked.append((len(trials), all_may_fail))
        write_failure(folder / "fast/seed-0", Failure("q1", "fast", 0, 3, NAN))
        for name in ("base/seed-0", "base/seed-1", "fast/seed-1"):
            shutil.copytree(baselines / "seed-0", folder / name, dirs_exist_ok=True)

    monkeypatch.setattr(search, "run_trials", run_trials)
    candidates = {"fast": (spec, training), "base": (spec, training)}
    seeds = dict.fromkeys(candidates, range(2))
    table = search.run_search("q1", candidates, {"fast": {"lr": 1}}, seeds, tmp_path, tmp_path / "q1")
    assert table.columns.tolist() == search.COLUMNS
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "q1.csv"), table)
    settings = [["fast", 0, "lr=1"], ["fast", 1, "lr=1"], ["base", 0, "base"], ["base", 1, "base"]]
    assert table[["candidate", "seed", "settings"]].values.tolist() == settings
    assert table["failure"].dropna().tolist() == ["q1, fast, seed 0, step 3: the loss is nan"]
    measured = table.columns.drop(["candidate", "seed", "settings", "failure"])
    assert np.array_equal(table[measured].isna(), np.repeat([[True], [False], [False], [False]], len(measured), axis=1))
    search.run_search("q2", candidates, {}, seeds, tmp_path, tmp_path / "q2", table[table["candidate"] == "base"])
    assert asked == [(4, False), (2, True)]  # new ones may all fail beside results that are known
