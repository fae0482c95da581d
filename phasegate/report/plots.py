"""The figures of the study as a whole: one function per figure, each returning a matplotlib `Figure`.

Titles are findings made from the data (`tables.finding`). No meaning hangs on colour alone: verdicts and
operations also differ in marker, primary arms also in size and fill.
"""

from math import ceil, isfinite
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from phasegate.decisions import BASELINE, CONTROL, relabel_control
from phasegate.errors import UserError
from phasegate.report.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    band,
    dot,
    name_rows,
    new_figure,
    wrapped,
)
from phasegate.report.tables import (
    MINUS,
    failed,
    finding,
    headline_rows,
    interval,
    number,
    of_arm,
    phase_label,
    rows_of,
)
from phasegate.study import START

ARM_STYLES = [  # colour and dash of the arms of a phase, primary first
    (BLUE, "-"),
    (VERMILION, "--"),
    (GREEN, "-."),
    (PURPLE, ":"),
    (ORANGE, (0, (5, 1))),
    (SKY, (0, (3, 1, 1, 1))),
]
VERDICT_STYLES = {  # colour and marker
    "GO": (GREEN, "o"),
    "NO-GO": (VERMILION, "X"),
    "INCONCLUSIVE": (ORANGE, "D"),
    "BASELINE": (GREY, "s"),
}
OPERATION_MARKERS = {"split": "^", "clone": "P", "reinit": "*", "remove": "v", "merge": "d"}
OWN_MARKER = "h"  # of any surgery of one's own


@mpl.rc_context(STYLE)
def differences(decisions: pd.DataFrame, margin_pp: float) -> Figure:
    """Forest plot: each arm's difference from the control (pp) with its interval, the margin and zero.

    An arm of which no trial finished has a row without a mark.
    """
    rows = [row for row in rows_of(decisions) if row.verdict != "CONTROL"]
    if not rows:
        raise UserError("the decisions have no arm beside the control: there is nothing to plot")
    positions, at = [], 0.0
    for before, row in zip([None, *rows], rows, strict=False):
        at += 1.6 if before is not None and before.phase != row.phase else 1.0
        positions.append(at)
    figure, (axes,) = new_figure(9, 1.6 + 0.32 * at)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.axvline(-margin_pp, color=BLACK, linewidth=1, linestyle="--")
    for y, row in zip(positions, rows, strict=True):
        colour, marker = VERDICT_STYLES[row.verdict]
        size, face = (9, colour) if row.primary else (6, "white")
        if isfinite(row.delta_lo):
            axes.hlines(y, row.delta_lo, row.delta_hi, color=colour, linewidth=2.5 if row.primary else 1.3)
        axes.plot(row.delta_pp, y, marker, color=colour, markerfacecolor=face, markersize=size)
        difference = interval(row.delta_pp, row.delta_lo, row.delta_hi, signed=True)
        text = f"{row.verdict}  {', '.join(filter(None, [difference, failed(row)]))}"
        weight = "bold" if row.primary else "normal"
        axes.annotate(*(text, (1.01, y)), xycoords=("axes fraction", "data"), va="center", size=9, weight=weight)
    axes.set_yticks(positions, [f"{phase_label(row.phase)}  {row.arm}" for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.primary else "normal")
    axes.set_ylim(max(positions) + 0.8, min(positions) - 0.8)
    axes.set_xlabel(f"test accuracy minus {CONTROL}, pp (dashed: the margin, {MINUS}{margin_pp:g} pp)")
    findings = [wrapped(f"{phase_label(row.phase)} {finding(row, margin_pp)}", 100) for row in headline_rows(decisions)]
    figure.suptitle("\n".join(findings) or "No phase is decided yet", x=0.01, ha="left")
    return figure


@mpl.rc_context(STYLE)
def learning_curves(
    curves: pd.DataFrame,
    decisions: pd.DataFrame,
    margin_pp: float,
    confidence: float,
    surgeries: pd.DataFrame | None = None,
) -> Figure:
    """Gate accuracy (percent) over training steps, a panel per phase: mean and interval over seeds per arm.

    The control is grey in every panel that continues from 7a; a panel shows six arms at most; marks along the
    bottom are the surgeries of all seeds, a row per arm.
    """
    curves = relabel_control(curves)
    shown = curves[curves["arm"] != CONTROL]["phase"].unique()
    heads = [row for row in rows_of(decisions) if row.primary and row.phase in shown]
    if not heads:
        raise UserError("the curves have no phase of the decisions: there is nothing to plot")
    columns = min(2, len(heads))
    figure, panels = new_figure(6.4 * columns, 3.7 * ceil(len(heads) / columns), len(heads), columns)
    for axes, head in zip(panels, heads, strict=True):
        if head.phase != START:
            band(axes, of_arm(curves, START, CONTROL), "accuracy", GREY, "-", confidence, CONTROL)
        arms = decisions[(decisions["phase"] == head.phase) & (decisions["arm"] != CONTROL)]["arm"]
        arms = list(arms)[: len(ARM_STYLES)]  # the primary arm comes first in the decisions
        for arm, (colour, dash) in zip(arms, ARM_STYLES, strict=False):
            rows = of_arm(curves, head.phase, arm)
            band(axes, rows, "accuracy", colour, dash, confidence, arm, width=2.2 if arm == head.arm else 1.3)
        if surgeries is not None:
            _surgery_marks(axes, surgeries[surgeries["phase"] == head.phase], arms)
        axes.set_title(wrapped(f"{phase_label(head.phase)} {finding(head, margin_pp)}"))
        axes.set(xlabel="training step", ylabel="gate accuracy, %")
        more = len(decisions[decisions["phase"] == head.phase]) - len(arms) - (head.phase == START)
        title = f"and {more} more arm{'s' if more > 1 else ''}" if more else None
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title=title, title_fontsize=8)
    if surgeries is not None and len(surgeries):
        marks = [
            Line2D([], [], color=BLACK, marker=marker, linestyle="", markersize=5, label=name)
            for name, marker in _markers(surgeries).items()
        ]
        figure.legend(
            handles=marks,
            loc="outside lower center",
            ncols=len(marks),
            title="surgeries, in the arm's colour; the larger, the more seeds",
        )
    return figure


@mpl.rc_context(STYLE)
def expert_routing(routing: pd.DataFrame, decisions: pd.DataFrame, block: int = 0) -> Figure:
    """Heatmaps, expert by class: the share (percent) of each class's routed tokens that every expert gets.

    `routing` is that of one seed: a panel for the 7a baseline and one for each primary arm that finished it. Experts
    keep their row: those that surgery removed stay as grey rows, those born in the phase follow below.
    """
    routing, seed = routing[routing["block"] == block], int(routing["seed"].iloc[0])
    panels = {}
    for row in rows_of(decisions[decisions["primary"].astype(bool)]):
        part = of_arm(routing, row.phase, row.arm)
        if len(part):
            counts = part.pivot_table(index="expert", columns="class", values="tokens", aggfunc="sum", fill_value=0)
            panels[row.phase, row.arm] = counts
    if (START, BASELINE) not in panels:
        raise UserError(f"the routing has no rows of the 7a baseline for seed {seed}, block {block}")
    old = panels[START, BASELINE].index
    height = max(len(old.union(counts.index)) for counts in panels.values())
    columns = min(2, len(panels))
    rows = ceil(len(panels) / columns)
    figure, all_axes = new_figure(5 * columns, rows * (1.4 + min(8, 0.2 * height)), len(panels), columns)
    most = max(float(_shares(counts).to_numpy().max()) for counts in panels.values())
    for axes, ((phase, arm), counts) in zip(all_axes, panels.items(), strict=True):
        mesh = _heatmap(axes, _shares(counts).reindex(old.union(counts.index)), old, most)
        busiest = f"the busiest takes {_busiest(counts):.0f} %"
        kept, born = len(old.intersection(counts.index)), len(counts.index.difference(old))
        what = f"{len(old)} experts" if phase == START else f"{kept} of {len(old)} experts kept, {born} born"
        axes.set_title(f"{phase_label(phase)} {arm}: {what},\n{busiest} of all tokens")
    figure.colorbar(mesh, ax=all_axes, label="share of the class's tokens, %", shrink=0.6, aspect=25)
    after = [_busiest(counts) for (phase, _), counts in panels.items() if phase != START]
    then = f", and {min(after):.0f} to {max(after):.0f} % at the end of the phases after it" if after else ""
    figure.suptitle(
        f"The busiest expert takes {_busiest(panels[START, BASELINE]):.0f} % of all tokens in 7a{then}\n"
        f"(seed {seed}, block {block}; grey: removed, +: born)",
        x=0.01,
        ha="left",
    )
    return figure


@mpl.rc_context(STYLE)
def leaderboard(table: pd.DataFrame, title_prefix: str) -> Figure:
    """Dots with intervals: the candidates by gate accuracy (percent), and below them the references.

    The two groups have their own scales; the dashed line carries the chosen candidate over to the references.
    """
    search, references = table[table["kind"] == "search"], table[table["kind"] == "reference"]
    sizes = [len(group) for group in (search, references) if len(group)]
    figure, panels = new_figure(9, 1.9 + 0.3 * sum(sizes) + 0.7 * (len(sizes) - 1), len(sizes), 1, sizes)
    best = next(row for row in rows_of(search) if row.chosen)
    for y, row in enumerate(rows_of(search)):
        colour = BLUE if row.chosen else GREY
        dot(panels[0], y, (row.accuracy, row.accuracy_lo, row.accuracy_hi), colour, "o", strong=row.chosen)
    _name_candidates(panels[0], search, "gate accuracy, %")
    if len(references):
        axes = panels[1]
        axes.axvline(best.accuracy, color=BLUE, linewidth=1, linestyle="--", label=f"{best.candidate}, gate")
        for y, row in enumerate(rows_of(references)):
            dot(axes, y - 0.2, (row.accuracy, row.accuracy_lo, row.accuracy_hi), GREY, "o")
            dot(axes, y, (row.test_accuracy, row.test_lo, row.test_hi), VERMILION, "s")
            axes.plot(row.published_accuracy, y + 0.2, "D", color=BLACK, markerfacecolor="white", markersize=6)
        _name_candidates(axes, references, "accuracy of the references, %")
        for label, marker, colour, face in (
            ("gate", "o", GREY, GREY),
            ("test", "s", VERMILION, VERMILION),
            ("published", "D", BLACK, "white"),
        ):
            axes.plot([], [], marker, color=colour, markerfacecolor=face, label=label)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{title_prefix}: {_ranking(search, best)}", x=0.01, ha="left")
    return figure


def _surgery_marks(axes: Axes, surgeries: pd.DataFrame, arms: list[str]) -> None:
    """A strip below the curves: a row for each arm and operation, marks growing with the number of seeds."""
    rows = [
        (arm, operation, steps.value_counts())
        for arm in arms
        for operation, steps in surgeries[surgeries["arm"] == arm].groupby("operation")["step"]
    ]
    low, high = axes.get_ylim()
    share = 0.05 * len(rows) + 0.02  # of the height of the axes
    axes.set_ylim(low - (high - low) * share / (1 - share), high)
    for level, (arm, operation, counts) in enumerate(rows):
        axes.scatter(
            *(counts.index, np.full(len(counts), 0.03 + 0.05 * level), 10 + 25 * counts / counts.max()),
            marker=OPERATION_MARKERS.get(str(operation), OWN_MARKER),
            color=ARM_STYLES[arms.index(arm)][0],
            linewidth=0,
            transform=axes.get_xaxis_transform(),
        )


def _markers(surgeries: pd.DataFrame) -> dict[str, str]:
    """The markers of the operations that were done, by name."""
    done = set(surgeries["operation"])
    known = {name: marker for name, marker in OPERATION_MARKERS.items() if name in done}
    return known | dict.fromkeys(sorted(done - set(known)), OWN_MARKER)


def _busiest(counts: pd.DataFrame) -> float:
    """The share (percent) of all tokens that the busiest expert gets; counts (experts, classes)."""
    return float(100 * counts.sum(axis=1).max() / max(1, counts.to_numpy().sum()))


def _shares(counts: pd.DataFrame) -> pd.DataFrame:
    """Tokens (experts, classes) as percent of each class; a class without tokens stays at 0."""
    return 100 * counts / counts.sum(axis=0).clip(lower=1)


def _heatmap(axes: Axes, shares: pd.DataFrame, old: "pd.Index[Any]", most: float) -> QuadMesh:
    """One panel of `expert_routing`; rows without numbers are the removed experts."""
    experts, classes = [int(e) for e in shares.index], list(shares.columns)
    many = shares.size > 1500  # then as pixels, without white lines between the cells
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(shares.to_numpy(dtype=float)),
        cmap="Blues",
        vmin=0,
        vmax=most,
        edgecolors="none" if many else "white",
        linewidth=0 if many else 0.5,
        rasterized=many,
    )
    axes.set_facecolor("#bbbbbb")
    names = [f"+{expert}" if expert not in old else str(expert) for expert in experts]
    every = ceil(len(experts) / 40)
    axes.set_yticks(np.arange(0, len(experts), every) + 0.5, names[::every], fontsize=7)
    labels = [str(name) for name in classes]
    every = ceil(len(labels) / 34)
    upright = len(labels) > 25 or max(map(len, labels)) > 3
    axes.set_xticks(np.arange(0, len(labels), every) + 0.5, labels[::every], fontsize=7, rotation=90 if upright else 0)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set(xlabel="class", ylabel="expert")
    return mesh


def _name_candidates(axes: Axes, rows: pd.DataFrame, xlabel: str) -> None:
    """The names, the chosen one in bold, those with failed trials with how many."""
    names = [f"{row.candidate} ({failed(row)})" if row.n_failed else row.candidate for row in rows_of(rows)]
    name_rows(axes, names, xlabel)
    for label, chosen in zip(axes.get_yticklabels(), rows["chosen"], strict=True):
        label.set_fontweight("bold" if chosen else "normal")


def _ranking(search: pd.DataFrame, best: Any) -> str:
    """What the search found: the chosen candidate, its accuracy, the distance to the best other that finished."""
    text = f"{best.candidate} chosen at {interval(best.accuracy, best.accuracy_lo, best.accuracy_hi, 1)} %"
    others = search[~search["chosen"].astype(bool) & (search["n_failed"] == 0)]
    if others.empty:
        return text
    other = next(iter(rows_of(others)))
    lead = best.accuracy - other.accuracy
    return f"{text}, {number(abs(lead), 1)} pp {'ahead of' if lead >= 0 else 'behind'} {other.candidate}"
