"""Draw the figures of the verdicts: differences from the control, what each part of an arm does, and the searches."""

from collections import Counter
from itertools import accumulate
from math import nan
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phasegate.params import Params
from phasegate.report import drawing
from phasegate.report.drawing import DotStyle, Tables, dot_rows
from phasegate.verdicts import decisions as words
from phasegate.verdicts import wording
from phasegate.verdicts.attribution import ACCOUNTS, REMOVING, account_label, effect, harm
from phasegate.verdicts.decisions import decision_rows, key_of, of_arm
from phasegate.verdicts.wording import phase_label, rows_of

WORD_STYLES = {  # colour and marker: no meaning hangs on colour alone
    words.BETTER: (drawing.BLUE, "^"),
    words.WORSE: (drawing.VERMILION, "X"),
    words.EQUIVALENT: (drawing.GREEN, "o"),
    words.NO_WORSE: (drawing.SKY, "P"),
    words.UNDECIDED: (drawing.ORANGE, "D"),
    words.NOTHING_DONE: (drawing.BLACK, "d"),
    "": (drawing.GREY, "s"),  # 7a, and arms of which no trial finished
}
REFERENCE_STYLES = {
    "gate": DotStyle(drawing.GREY),
    "test": DotStyle(drawing.VERMILION, "s"),
    "published": DotStyle(drawing.BLACK, "D", fill="white"),
}


def differences(tables: Tables, params: Params) -> Figure:
    """Draw each arm's difference from its control (pp): seeds as dots, mean, interval, zero, and the margins."""
    decisions, trials = tables["decisions"], tables["trials"]
    rows = [row for row in decision_rows(decisions) if not row.is_control]
    gaps = [1.6 if before.phase != row.phase else 1.0 for before, row in zip([rows[0], *rows], rows, strict=False)]
    positions = list(accumulate(gaps))
    figure, (axes,) = drawing.new_figure(9, 1.2 + 0.21 * positions[-1])
    axes.axvline(0, color=drawing.GREY, linewidth=1)
    for y, row in zip(positions, rows, strict=True):
        edges: dict[str, Any] = {"color": drawing.BLACK, "linewidth": 1, "label": "margin" if row is rows[0] else None}
        axes.vlines([-row.margin_pp, row.margin_pp], y - 0.5, y + 0.5, **edges)
        pair = (row.phase, row.arm), key_of(row.control)
        own, other = (of_arm(trials, *key).set_index("seed")["accuracy"] for key in pair)
        seeds = (own - other).dropna()
        axes.plot(seeds, [y] * len(seeds), ".", color=drawing.GREY, markersize=4, alpha=0.6, zorder=1.5)
        style = DotStyle(*WORD_STYLES[row.word], row.primary, None if row.primary else "white")
        drawing.dot(axes, y, (row.delta_pp, row.delta_lo, row.delta_hi), style)
        said = ", ".join(filter(None, [wording.measure(row, "delta_pp", signed=True), wording.failed(row)]))
        short = ", ".join(filter(None, [row.verdict, row.word]))
        drawing.note(axes, y, f"{short}  {said}", size=8, weight="bold" if row.primary else "normal")
    axes.set_yticks(positions, [f"{phase_label(row.phase)}  {row.arm}" for row in rows], fontsize=8)
    drawing.embolden(axes, [row.primary for row in rows])
    axes.set_ylim(max(positions) + 0.8, min(positions) - 0.8)
    axes.set_xlabel("test accuracy minus that of its control, pp (dots: seeds; black: the margins)")
    counts = Counter(row.word for row in rows if row.word)
    parts = ", ".join(f"{counts[word]} {word}" for word in WORD_STYLES if counts[word])
    figure.suptitle(drawing.wrapped(f"Of {counts.total()} arms beside their controls: {parts}", 90), x=0.01, ha="left")
    return figure


def attribution(tables: Tables, params: Params) -> Figure:
    """Draw the effects of all parts (pp) with intervals, a panel per account and a row per part."""
    table, confidence = tables["attribution"], params.decisions.confidence
    accounts = {account: rows_of(table[table["account"] == account]) for account in ACCOUNTS}
    sizes = [len(rows) for rows in accounts.values()]
    figure, panels = drawing.new_figure(9, 2.2 + 0.34 * sum(sizes) + 0.5 * len(sizes), len(sizes), 1, sizes)
    for axes, (account, rows) in zip(panels, accounts.items(), strict=True):
        axes.axvline(0, color=drawing.GREY, linewidth=1)
        hues = [drawing.VERMILION if row.effect_pp < 0 else drawing.BLUE for row in rows]
        known = [row.p_holm < 1 - confidence for row in rows]
        styles = [DotStyle(hue) if sure else DotStyle(drawing.GREY, "s") for hue, sure in zip(hues, known, strict=True)]
        dot_rows(axes, rows, "effect_pp", styles)
        for y, row in enumerate(rows):
            drawing.note(axes, y, effect(row))
        drawing.name_rows(axes, [row.part for row in rows], "")
        axes.set_title(account_label(account))
    low, high = min(axes.get_xlim()[0] for axes in panels), max(axes.get_xlim()[1] for axes in panels)
    for axes in panels:
        axes.set_xlim(low, high)
    panels[-1].set_xlabel("effect on test accuracy, pp (circles: certain after Holm's correction)")
    both = [account for account, parts in ACCOUNTS.items() if REMOVING in parts]
    findings = [f"{account_label(account)}: {harm(table, account, confidence)}" for account in both]
    figure.suptitle("\n".join(findings), x=0.01, ha="left")
    return figure


def leaderboard(search: str, tables: Tables, params: Params) -> Figure:
    """Draw the candidates of a search by gate accuracy (percent), and below them the references on their own scale."""
    table = tables[f"leaderboard_{search}"]
    candidates, references = (rows_of(table[table["kind"] == kind]) for kind in ("search", "reference"))
    sizes = [len(group) for group in (candidates, references) if group]
    figure, panels = drawing.new_figure(9, 1.9 + 0.3 * sum(sizes) + 0.7 * (len(sizes) - 1), len(sizes), 1, sizes)
    best = next(row for row in candidates if row.chosen)
    styles = [DotStyle(drawing.BLUE if row.chosen else drawing.GREY, strong=row.chosen) for row in candidates]
    dot_rows(panels[0], candidates, "accuracy", styles)
    _name_candidates(panels[0], candidates, "gate accuracy, %")
    if references:
        axes = panels[1]
        axes.axvline(best.accuracy, color=drawing.BLUE, linewidth=1, linestyle="--", label=f"{best.candidate}, gate")
        for y, row in enumerate(references):
            drawing.dot(axes, y - 0.2, (row.accuracy, row.accuracy_lo, row.accuracy_hi), REFERENCE_STYLES["gate"])
            drawing.dot(axes, y, (row.test_accuracy, row.test_lo, row.test_hi), REFERENCE_STYLES["test"])
            drawing.dot(axes, y + 0.2, (row.published_accuracy, nan, nan), REFERENCE_STYLES["published"])
        _name_candidates(axes, references, "accuracy of the references, %")
        for label, (colour, marker, _, fill) in REFERENCE_STYLES.items():
            axes.plot([], [], marker, color=colour, markerfacecolor=fill or colour, label=label)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{search.upper()}: {_ranking(candidates, best)}", x=0.01, ha="left")
    return figure


def _name_candidates(axes: Axes, rows: list[Any], xlabel: str) -> None:
    """Name the rows after their candidates, with how many trials failed, the chosen candidate in bold."""
    names = [f"{row.candidate} ({wording.failed(row)})" if row.n_failed else row.candidate for row in rows]
    drawing.name_rows(axes, names, xlabel)
    drawing.embolden(axes, [row.chosen for row in rows])


def _ranking(candidates: list[Any], best: Any) -> str:
    """Return the chosen candidate with its accuracy and its distance to the best other candidate that finished."""
    text = f"{best.candidate} chosen at {wording.measure(best, 'accuracy', 1)} %"
    other = next((row for row in candidates if not row.chosen and not row.n_failed), None)
    if other is None:
        return text
    lead = best.accuracy - other.accuracy
    return f"{text}, {wording.number(abs(lead), 1)} pp {'ahead of' if lead >= 0 else 'behind'} {other.candidate}"
