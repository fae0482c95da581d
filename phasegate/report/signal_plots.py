"""Draw the figures of the signals: how well each predicts and tells the dead, and what it costs to follow it."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phasegate.params import Params
from phasegate.report import drawing
from phasegate.report.drawing import DotStyle, Tables, name_rows
from phasegate.verdicts import signal_summary
from phasegate.verdicts.signal_summary import CHANCE, CORRELATIONS, GONE
from phasegate.verdicts.wording import rows_of

BETTER, OTHER = DotStyle(drawing.BLUE), DotStyle(drawing.GREY, "D")  # signals that beat chance, and all others


def signals(tables: Tables, params: Params) -> Figure:
    """Draw how every signal ranks experts: by what a removal, early and late, and a split do, and dead below living."""
    summary, confidence = tables["signal_summary"], params.decisions.confidence
    figure, (*panels, last) = _draw_panels(summary, list(CHANCE), list(CHANCE.values()), confidence)
    for axes, what in zip(panels, CORRELATIONS.values(), strict=True):
        axes.set(xlim=(-1, 1), xticks=[-1, -0.5, 0, 0.5, 1], xlabel=f"rank correlation with what\n{what}")
    last.set(
        xlim=(-0.03, 1.03), xticks=[0, 0.5, 1], xlabel="area under the ROC curve:\nkilled experts told from living ones"
    )
    figure.suptitle(drawing.wrapped(signal_summary.correlation_finding(summary, confidence), 130), x=0.01, ha="left")
    return figure


def regret(tables: Tables, params: Params) -> Figure:
    """Draw what it costs (nats), beyond the best choice, to let a signal choose one, two and four experts to remove."""
    summary, confidence = tables["signal_summary"], params.decisions.confidence
    chance = [summary[f"chance_{gone}"].mean() for gone in GONE]
    figure, panels = _draw_panels(summary, [f"regret_{gone}" for gone in GONE], chance, confidence)
    for axes, gone in zip(panels, GONE, strict=True):
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        axes.set_xlabel(f"regret when {gone} expert{'s are' if gone > 1 else ' is'} removed, nats\n(dashed: chance)")
    figure.suptitle(drawing.wrapped(signal_summary.regret_title(summary, confidence), 130), x=0.01, ha="left")
    return figure


def _draw_panels(
    summary: pd.DataFrame, columns: list[str], lines: list[float], confidence: float
) -> tuple[Figure, list[Axes]]:
    """Draw a panel per column, in which every signal has a row, with a dashed line at the value in `lines`."""
    rows = rows_of(summary)
    figure, panels = drawing.new_figure(13, 2.2 + 0.32 * len(rows), len(columns), len(columns))
    for axes, column, line in zip(panels, columns, lines, strict=True):
        axes.axvline(line, color=drawing.BLACK, linewidth=1, linestyle="--")
        styles = [BETTER if signal_summary.beats_chance(row, column, confidence) else OTHER for row in rows]
        drawing.dot_rows(axes, rows, column, styles)
        name_rows(axes, [signal_summary.words(row.signal) if axes is panels[0] else "" for row in rows], "")
    for style, label in ((BETTER, "better than chance (Holm)"), (OTHER, "not shown to be")):
        panels[0].plot([], [], style.marker, color=style.colour, label=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8)
    return figure, panels
