"""The figure of the attribution: a panel per account, a row per part. The title is made from the data."""

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from phasegate.attribution import ACCOUNTS, WHOLE
from phasegate.report.attribution_tables import account_finding, account_label, effect
from phasegate.report.drawing import BLACK, BLUE, GREY, STYLE, VERMILION, dot, name_rows, new_figure, wrapped
from phasegate.report.tables import rows_of


@mpl.rc_context(STYLE)
def attribution(table: pd.DataFrame, confidence: float) -> Figure:
    """Effects of all parts (pp) with intervals; what is certain after Holm's correction is filled and coloured."""
    accounts = {account: rows_of(table[table["account"] == account]) for account in ACCOUNTS}
    sizes = [len(rows) for rows in accounts.values()]
    figure, panels = new_figure(9, 2.2 + 0.34 * sum(sizes) + 0.5 * len(sizes), len(sizes), 1, sizes)
    for axes, (account, rows) in zip(panels, accounts.items(), strict=True):
        axes.axvline(0, color=GREY, linewidth=1)
        for y, row in enumerate(rows):
            whole = row.part == WHOLE
            certain = not whole and row.p_holm < 1 - confidence
            colour = BLACK if whole else GREY if not certain else VERMILION if row.effect_pp < 0 else BLUE
            marker = "D" if whole else "o" if certain else "s"
            dot(axes, y, (row.effect_pp, row.effect_lo, row.effect_hi), colour, marker, strong=whole)
            axes.annotate(effect(row), (1.01, y), xycoords=("axes fraction", "data"), va="center", size=9)
        name_rows(axes, [row.part for row in rows], "")
        axes.set_title(account_label(account))
    low, high = min(axes.get_xlim()[0] for axes in panels), max(axes.get_xlim()[1] for axes in panels)
    for axes in panels:
        axes.set_xlim(low, high)
    panels[-1].set_xlabel("effect on test accuracy, pp (circles: certain after Holm's correction; diamonds: the sum)")
    findings = [wrapped(account_finding(table, account, confidence), 100) for account in ACCOUNTS]
    figure.suptitle("\n".join(findings), x=0.01, ha="left")
    return figure
