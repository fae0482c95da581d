"""The figures of the signals: how well each tells what surgery will do, and what it costs to go by it.

Titles are findings made from the data.
"""

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phasegate.errors import UserError
from phasegate.report.drawing import BLACK, BLUE, GREY, STYLE, dot, name_rows, new_figure, wrapped
from phasegate.report.signal_tables import KINDS, correlation_finding, regret_title, words
from phasegate.report.tables import number, rows_of
from phasegate.signal_summary import GONE, beats_chance

BETTER, CHANCE = (BLUE, "o"), (GREY, "D")  # colour and marker of a signal that beats chance, and of one that doesn't


@mpl.rc_context(STYLE)
def signals(summary: pd.DataFrame, confidence: float) -> Figure:
    """Rank correlation of every signal with the measured changes by a removal, at once and later, and by a split."""
    figure, panels = _panels(summary, len(KINDS))
    for axes, (name, what) in zip(panels, KINDS.items(), strict=True):
        axes.axvline(0, color=BLACK, linewidth=1, linestyle="--")
        _dots(axes, summary, name, confidence)
        axes.set_xlim(-1, 1)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.set_xlabel(f"rank correlation with what\n{what}")
    return _titled(figure, panels[0], correlation_finding(summary, confidence))


@mpl.rc_context(STYLE)
def regret(summary: pd.DataFrame, confidence: float) -> Figure:
    """What it costs (nats) beyond the best choice to let a signal choose one, two and four experts that go."""
    figure, panels = _panels(summary, len(GONE))
    for axes, gone in zip(panels, GONE, strict=True):
        axes.axvline(summary[f"chance_{gone}"].mean(), color=BLACK, linewidth=1, linestyle="--")
        _dots(axes, summary, f"regret_{gone}", confidence)
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        axes.set_xlabel(f"regret when {gone} expert{'s go' if gone > 1 else ' goes'}, nats\n(dashed: chance)")
    for y, row in enumerate(rows_of(summary)):
        text = f"{number(row.seconds, 3 if row.seconds < 1 else 0)} s"
        panels[-1].annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center", size=8)
    panels[-1].annotate("cost", (1.02, 1.01), xycoords="axes fraction", va="bottom", size=8)
    return _titled(figure, panels[0], regret_title(summary, confidence))


def _panels(summary: pd.DataFrame, count: int) -> tuple[Figure, list[Axes]]:
    """Panels that share a list of signals."""
    if summary.empty:
        raise UserError("the summary of the signals has no signal: there is nothing to plot")
    figure, panels = new_figure(13, 2.2 + 0.32 * len(summary), count, count)
    for axes in panels:
        name_rows(axes, [words(row.signal) if axes is panels[0] else "" for row in rows_of(summary)], "")
    return figure, panels


def _dots(axes: Axes, summary: pd.DataFrame, name: str, confidence: float) -> None:
    """One measure of every signal that has it, with intervals over seeds."""
    for y, row in enumerate(rows_of(summary)):
        colour, marker = BETTER if beats_chance(row, name, confidence) else CHANCE
        dot(axes, y, (getattr(row, name), getattr(row, f"{name}_lo"), getattr(row, f"{name}_hi")), colour, marker)


def _titled(figure: Figure, axes: Axes, title: str) -> Figure:
    """Add the finding, and the key to the markers."""
    for (colour, marker), label in ((BETTER, "better than chance (Holm)"), (CHANCE, "not shown to be")):
        axes.plot([], [], marker, color=colour, label=label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8)
    figure.suptitle(wrapped(title, 130), x=0.01, ha="left")
    return figure
