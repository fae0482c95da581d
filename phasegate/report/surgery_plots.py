"""Draw the figures of the surgery study: what each kind of surgery does, and what becomes of the halves of a split."""

from math import isfinite, nan
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phasegate.params import Params
from phasegate.params.names import CONTROL
from phasegate.report import drawing
from phasegate.report.drawing import DotStyle, Tables, name_rows, new_figure, wrapped
from phasegate.verdicts import surgery_summary
from phasegate.verdicts.decisions import of_arm
from phasegate.verdicts.surgery_summary import OPERATIONS, STUDY, study_rows
from phasegate.verdicts.wording import control_row, rows_of

NOTHING = 1e-10  # where a relative change of zero is drawn on a logarithmic axis
PALETTE = [drawing.GREY, drawing.BLUE, drawing.VERMILION, drawing.ORANGE, drawing.BLACK, drawing.GREEN]
COLOURS = dict(zip(OPERATIONS, PALETTE, strict=True))


def surgery(tables: Tables, params: Params) -> Figure:
    """Draw four measures of each kind of surgery, a row per arm. Pale marks are single surgeries."""
    summary, surgeries = tables["surgery_summary"], tables["surgeries"]
    rows = rows_of(study_rows(summary))
    if len(rows) < 2:
        figure, _ = new_figure(13, 1, 0)
        figure.suptitle("The surgery study has no surgeries to show", x=0.01, ha="left")
        return figure
    figure, (first, second, third, fourth) = new_figure(13, 2 + 0.34 * len(rows), 4, 4)
    styles = [DotStyle(COLOURS[row.operation]) for row in rows]
    for y, (row, style) in enumerate(zip(rows, styles, strict=True)):
        done = of_arm(surgeries, STUDY, row.arm)
        done = done[done["operation"] == row.operation]["output_change"].clip(lower=NOTHING)
        first.plot(done, [y] * len(done), "|", color=style.colour, alpha=0.35)
        drawing.dot(first, y, (max(row.output_change, NOTHING), nan, nan), style)
        drawing.dot(third, y, (row.recovery_steps, nan, nan), style)
        if row.operation != "none":
            drawing.note(third, y, surgery_summary.percent(row.recovered), 1, 8)
    for axes, column in ((second, "accuracy_lost"), (fourth, "delta_pp")):
        drawing.dot_rows(axes, rows, column, styles)
    first.set(xscale="log", xlim=(NOTHING / 3, 2))
    first.set_xticks([NOTHING, 1e-6, 1e-3, 1], ["0", "10⁻⁶", "10⁻³", "1"])
    longest = max([row.recovery_steps for row in rows if isfinite(row.recovery_steps)], default=0) or 1
    third.set_xlim(-0.05 * longest, 1.05 * longest)
    third.locator_params(axis="x", integer=True)
    fourth.axvline(-control_row(tables["decisions"]).margin_pp, color=drawing.BLACK, linewidth=1, linestyle="--")
    blank = [""] * len(rows)
    name_rows(first, [_name(row, summary) for row in rows], "immediate output\nchange (relative)")
    name_rows(second, blank, "immediate loss of\ngate accuracy, pp")
    name_rows(third, blank, "steps until it is back\n(median; right: share that is)")
    name_rows(fourth, blank, f"final test accuracy minus\n{CONTROL}, pp (dashed: margin)")
    for axes in (second, fourth):
        axes.axvline(0, color=drawing.GREY, linewidth=1)
    figure.suptitle(wrapped(surgery_summary.short_finding(summary), 130), x=0.01, ha="left")
    return figure


def halves(tables: Tables, params: Params) -> Figure:
    """Draw what remains of the function after many operations in a row, and how the halves of a split develop."""
    in_a_row, pairs, summary = tables["in_a_row"], tables["split_halves"], tables["surgery_summary"]
    figure, (first, second, third) = new_figure(13, 4.2, 3, 3)
    _draw_changes(first, in_a_row)
    main = of_arm(pairs, STUDY, "split")
    ages = params.p7b.steps - main["step"]
    second.plot(ages, 100 * main["output_distance"], "o", color=drawing.BLUE, markersize=3, alpha=0.4)
    means = main.groupby(ages)["output_distance"].mean()
    second.plot([0, *means.index], [0, *100 * means], color=drawing.BLUE)  # the halves are equal at birth
    second.set(xlabel="steps from the split to the end of the phase", ylabel="distance of the halves' outputs, %")
    second.set(xlim=(0, None), ylim=(0, None))
    arms = list(study_rows(summary).query("operation == 'split'")["arm"])
    for y, arm in enumerate(arms):
        shares = 100 * of_arm(pairs, STUDY, arm)["smaller_share"]
        third.plot(shares, [y] * len(shares), "|", color=drawing.BLUE)
    third.axvline(100 * surgery_summary.BALANCED, color=drawing.BLACK, linewidth=1, linestyle="--")
    third.set_xlim(0, 50)
    name_rows(third, arms, "tokens of the smaller half, %\nof those of both")
    figure.suptitle(wrapped(surgery_summary.halves_finding(in_a_row, summary), 130), x=0.01, ha="left")
    return figure


def _draw_changes(axes: Axes, in_a_row: pd.DataFrame) -> None:
    """Draw how far the output has changed after each operation in a row, a line per seed."""
    for operation, rows in in_a_row.groupby("operation", sort=False):
        colour = COLOURS[str(operation)]
        for _, run in rows.groupby("seed"):
            axes.plot(run["done"], run["output_change"].clip(lower=NOTHING), color=colour, linewidth=0.8, alpha=0.5)
        axes.plot([], [], color=colour, label=operation)
    axes.set(yscale="log", ylabel="output change since the first (relative)")
    axes.set_xlabel("operations in a row, without training")
    axes.set_yticks([NOTHING, 1e-8, 1e-6, 1e-4, 1e-2, 1], ["0", "10⁻⁸", "10⁻⁶", "10⁻⁴", "10⁻²", "1"])
    axes.minorticks_off()
    axes.legend()


def _name(row: Any, summary: pd.DataFrame) -> str:
    """Return what an arm did, with how often: `4 splits, 4 x merge`."""
    if row.operation == "none":
        return "no surgery"
    name = f"{row.surgeries / row.n_seeds:g} \N{MULTIPLICATION SIGN} {row.arm}"
    splits = of_arm(summary, STUDY, row.arm).query("operation == 'split'")["surgeries"]
    if row.operation == "split" or splits.empty:
        return name
    return f"{splits.iloc[0] / row.n_seeds:g} splits, {name}"
