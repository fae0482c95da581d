"""The figures of how experts develop: lineages with their load, and routing entropy over time.

Titles are findings made from the data.
"""

from math import ceil
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phasegate.decisions import CONTROL
from phasegate.report.drawing import BLUE, GREY, STYLE, VERMILION, band, new_figure, wrapped
from phasegate.report.tables import failed, headline_rows, number, of_arm, phase_label, rows_of
from phasegate.statistics import mean_interval
from phasegate.study import START

THINNEST, WIDEST = 0.03, 0.42  # half the height of an idle expert, and of the busiest; rows are one apart


@mpl.rc_context(STYLE)
def lineage(loads: pd.DataFrame, surgeries: pd.DataFrame, decisions: pd.DataFrame, block: int = 0) -> Figure:
    """A line per expert from birth to end, as thick as its load, joined to its parent: primary arms with surgery.

    `loads` are those of one seed. Born experts are blue, removed ones end in a cross, the others are grey. If no
    primary arm operated, the first is shown as it is; if none finished that seed, none is.
    """
    loads, seed = loads[loads["block"] == block], int(loads["seed"].iloc[0])
    done = surgeries[(surgeries["seed"] == seed) & (surgeries["block"] == block)]
    heads = [row for row in headline_rows(decisions) if len(of_arm(loads, row.phase, row.arm))]
    operated = [row for row in heads if len(of_arm(done, row.phase, row.arm))] or heads[:1]
    columns = min(2, len(operated)) or 1
    figure, panels = new_figure(6.4 * columns, 4.6 * ceil(len(operated) / columns) or 1, len(operated), columns)
    most = float(loads["share"].max())
    for axes, head in zip(panels, operated, strict=True):
        _tree(axes, of_arm(loads, head.phase, head.arm), of_arm(done, head.phase, head.arm), most)
        axes.set_title(wrapped(_told(head, of_arm(loads, head.phase, head.arm), of_arm(done, head.phase, head.arm))))
    still = [phase_label(row.phase) for row in heads if row not in operated]
    rest = f"; {' and '.join(still)} changed nothing" if still else "" if heads else "; no primary arm finished it"
    title = f"Lineages of the experts, as thick as their load (seed {seed}; blue: born, orange: removed){rest}"
    figure.suptitle(wrapped(title, 110), x=0.01, ha="left")
    return figure


@mpl.rc_context(STYLE)
def entropy(curves: pd.DataFrame, decisions: pd.DataFrame, confidence: float) -> Figure:
    """Routing entropy (normalised, on the gate split) over training: each phase's primary arm beside the control."""
    heads = headline_rows(decisions)
    columns = min(3, len(heads))
    figure, panels = new_figure(4.2 * columns, 3.2 * ceil(len(heads) / columns), len(heads), columns)
    control = of_arm(curves, START, CONTROL)
    for axes, head in zip(panels, heads, strict=True):
        band(axes, control, "routing_entropy", GREY, "-", confidence, CONTROL)
        band(axes, of_arm(curves, head.phase, head.arm), "routing_entropy", BLUE, "--", confidence, head.arm, width=2)
        axes.set(xlabel="training step", ylabel="routing entropy")
        axes.set_title(wrapped(_change(head, of_arm(curves, head.phase, head.arm), control, confidence), 44))
        axes.legend(fontsize=8)
    return figure


def _tree(axes: Axes, loads: pd.DataFrame, surgeries: pd.DataFrame, most: float) -> None:
    """One arm's lineage."""
    grown = surgeries["n_routed_after"] > surgeries["n_routed_before"]
    births = {row.expert: row for row in rows_of(surgeries[grown])}
    removed = {row.expert for row in rows_of(surgeries[~grown])}
    experts = {row[0].expert: row for row in map(rows_of, (rows for _, rows in loads.groupby("expert")))}
    place = {expert: y for y, expert in enumerate(_order(list(experts), births))}
    for expert, points in experts.items():
        y, birth = place[expert], births.get(expert)
        steps = [birth.step if birth else 0, *(point.step for point in points)]
        colour = BLUE if birth else VERMILION if expert in removed else GREY
        shares = np.array([points[0].share, *(point.share for point in points)])  # of the steps up to each point
        half = THINNEST + (WIDEST - THINNEST) * shares / most
        axes.fill_between(steps, y - half, y + half, step="pre", color=colour, linewidth=0)
        if birth and birth.parent in place:
            axes.plot([birth.step] * 2, [place[birth.parent], y], color=BLUE, linewidth=0.7)
        if expert in removed:
            axes.plot(steps[-1], y, "X", color=VERMILION, markersize=6)
    axes.set_yticks(range(len(place)), [str(expert) for expert in place], fontsize=7)
    axes.set_ylim(len(place) - 0.4, -0.6)
    axes.set_xlim(0, loads["step"].max() * 1.01)
    axes.set(xlabel="training step", ylabel="expert")


def _order(experts: list[int], births: dict[int, Any]) -> list[int]:
    """Every child below its parent, the latest nearest, so that no branch crosses another's line more than needed."""
    children: dict[int | None, list[int]] = {}
    for expert in sorted(experts):
        parent = births[expert].parent if expert in births else None
        children.setdefault(parent if parent in experts else None, []).append(expert)
    ordered: list[int] = []
    waiting = children.get(None, [])[::-1]
    while waiting:
        ordered.append(waiting.pop())
        waiting += children.get(ordered[-1], [])
    return ordered


def _told(head: Any, loads: pd.DataFrame, surgeries: pd.DataFrame) -> str:
    """How many were born and removed, and how much the busiest takes in the end."""
    born = (surgeries["n_routed_after"] > surgeries["n_routed_before"]).sum()
    final = loads[loads["step"] == loads["step"].max()]["share"]
    return (
        f"{phase_label(head.phase)} {head.arm}: {born} born, {len(surgeries) - born} gone, {len(final)} in the end; "
        f"the busiest takes {number(100 * final.max(), 0)} % of the tokens"
    )


def _change(head: Any, rows: pd.DataFrame, control: pd.DataFrame, confidence: float) -> str:
    """Where the routing entropy ends, and whether that is apart from the control's."""
    ends = [part[part["step"] == part["step"].max()].set_index("seed")["routing_entropy"] for part in (rows, control)]
    pairs = ends[0].sub(ends[1]).round(9).dropna()
    if pairs.empty:
        return f"{phase_label(head.phase)} {head.arm}: {failed(head)}"
    _, lo, hi = mean_interval(pairs, confidence)
    verdict = "above" if lo > 0 else "below" if hi < 0 else "the same as" if lo == hi == 0 else "not apart from"
    return f"{phase_label(head.phase)} {head.arm}: ends at {number(ends[0].mean(), 3)}, {verdict} the control"
