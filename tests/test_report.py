"""The report says what the tables say, renders any study, and gives the same bytes for the same data."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from phasegate.decisions import decide, leaderboard
from phasegate.errors import UserError
from phasegate.report import html, plots, tables

ARMS = {
    **{("continue", "continue"): 0.0, ("p7a", "baseline"): -1.0, ("p7b1", "noise_acting"): -5.0},
    **{("p7b1", "a|b_c"): 0.0, ("p7b2", "split"): 2.0, ("p7b3", "task_gates"): -0.9},
}
PRIMARY = {"p7b1": "noise_acting", "p7b2": "split", "p7b3": "task_gates"}
HYPOTHESES = {"p7b1": "Noise is <b>harmless</b>", "p7b2": "Splits are exact.", "p7b3": "Tasks help."}


def decided(seeds: int = 3) -> pd.DataFrame:
    """Decisions with a NO-GO (7b.1), a GO (7b.2) and an INCONCLUSIVE (7b.3), if there are three seeds."""
    trials = pd.DataFrame(
        {"phase": phase, "arm": arm, "seed": seed, "accuracy": 67 + delta + 0.1 * seed * (delta != 0)}
        | {"n_routed_start": 12, "n_routed_end": 13, "params_total": 9000, "params_active": 2000}
        | {"flops_per_example": 4000, "train_seconds": 2.5}
        for (phase, arm), delta in ARMS.items()
        for seed in range(seeds)
    )
    return decide(trials, 1.0, 0.95, PRIMARY)


def board(seeds: int = 2) -> pd.DataFrame:
    """A leaderboard with three candidates and one reference."""
    runs = pd.DataFrame(
        {"candidate": name, "seed": seed, "accuracy": accuracy + seed, "params_total": 9000}
        | {"params_active": 2000, "flops_per_example": 4000, "train_seconds": 2.5, "settings": "lr=0.1"}
        for name, accuracy in (("wide", 70), ("deep", 68), ("plain", 60), ("cnn", 92))
        for seed in range(seeds)
    )
    reference = runs["candidate"] == "cnn"
    return leaderboard(runs[~reference], "wide", 0.95, references=runs[reference], published={"cnn": 94.0})


def curves(seeds: int = 3) -> pd.DataFrame:
    """Curves of every arm, the control still under its phase `continue`."""
    return pd.DataFrame(
        {"phase": phase, "arm": arm, "seed": seed, "step": step, "accuracy": 60.0 + seed + step}
        for phase, arm in ARMS
        for seed in range(seeds)
        for step in (0, 1, 2)
    )


def routing(experts: int = 4, classes: int = 3) -> pd.DataFrame:
    """Routing in which 7b.1 has lost expert 0 and borne one; its last class has no tokens."""
    return pd.DataFrame(
        {"phase": phase, "arm": arm, "seed": 0, "block": 0, "expert": expert + (phase == "p7b1")}
        | {"class": kind, "tokens": 0 if kind == classes - 1 else expert + kind}
        for phase, arm in ARMS
        for expert in range(experts)
        for kind in range(classes)
    )


SURGERIES = pd.DataFrame(
    {
        "phase": "p7b2",
        "arm": "split",
        "seed": seed,
        "step": 1,
        "operation": operation,
        "output_change": change,
    }
    | {"accuracy_before": 67.0, "accuracy_after": 67.0 - loss, "recovery_steps": recovery}
    for seed, operation, change, loss, recovery in (
        *((0, "split", 1e-9, 0.0, 0.0), (1, "split", 3e-9, 0.0, 0.0)),
        *((0, "remove", 0.1, 2.0, 30.0), (1, "remove", 0.3, 4.0, np.nan), (2, "remove", 0.2, 3.0, np.nan)),
    )
)


TASKS = pd.DataFrame(
    [("p7b3", "heads", seed, "parity", 80.0 + seed, 79.0) for seed in range(3)],
    columns=["phase", "arm", "seed", "task", "accuracy", "derived"],
)


def page(**changes: object) -> str:
    """The page of the study above."""
    inputs: dict[str, object] = {
        "figures": {name: plots.svg(plots.leaderboard(board(), "7a Q1")) for name in ("leaderboard_q1", "again")},
        "leaderboards": {"q1": board()},
        "surgeries": SURGERIES,
        "tasks": TASKS,
        "confidence": 0.95,
        "provenance": {"data": {"sha256": "abc123"}, "seeds": [0, 1]},
    }
    return html.render(decided(), HYPOTHESES, 1.0, **(inputs | changes))  # type: ignore[arg-type]


def test_numbers_read_well() -> None:
    assert tables.interval(-0.42, -0.91, 0.07, signed=True) == "−0.42 [−0.91, +0.07]"
    assert tables.interval(70.0, -np.inf, np.inf) == "70.00 [no interval]"
    assert tables.number(-0.001, signed=True) == "0.00"
    assert [tables.phase_label(phase) for phase in ("p7a", "p7b4", "references")] == [
        "7a",
        "7b.4",
        "references",
    ]


def test_each_finding_agrees_with_its_row() -> None:
    rows = {row.phase: row for row in tables.headline_rows(decided())}
    assert re.match(r"NO-GO: noise_acting loses 4\.90 pp \[", tables.finding(rows["p7b1"], 1.0))
    assert re.match(r"GO: split gains \+2\.10 pp \[", tables.finding(rows["p7b2"], 1.0))
    assert tables.outcome(rows["p7b3"], 1.0).startswith("INCONCLUSIVE: task_gates may or may not")


def test_the_markdown_table_has_a_cell_for_every_column_and_bold_primary_arms() -> None:
    text = tables.decisions_markdown(decided(), HYPOTHESES, 1.0, 0.95)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1 and len(rows) == 2 + len(ARMS)
    assert r"**noise\_acting**" in text and r"| a\|b\_c |" in text
    with pytest.raises(UserError, match="phase p7b3 has no hypothesis"):
        tables.decisions_markdown(decided(), {**HYPOTHESES, "p7b3": " "}, 1.0, 0.95)


def test_a_surgery_that_never_recovered_counts_in_the_median() -> None:
    summary = tables.surgery_summary(SURGERIES).set_index("operation")
    assert list(summary.loc["remove", ["accuracy_lost", "recovery_steps"]]) == [3.0, np.inf]
    assert summary.loc["split", "recovery_steps"] == 0
    assert [row["median recovery, steps"] for row in tables.surgery_cells(SURGERIES)] == ["never", "0"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_data_gives_equal_figures(seeds: int, tmp_path: Path) -> None:
    decisions = decided(seeds)
    figures: list[Callable[[], Figure]] = [
        lambda: plots.differences(decisions, 1.0),
        lambda: plots.learning_curves(curves(seeds), decisions, 1.0, 0.95, SURGERIES),
        lambda: plots.expert_routing(routing(), decisions),
        lambda: plots.leaderboard(board(seeds), "7a Q1"),
    ]
    for figure in figures:
        plots.save(figure(), tmp_path / "figure.svg")
        assert (tmp_path / "figure.svg").read_text(encoding="utf-8") == plots.svg(figure())


def test_titles_say_the_verdict_and_the_ranking() -> None:
    decisions = decided()
    panels = plots.learning_curves(curves(), decisions, 1.0, 0.95).axes
    titles = [axes.get_title(loc="left") for axes in panels]
    assert [title.split()[1].rstrip(":") for title in titles] == ["BASELINE", "NO-GO", "GO", "INCONCLUSIVE"]
    assert "wide chosen at 70.5" in str(plots.leaderboard(board(), "7a Q1").get_suptitle())
    routed = plots.expert_routing(routing(experts=60, classes=100), decisions).axes
    assert "59 of 60 experts kept, 1 born" in routed[1].get_title(loc="left")


def test_figures_without_data_say_so() -> None:
    with pytest.raises(UserError, match="nothing to plot"):
        plots.learning_curves(curves().query("phase == 'continue'"), decided(), 1.0, 0.95)
    with pytest.raises(UserError, match="seed 7"):
        plots.expert_routing(routing(), decided(), seed=7)


def test_the_page_is_well_formed_self_contained_and_escapes_what_people_wrote() -> None:
    text = page()
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in {"meta", "br"}:
                opened.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Checker().feed(text)
    assert not opened
    assert "Noise is &lt;b&gt;harmless" in text and "abc123" in text and "58.30" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert not re.search(r"<script|@import", text)
    linked = {first or second for first, second in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)}
    assert linked and linked <= set(ids)
    assert not re.search(r'(src|href)="(?!#|data:)', text)


def test_a_study_without_surgeries_or_leaderboards_has_a_page_too() -> None:
    assert "No arm had any" in page(surgeries=SURGERIES.head(0), leaderboards={}, figures={})
