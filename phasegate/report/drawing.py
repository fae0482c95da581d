"""Provide what all figures share. Figures never touch pyplot's global state; the same data gives the same bytes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from math import ceil, isfinite
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.style import context

from phasegate.base.files import write_atomic
from phasegate.verdicts.statistics import column_names, mean_interval

Tables = Mapping[str, pd.DataFrame]  # the tables of `reports/tables/`, by name

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"  # Okabe and Ito's colours
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#767676"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "path",  # the same look in every browser, whatever fonts it has
    "svg.hashsalt": "phasegate",
}
styled = context(["default", STYLE])
"""Decorate what draws: whatever style the user has set, only this one counts, with the fonts of matplotlib."""


class DotStyle(NamedTuple):
    """Say how a dot looks."""

    colour: str
    marker: str = "o"
    strong: bool = False
    fill: str | None = None  # if it is not the colour


@styled
def save(figure: Figure, path: Path) -> None:
    """Write the figure as `path`.svg and `path`.png, laid out once, without dates and versions."""
    svg, png = BytesIO(), BytesIO()
    ConstrainedLayoutEngine().execute(figure)  # set for the figure, it would do so for each file
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", metadata={"Software": None}, dpi=110)
    write_atomic(path.with_suffix(".svg"), svg.getvalue())
    write_atomic(path.with_suffix(".png"), png.getvalue())


def new_figure(
    width: float, height: float, panels: int = 1, columns: int = 1, heights: list[int] | None = None
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `width` by `height` inches with a grid of panels. Without panels it is just a title."""
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(max(1, ceil(panels / columns)), columns, height_ratios=heights)
    return figure, [figure.add_subplot(grid[index // columns, index % columns]) for index in range(panels)]


def wrapped(title: str, width: int = 58) -> str:
    """Return a title on lines of at most `width` characters, never broken inside an interval."""
    return fill(unbroken(title), width)


def unbroken(text: str) -> str:
    """Return a text in which no line breaks inside an interval, or before a unit."""
    return re.sub(r"\[.*?\]| (?:pp|%)", lambda match: match[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


def dot(axes: Axes, y: float, value: Sequence[float], style: DotStyle) -> None:
    """Draw a mean with its interval, (mean, lo, hi). Without an interval draw just the mean; leave out blanks."""
    (mean, lo, hi), (colour, marker, strong, fill) = value, style
    if isfinite(lo) and isfinite(hi):
        axes.hlines(y, lo, hi, color=colour, linewidth=2.5 if strong else 1.3)
    if isfinite(mean):
        axes.plot(mean, y, marker, color=colour, markerfacecolor=fill or colour, markersize=9 if strong else 6)


def dot_rows(axes: Axes, rows: Iterable[Any], column: str, styles: Iterable[DotStyle]) -> None:
    """Draw a column of a table with its bounds, a dot for each row, first on top."""
    for y, (row, style) in enumerate(zip(rows, styles, strict=True)):
        dot(axes, y, [getattr(row, name) for name in column_names(column)], style)


def name_rows(axes: Axes, names: Sequence[str], xlabel: str) -> None:
    """Turn the vertical axis into a list of names, first on top, with a line for each."""
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=xlabel)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)


def embolden(axes: Axes, bold: Iterable[bool]) -> None:
    """Set the names of some rows in bold."""
    for label, strong in zip(axes.get_yticklabels(), bold, strict=True):
        label.set_fontweight("bold" if strong else "normal")


def note(axes: Axes, y: float, text: str, x: float = 1.01, size: int = 9, weight: str = "normal") -> None:
    """Write a text beside a row, at `x` as a share of the width of the panel."""
    axes.annotate(text, (x, y), xycoords=("axes fraction", "data"), va="center", size=size, weight=weight)


def band(
    axes: Axes, rows: pd.DataFrame, column: str, style: tuple[str, Any], confidence: float, label: str, width: float
) -> None:
    """Draw the mean of one arm over seeds by step, its interval as a band. Leave out steps at which a seed is blank."""
    points = rows.dropna(subset=column).groupby("step")[column]
    if not len(points):
        return
    colour, dash = style
    steps, values = zip(*points, strict=True)
    means, lows, highs = np.array([mean_interval(value, confidence) for value in values]).T
    axes.plot(steps, means, color=colour, linestyle=dash, linewidth=width, label=label)
    known = np.isfinite(lows)
    axes.fill_between(np.array(steps)[known], lows[known], highs[known], color=colour, alpha=0.15, linewidth=0)
