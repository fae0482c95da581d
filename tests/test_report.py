"""The report says what the tables say, renders any study, and gives the same bytes for the same data."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from phasegate.attribution import ACCOUNTS, attribution
from phasegate.decisions import decide, leaderboard, relabel_control
from phasegate.errors import UserError
from phasegate.failure import FAILURE_COLUMNS
from phasegate.report import (
    attribution_plots,
    attribution_tables,
    drawing,
    html,
    lineage_plots,
    plots,
    surgery_plots,
    surgery_tables,
    tables,
)
from phasegate.signal_summary import signal_summary
from phasegate.surgery_summary import surgery_summary

NO_FAILURES = pd.DataFrame(columns=FAILURE_COLUMNS)
ARMS = {
    **{("continue", "continue"): 0.0, ("p7a", "baseline"): -1.0, ("p7b1", "noise_acting"): -5.0},
    **{("p7b1", "a|b_c"): 0.0, ("p7b2", "split"): 2.0, ("p7b3", "task_gates"): -0.9},
    **{("surgery", "split"): 0.0, ("surgery", "clone"): -3.0, ("surgery", "merge"): -0.2},
}
PRIMARY = {"p7b1": "noise_acting", "p7b2": "split", "p7b3": "task_gates", "surgery": "split"}
HYPOTHESES = {
    **{"p7b1": "Noise is <b>harmless</b>", "p7b2": "Splits are exact.", "p7b3": "Tasks help."},
    "surgery": "Splits cost nothing.",
}


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
        | {
            "params_active": 2000,
            "flops_per_example": 4000,
            "train_seconds": 2.5,
            "settings": "lr=0.1",
            "failure": np.nan,
        }
        for name, accuracy in (("wide", 70), ("deep", 68), ("plain", 60), ("cnn", 92))
        for seed in range(seeds)
    )
    reference = runs["candidate"] == "cnn"
    return leaderboard(runs[~reference], "wide", 0.95, references=runs[reference], published={"cnn": 94.0})


def curves(seeds: int = 3) -> pd.DataFrame:
    """Curves of every arm, the control still under its phase `continue`."""
    return pd.DataFrame(
        {"phase": phase, "arm": arm, "seed": seed, "step": step, "accuracy": 60.0 + seed + step - (arm == "clone")}
        | {"n_routed": 12, "dead_experts": 2 * (arm == "clone" and step == 2)}
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
    {"phase": "p7b2" if arm == "controlled" else "surgery", "arm": arm.replace("controlled", "split"), "seed": seed}
    | {"step": 1, "operation": operation, "output_change": change, "accuracy_before": 67.0}
    | {"accuracy_after": 67.0 - loss, "recovery_steps": recovery}
    for arm, operation, seed, change, loss, recovery in (
        *(("controlled", "split", 0, 1e-9, 0.0, 0.0), ("controlled", "split", 1, 3e-9, 0.0, 0.0)),
        *(("controlled", "remove", 0, 0.1, 2.0, 30.0), ("controlled", "remove", 1, 0.3, 4.0, np.nan)),
        *(("controlled", "remove", 2, 0.2, 3.0, np.nan), ("split", "split", 0, 0.0, 0.0, 0.0)),
        *(("clone", "clone", 0, 0.2, 1.0, 20.0), ("clone", "clone", 0, 0.4, 3.0, 20.0)),
        *(("clone", "clone", 1, 0.3, 6.0, np.nan), ("merge", "split", 0, 0.0, 0.0, 0.0)),
        ("merge", "merge", 0, 0.05, 0.5, 20.0),
    )
)
HALVES = pd.DataFrame(
    {"phase": "surgery", "arm": "split", "seed": seed, "block": 0, "expert": 12, "parent": 3, "step": 10 * seed}
    | {"smaller_share": share, "weight_distance": 0.1, "output_distance": distance, "swap_loss": 0.01 * seed}
    for seed, share, distance in ((0, 0.5, 0.1), (1, 0.2, 0.2), (2, 0.25, 0.3))
)
PRESERVATION = pd.DataFrame(
    {"seed": seed, "operation": operation, "done": done, "output_change": done * change, "accuracy": 60.0}
    for operation, change in (("split", 1e-9), ("clone", 0.1))
    for seed in range(2)
    for done in (1, 2, 3)
)


def summed(surgeries: pd.DataFrame = SURGERIES) -> pd.DataFrame:
    """The summary of the surgeries above."""
    return surgery_summary(surgeries, HALVES, curves(), decided(), 0.95)


SIGNALS = signal_summary(
    pd.DataFrame(
        {"signal": signal, "seed": seed, "seconds": 0.1, "spearman_prune": 0.5 + 0.01 * seed}
        | {"spearman_recovered": 0.5, "spearman_grow": 0.1 * seed}
        | {f"{name}_{gone}": 0.1 * gone + seed for name in ("regret", "chance") for gone in (1, 2, 4)}
        for signal in ("random_labels", "usage_frequency")
        for seed in range(3)
    ),
    0.95,
)
EXPLAINED = {arm for account in ACCOUNTS.values() for part in account.parts.values() for arm in part}
ATTRIBUTION = attribution(
    pd.DataFrame(
        {"phase": arm.split("/")[0], "arm": arm.split("/")[1], "seed": seed, "n_routed_start": 12, "n_routed_end": 13}
        | {"accuracy": 67 - 3 * ("random" in arm) - (7 + 0.1 * seed) * ("noise_acting" in arm), "params_total": 9000}
        | {"params_active": 2000, "flops_per_example": 4000, "train_seconds": 2.5}
        for arm in sorted(EXPLAINED)
        for seed in range(3)
    ),
    0.95,
)
LOADS = pd.DataFrame(
    {"phase": phase, "arm": arm, "seed": 0, "step": step, "block": 0, "expert": expert, "share": share}
    for phase, arm in PRIMARY.items()
    for step, shares in ((1, {0: 0.5, 1: 0.5}), (2, {0: 0.5, 2: 0.2, 3: 0.3}))
    for expert, share in shares.items()
)
BORN = pd.DataFrame(
    {"phase": "p7b2", "arm": "split", "seed": 0, "step": 1, "block": 0, "operation": operation, "expert": expert}
    | {"parent": parent, "n_routed_before": 12, "n_routed_after": 11 if operation == "remove" else 13}
    for operation, expert, parent in (("split", 2, 0), ("reinit", 3, np.nan), ("remove", 1, np.nan))
)
TASKS = pd.DataFrame(
    [("p7b3", "heads", seed, "parity", 80.0 + seed, 79.0) for seed in range(3)],
    columns=["phase", "arm", "seed", "task", "accuracy", "derived"],
)


def page(**changes: pd.DataFrame) -> str:
    """The page of the study above, with other tables by name."""
    table = {
        "decisions": decided(),
        "failures": NO_FAILURES,
        "leaderboard_q1": board(),
        "leaderboard_q2": board(),
        "surgeries": SURGERIES,
        "surgery_summary": summed(),
        "signal_summary": SIGNALS,
        "attribution": ATTRIBUTION,
        "curves": curves(),
        "tasks": TASKS,
    }
    figures = {name: drawing.svg(plots.leaderboard(board(), "7a Q1")) for name in html.CAPTIONS}
    provenance = {"data": {"sha256": "abc123"}, "seeds": [0, 1]}
    return html.render(table | changes, figures, html.Claims(HYPOTHESES, 1.0, 0.95), "mnist1d", provenance)


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
    assert re.match(r"GO: split stands at \+2\.10 pp \[.*\] against continue$", tables.finding(rows["p7b2"], 1.0))
    near = rows["p7b2"]._replace(delta_pp=0.5, delta_lo=0.2, delta_hi=0.8)
    assert tables.finding(near, 1.0) == "GO: split stays within 1 pp of continue, +0.50 pp [+0.20, +0.80]"
    assert tables.outcome(rows["p7b3"], decided(), 1.0).startswith("INCONCLUSIVE: task_gates may or may not")
    assert tables.finding(rows["surgery"], 1.0) == "GO: split changed nothing and equals continue in every seed"


def test_the_summary_of_surgeries_leaves_out_seeds_that_the_control_failed() -> None:
    kept = curves().query("arm != 'continue' or seed != 1")
    rows = rows_by_key(surgery_summary(SURGERIES, HALVES, kept, decided(), 0.95))
    clone = rows["surgery", "clone", "clone"]
    assert (clone["surgeries"], clone["seeds_operated"], clone["accuracy_lost"]) == (2, 1, 2.0)
    assert clone["gate_delta_pp"] == -1 and rows["surgery", "split", "split"]["pairs"] == 2


def test_an_arm_that_spends_more_than_the_control_says_so() -> None:
    costs = {"params_total": 100.0, "flops_per_example": 100.0}
    control, row = SimpleNamespace(**costs), SimpleNamespace(**costs | {"params_total": 165.0})
    assert tables.spending(control, control) == ""
    assert tables.spending(row, control) == ", with 65 % more parameters than continue"
    row.flops_per_example = 102.0
    assert tables.spending(row, control) == ", with 65 % more parameters and 2 % more FLOPs per example than continue"


def test_the_attribution_names_the_costliest_part_and_what_is_certain() -> None:
    first, second, factorial = attribution_tables.attribution_findings(ATTRIBUTION, 0.95)
    assert first.startswith("7b.1 noise_acting ends −7.10 pp [−7.35, −6.85] from its 7a checkpoint; the costliest")
    assert first.endswith("a head deciding, not the labels, −4.10 pp [−4.35, −3.85].")
    assert "splits and removals at random, −3.00 pp [−3.00, −3.00]." in second
    assert factorial.startswith(
        "signal by growth: certain (Holm) is the effect of entropy instead of random labels, +3"
    )
    assert len(attribution_tables.attribution_cells(ATTRIBUTION)) == len(ATTRIBUTION)


def test_lineages_count_births_and_name_phases_that_changed_nothing() -> None:
    figure = lineage_plots.lineage(LOADS, BORN, decided())
    (axes,) = figure.axes
    said = axes.get_title(loc="left").replace("\n", " ")
    assert said == "7b.2 split: 2 born, 1 gone, 3 in the end; the busiest takes 50 % of the tokens"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "1", "3"]  # children below parents
    assert "7b.1 and 7b.3 and surgery changed nothing" in figure.get_suptitle().replace("\n", " ")


def test_the_title_on_entropy_says_where_it_ends_beside_the_control() -> None:
    steps = curves().assign(routing_entropy=lambda table: 0.8 + 0.1 * (table["arm"] == "noise_acting"))
    figure = lineage_plots.entropy(relabel_control(steps), decided(), 0.95)
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in figure.axes]
    assert titles[:2] == [
        "7b.1 noise_acting: ends at 0.900, above the control",
        "7b.2 split: ends at 0.800, the same as the control",
    ]


def test_the_markdown_table_has_a_cell_for_every_column_and_bold_primary_arms() -> None:
    text = tables.decisions_markdown(decided(), NO_FAILURES, HYPOTHESES, 1.0, 0.95)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1 and len(rows) == 2 + len(ARMS)
    assert r"**noise\_acting**" in text and r"| a\|b\_c |" in text
    with pytest.raises(UserError, match="phase p7b3 has no hypothesis"):
        tables.decisions_markdown(decided(), NO_FAILURES, {**HYPOTHESES, "p7b3": " "}, 1.0, 0.95)


def rows_by_key(summary: pd.DataFrame) -> dict[tuple[str, str, str], dict[Any, Any]]:
    return {(row["phase"], row["arm"], row["operation"]): row for row in summary.to_dict("records")}


def test_the_summary_of_surgeries_is_over_seeds_and_ends_at_the_decision() -> None:
    rows = rows_by_key(summed())
    assert next(iter(rows)) == ("p7a", "continue", "none") and rows["p7a", "continue", "none"]["surgeries"] == 0
    clone = rows["surgery", "clone", "clone"]
    assert [clone[name] for name in ("surgeries", "output_change", "output_change_max")] == pytest.approx([3, 0.3, 0.4])
    assert (clone["n_seeds"], clone["seeds_operated"]) == (3, 2)
    assert clone["accuracy_lost"] == 4.0  # the mean of the seeds' means, 2 and 6
    assert clone["accuracy_lost_lo"] < 2 and clone["accuracy_lost_hi"] > 6
    decision = decided().query("phase == 'surgery' and arm == 'clone'").to_dict("records")[0]
    assert all(clone[name] == decision[name] for name in ("delta_pp", "delta_lo", "delta_hi"))
    assert [clone[f"gate_delta_{name}"] for name in ("pp", "lo", "hi")] == [-1, -1, -1]
    split = rows["surgery", "split", "split"]
    measured = [split[name] for name in ("pairs", "balanced", "output_distance", "swap_loss")]
    assert measured == pytest.approx([3, 2 / 3, 0.2, 0.01])
    assert summed()["pairs"].notna().sum() == 1


def test_a_surgery_that_never_recovered_counts_in_the_median() -> None:
    rows = rows_by_key(summed())
    assert rows["p7b2", "split", "remove"]["recovery_steps"] == np.inf
    assert rows["p7b2", "split", "split"]["recovery_steps"] == 0
    cells = {row["operation"]: row for row in surgery_tables.surgery_cells(summed()) if row["phase"] == "7b.2"}
    assert [cells[name]["median recovery, steps"] for name in ("remove", "split")] == ["never", "0"]
    assert [cells[name]["recovered"] for name in ("remove", "split")] == ["33 %", "100 %"]
    assert [cells[name]["output change"] for name in ("remove", "split")] == ["20 %", "2.0e-09"]


def test_the_finding_on_surgery_has_the_numbers_of_its_rows() -> None:
    growth, pruning = surgery_tables.surgery_finding(summed())
    assert "splits end 0.00 pp [0.00, 0.00], each changing the output by 0 % and costing 0.00 pp" in growth
    assert "clones end −2.90 pp [−3.15, −2.65], each changing the output by 30 % and costing 4.00 pp [−21.41," in growth
    assert growth.index("splits") < growth.index("clones")
    assert pruning.startswith("After as many splits, 0.333333 merges end −0.10 pp [−0.35, +0.15], each changing the")
    assert surgery_tables.surgery_finding(summed(SURGERIES.head(0))) == []
    title = surgery_plots.surgery(summed(), SURGERIES, 1.0).get_suptitle()
    assert "1 clones end −2.90 pp [−3.15, −2.65]" in title.replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 %"), (1.2e-9, "1.2e-09"), (0.0234, "2.3 %"), (0.996, "100 %"), (1.5, "150 %")]
)
def test_a_relative_change_reads_well(value: float, text: str) -> None:
    assert surgery_tables.change(value) == text


def test_dead_experts_are_reported() -> None:
    found = surgery_tables.dead_finding(curves())
    assert (
        found.startswith("In 3 of the 54 intervals") and "at most 2 at once (phase surgery, clone, seed 2, up" in found
    )
    assert "every expert that was there got tokens" in surgery_tables.dead_finding(curves().query("arm != 'clone'"))


def test_the_study_shows_growth_and_then_pruning_without_the_splits_before_it() -> None:
    rows = surgery_plots.study_rows(summed())
    assert list(zip(rows["arm"], rows["operation"], strict=True)) == [
        *(("continue", "none"), ("split", "split"), ("clone", "clone"), ("merge", "merge")),
    ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_data_gives_equal_figures(seeds: int, tmp_path: Path) -> None:
    decisions = decided(seeds)
    figures: list[Callable[[], Figure]] = [
        lambda: plots.differences(decisions, 1.0),
        lambda: plots.learning_curves(curves(seeds), decisions, 1.0, 0.95, SURGERIES),
        lambda: plots.expert_routing(routing(), decisions),
        lambda: plots.leaderboard(board(seeds), "7a Q1"),
        lambda: surgery_plots.surgery(summed(), SURGERIES, 1.0),
        lambda: surgery_plots.halves(PRESERVATION, HALVES, summed(), 100),
        lambda: attribution_plots.attribution(ATTRIBUTION, 0.95),
        lambda: lineage_plots.lineage(LOADS, BORN, decisions),
    ]
    for figure in figures:
        for name in ("first", "second"):
            drawing.save(figure(), tmp_path / name)
        for kind in ("svg", "png"):
            assert (tmp_path / f"first.{kind}").read_bytes() == (tmp_path / f"second.{kind}").read_bytes()


def test_titles_say_the_verdict_and_the_ranking() -> None:
    decisions = decided()
    panels = plots.learning_curves(curves(), decisions, 1.0, 0.95).axes
    titles = [axes.get_title(loc="left") for axes in panels]
    assert [title.split()[1].rstrip(":") for title in titles] == ["BASELINE", "NO-GO", "GO", "INCONCLUSIVE", "GO"]
    assert "wide chosen at 70.5" in str(plots.leaderboard(board(), "7a Q1").get_suptitle())
    routed = plots.expert_routing(routing(experts=60, classes=100), decisions).axes
    assert "59 of 60 experts kept, 1 born" in routed[1].get_title(loc="left")


def test_figures_without_data_say_so() -> None:
    with pytest.raises(UserError, match="nothing to plot"):
        plots.learning_curves(curves().query("phase == 'continue'"), decided(), 1.0, 0.95)
    with pytest.raises(UserError, match="no rows of the 7a baseline for seed 0"):
        plots.expert_routing(routing().query("phase != 'p7a'"), decided())
    nothing = surgery_plots.surgery(summed(SURGERIES.head(0)), SURGERIES.head(0), 1.0)
    assert nothing.get_suptitle() == "The surgery study has no surgeries to show"


def test_the_page_is_well_formed_self_contained_and_escapes_what_people_wrote() -> None:
    text = page()
    assert "On MNIST-1D, 3 seeds an arm." in text
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


def test_a_study_without_surgeries_has_a_page_too() -> None:
    assert "No arm had any" in page(surgery_summary=summed(SURGERIES.head(0)))
