"""What all figures share: colours, style, how a figure is made and written, and the dot with its interval.

Colours are Okabe and Ito's. Figures never touch pyplot's global state, and the same data gives the same bytes.
"""

import re
from io import BytesIO, StringIO
from math import ceil, isfinite
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phasegate.files import write_atomic
from phasegate.statistics import mean_interval

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"),
)
GREY = "#767676"
DPI = 110  # of the PNGs
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "path",  # the same look in every browser, whatever fonts it has
    "svg.hashsalt": "phasegate",
}


@mpl.rc_context(STYLE)
def svg(figure: Figure) -> str:
    """The figure as SVG text, free of dates and versions: equal figures give equal text."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


@mpl.rc_context(STYLE)
def png(figure: Figure) -> bytes:
    """The figure as PNG, free of versions."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as `path`.svg and `path`.png."""
    write_atomic(path.with_suffix(".svg"), svg(figure))
    write_atomic(path.with_suffix(".png"), png(figure))


def new_figure(
    width: float, height: float, panels: int = 1, columns: int = 1, heights: list[int] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` by `height` inches with its first `panels` cells filled; with none it is just a title."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.add_gridspec(max(1, ceil(panels / columns)), columns, height_ratios=heights)
    return figure, [figure.add_subplot(grid[index // columns, index % columns]) for index in range(panels)]


def wrapped(title: str, width: int = 58) -> str:
    """A title on lines of at most `width` characters, never broken inside an interval."""
    whole = re.sub(r"\[.*?\]", lambda match: match[0].replace(" ", "\N{NO-BREAK SPACE}"), title)
    return fill(whole, width)


def dot(
    axes: Axes, y: float, value: tuple[float, float, float], colour: str, marker: str, strong: bool = False
) -> None:
    """A mean with its interval, (mean, lo, hi); without an interval just the mean; blanks aren't drawn."""
    mean, lo, hi = value
    if isfinite(lo) and isfinite(hi):
        axes.hlines(y, lo, hi, color=colour, linewidth=2.5 if strong else 1.3)
    if isfinite(mean):
        axes.plot(mean, y, marker, color=colour, markersize=9 if strong else 6)


def band(
    axes: Axes,
    rows: pd.DataFrame,
    column: str,
    colour: str,
    dash: Any,
    confidence: float,
    label: str,
    width: float = 1.3,
) -> None:
    """One arm's mean over seeds by step, with its interval as a band; steps at which a seed is blank are left out."""
    points = rows.dropna(subset=column).groupby("step")[column]
    if not len(points):
        return
    steps, values = zip(*points, strict=True)
    means, lows, highs = np.array([mean_interval(value, confidence) for value in values]).T
    axes.plot(steps, means, color=colour, linestyle=dash, linewidth=width, label=label)
    known = np.isfinite(lows)
    axes.fill_between(np.array(steps)[known], lows[known], highs[known], color=colour, alpha=0.15, linewidth=0)


def name_rows(axes: Axes, names: list[str], xlabel: str) -> None:
    """Turn the vertical axis into a list of names, first on top, with a line for each."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)
