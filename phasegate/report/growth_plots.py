"""Draw what growing is worth: by the step of growth, for each way to grow, between few experts and many."""

from functools import partial
from itertools import groupby
from math import isfinite
from operator import attrgetter

import numpy as np
from matplotlib.figure import Figure

from phasegate.params import Params
from phasegate.report import drawing
from phasegate.report.drawing import Tables
from phasegate.report.story import share
from phasegate.verdicts.decisions import Decision, decision_rows
from phasegate.verdicts.growth import LARGE, PHASE
from phasegate.verdicts.wording import rows_of

STYLES = {  # colour and marker by the way to grow
    "birth": (drawing.BLUE, "o"),
    "handover": (drawing.VERMILION, "s"),
    "upcycle": (drawing.GREEN, "^"),
    "upcycle_carried": (drawing.SKY, "v"),
    "reinit": (drawing.ORANGE, "P"),
    "split": (drawing.PURPLE, "D"),
}
APART = 0.012  # share of all steps between marks at the same step


def gap(tables: Tables, params: Params) -> Figure:
    """Draw each arm of 7c.1 above the model that stays small (pp), at its step of growth, below the band of `large`."""
    decisions = {row.arm: row for row in decision_rows(tables["decisions"]) if row.phase == PHASE}
    grown = [row for row in rows_of(tables["growth"]) if isfinite(row.step) and decisions[row.arm].n_seeds]
    figure, (axes,) = drawing.new_figure(6.6, 4.8)
    axes.axhline(0, color=drawing.BLACK, linewidth=1)
    axes.text(0.005, 0, "small", transform=axes.get_yaxis_transform(), va="bottom", size=9)
    large = decisions[LARGE]
    if isfinite(large.delta_pp):
        axes.axhline(large.delta_pp, color=drawing.GREY, linewidth=1.3)
        if isfinite(large.delta_lo):
            axes.axhspan(large.delta_lo, large.delta_hi, color=drawing.GREY, alpha=0.2, linewidth=0)
        axes.text(
            0.005, large.delta_pp, "large from the start", transform=axes.get_yaxis_transform(), va="bottom", size=9
        )
    lines: dict[str, list[tuple[float, float]]] = {}
    grown.sort(key=lambda row: (row.step, not decisions[row.arm].primary))
    for step, rows in groupby(grown, attrgetter("step")):
        known = set[str]()
        for place, row in enumerate(rows):
            x = step + APART * params.p7c.steps * ((place + 1) // 2) * (-1) ** place
            arm, (colour, marker) = decisions[row.arm], STYLES.get(row.operator, (drawing.BLACK, "h"))
            if isfinite(arm.delta_lo):
                axes.vlines(x, arm.delta_lo, arm.delta_hi, color=colour, linewidth=2 if arm.primary else 1.3)
            fill, label = ("white", row.arm) if row.operator in known else (colour, row.operator)
            label = label if label not in axes.get_legend_handles_labels()[1] else None
            axes.plot(x, arm.delta_pp, marker, color=colour, markerfacecolor=fill, markersize=8, label=label)
            if row.operator not in known:
                lines.setdefault(row.operator, []).append((x, arm.delta_pp))
            known.add(row.operator)
    for way, points in lines.items():
        axes.plot(*zip(*points, strict=True), color=STYLES.get(way, (drawing.BLACK, "h"))[0])
    furthest = max([row.step for row in grown], default=params.p7c.steps / 2)
    axes.set(xlim=(0, 1.2 * furthest), ylabel="test accuracy above the small model's, pp")
    axes.set_xlabel(f"step of growth, of {params.p7c.steps:,} (marks close together: the same step)")
    if large.delta_lo > 0:
        scales = partial(np.multiply, 100 / large.delta_pp), partial(np.multiply, large.delta_pp / 100)
        closed = axes.secondary_yaxis("right", functions=scales)
        closed.set_ylabel("gap closed, %")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(drawing.wrapped(_title(decisions, tables), 78), x=0.01, ha="left")
    return figure


def _title(decisions: dict[str, Decision], tables: Tables) -> str:
    """Return what shares of the gap the primary arm and the best one at its step close, or that there is no gap."""
    rows = rows_of(tables["growth"])
    own = next(row for row in rows if decisions[row.arm].primary)
    if not decisions[LARGE].delta_lo > 0:
        return "7c.1: many experts from the start are not certainly ahead of few, so there is no gap to close"
    closed = share(own, "gap_closed")
    text = f"7c.1: {own.arm} closes {closed or 'no known part'} of the gap between few experts and many"
    there = [row for row in rows if row.step == own.step and isfinite(row.gap_closed)]
    best = max(there, key=attrgetter("gap_closed"), default=own)
    return text if best.arm == own.arm else f"{text}; {best.arm} at the same step {share(best, 'gap_closed')}"
