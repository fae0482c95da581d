"""The comment on a pull request says what changed in the verdicts, and nothing else."""

import subprocess
from pathlib import Path

import pandas as pd
import pytest

from phasegate.errors import UserError
from phasegate.report.comparison import at, comparison
from tests.small_study import ROOT

HEAD = pd.read_csv(ROOT / "reports/decisions.csv")


def changed(arm: str, **values: float | str) -> pd.DataFrame:
    """The committed decisions with other values in the row of one arm of 7b.2."""
    table = HEAD.copy()
    for column, value in values.items():
        table.loc[(table["phase"] == "p7b2") & (table["arm"] == arm), column] = value
    return table


def said(base: pd.DataFrame | None, head: pd.DataFrame = HEAD) -> list[str]:
    """The lines before the tables of all verdicts."""
    return comparison(base, head, "`main`").split("\nPrimary arms:")[0].splitlines()[2:]


def test_nothing_changed_is_one_sentence() -> None:
    assert said(HEAD) == ["No verdict and no number differs from `main`."]
    assert said(changed("split", accuracy=HEAD.query("phase == 'p7b2'")["accuracy"].iloc[0] + 0.001)) == said(HEAD)


def test_a_verdict_that_changed_is_bold_and_numbers_show_both_values() -> None:
    lines = said(changed("split", verdict="NO-GO", accuracy=80.0, delta_pp=0.5))
    assert lines[-1] == "| 7b.2 | split | **NO-GO → INCONCLUSIVE** | 80.00 → 82.17 | +0.50 → −1.43 |"
    assert len(lines) == 5
    assert said(changed("split", delta_pp=-2.0))[-1] == "| 7b.2 | split | INCONCLUSIVE |  | −2.00 → −1.43 |"
    assert said(changed("split", delta_pp=-1e-9))[-1].endswith("| 0.00 → −1.43 |")


def test_new_arms_arms_that_went_and_older_tables_are_told() -> None:
    without = HEAD[HEAD["arm"] != "noise_acting"]
    assert said(without)[-1] == "| 7b.1 | noise\\_acting | **new**: NO-GO |  |  |"
    assert said(HEAD, without)[-1] == "| 7b.1 | noise\\_acting | **gone**: NO-GO |  |  |"
    assert said(HEAD.drop(columns="n_failed")) == said(HEAD)
    assert said(None) == ["`main` has no decisions to compare with."]


def test_all_arms_follow_in_a_table() -> None:
    text = comparison(HEAD, HEAD, "`main`")
    assert text.endswith("</details>\n") and text.count("\n| ") == len(HEAD) + HEAD["primary"].sum() + 4


def test_the_base_is_a_revision_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        author = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True)

    (tmp_path / "reports").mkdir()
    changed("split", verdict="NO-GO").to_csv(tmp_path / "reports/decisions.csv", index=False)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "base")
    HEAD.to_csv(tmp_path / "reports/decisions.csv", index=False)
    monkeypatch.chdir(tmp_path)
    table = at("HEAD")
    assert table is not None and "**NO-GO → INCONCLUSIVE**" in comparison(table, HEAD, "main")
    git("rm", "-q", "--cached", "-r", ".")
    git("commit", "-qm", "no tables")
    assert at("HEAD") is None
    for wrong in ("nowhere", "--help"):
        with pytest.raises(UserError, match=f"git knows no revision '{wrong}' here: fetch it first"):
            at(wrong)
