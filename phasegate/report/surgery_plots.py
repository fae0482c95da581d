"""The figures of the surgery study: what each kind of surgery does, at once and in the end, and what halves become.

Titles are findings made from the data.
"""

from math import isfinite
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from phasegate.decisions import CONTROL
from phasegate.report.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    STYLE,
    VERMILION,
    dot,
    name_rows,
    new_figure,
    wrapped,
)
from phasegate.report.surgery_tables import STUDY, change, percent, short_finding
from phasegate.report.tables import of_arm, rows_of
from phasegate.surgery_summary import BALANCED

NOTHING = 1e-10  # where a relative change of zero is drawn on a logarithmic axis
COLOURS = {  # in the order of the rows
    **{"none": GREY, "split": BLUE, "clone": VERMILION, "reinit": ORANGE},
    **{"remove": BLACK, "merge": GREEN},
}


def study_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows to draw: the control; growth; pruning, without the splits that came before it."""
    study = summary[summary["phase"] == STUDY]
    pruned = study[study["operation"].isin(["remove", "merge"])]
    grown = study[~study["arm"].isin(pruned["arm"])]
    rows = pd.concat([summary[summary["operation"] == "none"], grown, pruned], ignore_index=True)
    return rows.sort_values("operation", key=lambda names: names.map(list(COLOURS).index), kind="stable")


@mpl.rc_context(STYLE)
def surgery(summary: pd.DataFrame, surgeries: pd.DataFrame, margin_pp: float) -> Figure:
    """Four measures of each kind of surgery, a row per arm: at once, and at the end of the phase.

    Every single surgery is a pale mark in the first panel; dots are means (recovery: the median), with intervals.
    """
    rows = rows_of(study_rows(summary))
    if len(rows) < 2:
        figure, _ = new_figure(13, 1, 0)
        figure.suptitle("The surgery study has no surgeries to show", x=0.01, ha="left")
        return figure
    figure, (first, second, third, fourth) = new_figure(13, 2 + 0.34 * len(rows), 4, 4)
    for y, row in enumerate(rows):
        colour = COLOURS[row.operation]
        done = of_arm(surgeries, STUDY, row.arm)
        done = done[done["operation"] == row.operation]
        first.plot(done["output_change"].clip(lower=NOTHING), [y] * len(done), "|", color=colour, alpha=0.35)
        dot(first, y, (max(row.output_change, NOTHING), *[float("nan")] * 2), colour, "o")
        dot(second, y, (row.accuracy_lost, row.accuracy_lost_lo, row.accuracy_lost_hi), colour, "o")
        if isfinite(row.recovery_steps):
            third.plot(row.recovery_steps, y, "o", color=colour)
        if row.operation != "none":
            third.annotate(percent(row.recovered), (1, y), xycoords=("axes fraction", "data"), va="center", size=8)
        dot(fourth, y, (row.delta_pp, row.delta_lo, row.delta_hi), colour, "o")
    first.set_xscale("log")
    first.set_xlim(NOTHING / 3, 2)
    first.set_xticks([NOTHING, 1e-6, 1e-3, 1], ["0", "10⁻⁶", "10⁻³", "1"])
    longest = max([row.recovery_steps for row in rows if isfinite(row.recovery_steps)], default=0) or 1
    third.set_xlim(-0.05 * longest, 1.05 * longest)
    third.locator_params(axis="x", integer=True)
    fourth.axvline(-margin_pp, color=BLACK, linewidth=1, linestyle="--")
    blank = [""] * len(rows)
    name_rows(first, [_name(row, summary) for row in rows], "output change at once\n(relative)")
    name_rows(second, blank, "gate accuracy lost\nat once, pp")
    name_rows(third, blank, "steps until it is back\n(median; right: share that is)")
    name_rows(fourth, blank, f"final test accuracy minus\n{CONTROL}, pp (dashed: margin)")
    for axes in (second, fourth):
        axes.axvline(0, color=GREY, linewidth=1)
    figure.suptitle(wrapped(short_finding(summary), 130), x=0.01, ha="left")
    return figure


@mpl.rc_context(STYLE)
def halves(preservation: pd.DataFrame, pairs: pd.DataFrame, summary: pd.DataFrame, steps: int) -> Figure:
    """What is left of the function after many operations in a row, and how the halves of a split come to differ.

    Args:
        pairs: `halves.csv`, one row per split whose halves are both still there.
        steps: of the phase, from which a split's age follows.
    """
    pairs = pairs[pairs["phase"] == STUDY]
    figure, (first, second, third) = new_figure(13, 4.2, 3, 3)
    for operation, rows in preservation.groupby("operation", sort=False):
        colour = COLOURS[str(operation)]
        for _, run in rows.groupby("seed"):
            first.plot(run["done"], run["output_change"].clip(lower=NOTHING), color=colour, linewidth=0.8, alpha=0.5)
        first.plot([], [], color=colour, label=operation)
    first.set_yscale("log")
    first.set_yticks([NOTHING, 1e-8, 1e-6, 1e-4, 1e-2, 1], ["0", "10⁻⁸", "10⁻⁶", "10⁻⁴", "10⁻²", "1"])
    first.minorticks_off()
    first.set(xlabel="operations in a row, without training", ylabel="output change since the first (relative)")
    first.legend()
    main = pairs[pairs["arm"] == "split"]
    second.plot(steps - main["step"], 100 * main["output_distance"], "o", color=BLUE, markersize=3, alpha=0.4)
    means = main.groupby("step")["output_distance"].mean()
    second.plot([0, *(steps - means.index)[::-1]], [0, *100 * means[::-1]], color=BLUE)  # equal at birth
    second.set(
        xlabel="steps from the split to the end of the phase",
        ylabel="distance of the halves' outputs, %",
        xlim=(0, None),
        ylim=(0, None),
    )
    arms = list(dict.fromkeys(study_rows(summary).query("operation == 'split'")["arm"]))
    for y, arm in enumerate(arms):
        shares = 100 * pairs[pairs["arm"] == arm]["smaller_share"]
        third.plot(shares, [y] * len(shares), "|", color=BLUE)
    third.axvline(100 * BALANCED, color=BLACK, linewidth=1, linestyle="--")
    third.set_xlim(0, 50)
    name_rows(third, arms, "tokens of the smaller half, %\nof those of both")
    figure.suptitle(wrapped(_halves_finding(preservation, summary), 130), x=0.01, ha="left")
    return figure


def _halves_finding(preservation: pd.DataFrame, summary: pd.DataFrame) -> str:
    """What the figure shows, made from the data."""
    count = preservation["done"].max()
    worst = preservation[preservation["done"] == count].groupby("operation")["output_change"].max()
    text = (
        f"After {count} splits in a row the output has changed by {change(worst['split'])} at most, after {count} "
        f"clones by {change(worst['clone'])}"
    )
    for row in rows_of(summary[(summary["phase"] == STUDY) & (summary["arm"] == "split")]):
        text += (
            f"; the halves of a split come to differ by {percent(row.output_distance)} in their outputs, and "
            f"{percent(row.balanced)} of the pairs keep a quarter of their tokens on each side"
        )
    return text


def _name(row: Any, summary: pd.DataFrame) -> str:
    """What an arm did, with how often: `4 splits, 4 x merge`."""
    if row.operation == "none":
        return "no surgery"
    name = f"{row.surgeries / row.n_seeds:g} \N{MULTIPLICATION SIGN} {row.arm}"
    before = summary[(summary["phase"] == STUDY) & (summary["arm"] == row.arm) & (summary["operation"] == "split")]
    if row.operation == "split" or before.empty:
        return name
    return f"{before['surgeries'].iloc[0] / row.n_seeds:g} splits, {name}"
