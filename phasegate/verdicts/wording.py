"""Write numbers as text: intervals, findings, and the tables of `reports/decisions.md` and the page.

A finding is always made from the row that it describes, so no sentence or title can contradict the table.
"""

import re
from collections.abc import Mapping, Sequence
from math import isfinite, sqrt
from typing import Any

import pandas as pd

from phasegate.params.names import CONTINUED, START
from phasegate.params.phases import Decisions, Stated
from phasegate.records.tables import COSTS
from phasegate.verdicts import decisions as words
from phasegate.verdicts.decisions import Decision, decision_rows, key_of, of_arm
from phasegate.verdicts.statistics import column_names, half_width, mean_interval

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
PREPOSITIONS = {words.EQUIVALENT: "to", words.UNDECIDED: "against"}  # after these words; after others: than
CONTROLS = {  # what people call the controls of the study, and what they are
    CONTINUED: "the same 7a checkpoints, without control head or surgery",
    "p7c1/small": "the few experts of the start",
    "p7c2/stay": "the few experts of the start while classes arrive",
    "p7c3/leave": "7a checkpoints of which some experts were killed, and left",
}
Cells = list[dict[str, str]]
"""A table as people read it: one dict of column title and text per row."""


def phase_label(phase: str) -> str:
    """Return the name that people use for a phase: `p7b1` is 7b.1, `p7a` is 7a; other names stay."""
    if not phase.startswith("p7"):
        return phase
    return f"{phase[1:3]}.{phase[3:]}" if phase[3:] else phase[1:]


def number(value: float, digits: int = 2, signed: bool = False) -> str:
    """Return a number with a real minus sign and thousands separators; blank for a blank."""
    if pd.isna(value):
        return ""
    text = f"{float(value):{'+' if signed else ''},.{digits}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("+-")


def interval(mean: float, lo: float, hi: float, digits: int = 2, signed: bool = False, unit: str = "") -> str:
    """Return `−0.42 [−0.91, +0.07]`, with a unit after the mean if given, or "no interval" of a single seed."""
    if pd.isna(mean):
        return ""
    known = isfinite(lo) and isfinite(hi)
    bounds = f"{number(lo, digits, signed)}, {number(hi, digits, signed)}" if known else "no interval"
    return f"{number(mean, digits, signed)}{f' {unit}' if unit else ''} [{bounds}]"


def measure(row: Any, name: str, digits: int = 2, signed: bool = False, unit: str = "") -> str:
    """Return a measure of a row with its interval, from the columns of `statistics.column_names`."""
    mean, lo, hi = (getattr(row, column) for column in column_names(name))
    return interval(mean, lo, hi, digits, signed, unit)


def p_text(p: float) -> str:
    """Return a p-value with three decimals, `< 0.001` below them, blank for a blank."""
    return "" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def failed(row: Any) -> str:
    """Return `1 of 10 trials failed`, for a row of the decisions or of a leaderboard; blank if none did."""
    if not row.n_failed:
        return ""
    if row.n_seeds:
        return f"{row.n_failed} of {row.n_seeds + row.n_failed} trials failed"
    return f"all {row.n_failed} trials failed" if row.n_failed > 1 else "the one trial failed"


def failure_list(failures: pd.DataFrame) -> list[str]:
    """Return each failed trial with its step and reason; arms that failed alike share a phrase."""
    alike = failures.groupby(["phase", "seed", "step", "reason"], sort=False)["arm"]
    return [
        f"{phase_label(str(phase))} {', '.join(arms)}, seed {seed}, step {step}: {reason}"
        for (phase, seed, step, reason), arms in alike
    ]


def finding(row: Decision) -> str:
    """Return what a row of the decisions says in short: verdict, arm, word, differences with intervals, failures."""
    if not row.n_seeds:
        return f"{row.verdict}: {row.arm}, {failed(row)}"
    text = f"{row.verdict}: {row.arm} {_compare(row)}"
    if not row.n_failed:
        return text
    return f"{text}, {'but' if row.verdict == words.INCONCLUSIVE else 'and'} {failed(row)}"


def _compare(row: Decision) -> str:
    """Return where the finished trials of an arm stand beside the control."""
    if row.word == words.NOTHING_DONE:
        finished = " that finished" if row.n_failed else ""
        return f"never operated and equals {beside(row)} in every seed{finished} ({row.word})"
    said = f"is {row.word} {PREPOSITIONS.get(row.word, 'than')}" if row.word else "stands beside"
    difference = measure(row, "delta_pp", signed=True, unit="pp")
    return f"{said} {beside(row)}, {difference}, NLL {nll(row)}"


def beside(row: Decision) -> str:
    """Return what people call the control of a row: its arm, with the phase if that is a third one."""
    phase, arm = key_of(row.control)
    return arm if phase in (START, row.phase) else f"{arm} of {phase_label(phase)}"


def nll(row: Decision) -> str:
    """Return the difference in NLL, nats, with its interval; above zero the arm is worse."""
    return interval(row.nll_delta, row.nll_lo, row.nll_hi, 3, signed=True)


def outcome(row: Decision, decisions: pd.DataFrame) -> str:
    """Return the finding as a sentence: with the number of seeds, what was expected, a failed assay, extra costs."""
    if not row.n_seeds:
        return f"{finding(row)}."
    remarks = [f"{row.n_seeds} seed{'s' if row.n_seeds != 1 else ''}"]
    remarks += {"yes": ["as expected"], "no": ["not as expected"]}.get(row.as_expected, [])
    if row.verdict == words.NO_ASSAY:
        assay = measure(row, "assay_pp", signed=True, unit="pp")
        remarks += [f"the assay's better arm against its worse one: {assay or 'no seed finished both'}"]
    return f"{finding(row)} ({'; '.join(remarks)}){spending(row, control_row(decisions, row.control))}."


def spending(row: Decision, control: Decision) -> str:
    """Return what an arm's model takes beyond the control's, `, with 65 % more parameters`; blank below one percent."""
    more = {
        "parameters": row.params_total / control.params_total,
        "FLOPs per example": row.flops_per_example / control.flops_per_example,
    }
    said = [f"{100 * (ratio - 1):.0f} % more {what}" for what, ratio in more.items() if ratio >= 1.01]
    return f", with {' and '.join(said)} than {beside(row)}" if said else ""


def rows_of(table: pd.DataFrame) -> list[Any]:
    """Return the rows of any table with columns as attributes (Any: the stubs take a cell for any scalar)."""
    return list(table.itertuples(index=False))


def headline_rows(decisions: pd.DataFrame) -> list[Decision]:
    """Return the rows that decide a phase, in the table's order: the primary arms without the 7a baseline."""
    return [row for row in decision_rows(decisions) if row.primary and row.phase != START]


def control_row(decisions: pd.DataFrame, control: str = CONTINUED) -> Decision:
    """Return the row of a control, phase/arm."""
    return decision_rows(of_arm(decisions, *key_of(control)))[0]


def decision_cells(decisions: pd.DataFrame) -> Cells:
    """Return the decisions as people read them; balanced accuracy, too, if classes are so uneven that it differs."""
    uneven = (decisions["balanced_accuracy"] - decisions["accuracy"]).abs().max() > 0.005
    return [
        {"phase": phase_label(row.phase), "arm": row.arm, "control": beside(row)}
        | {"verdict": ", ".join(filter(None, [row.verdict, failed(row)])), "word": row.word}
        | {"as expected": row.as_expected, "accuracy, %": measure(row, "accuracy")}
        | ({"balanced accuracy, %": number(row.balanced_accuracy)} if uneven else {})
        | (_difference_cells(row) if not row.is_control else dict.fromkeys(_difference_cells(row), ""))
        | {"p": p_text(row.p_value), "p (Holm)": p_text(row.p_holm), "seeds": str(row.n_seeds)}
        | {"operations": number(row.operations, 1)}
        | {"experts": f"{row.n_routed_start:g} → {round(row.n_routed_end, 1):g}" if row.n_seeds else ""}
        | _cost_cells(row)
        for row in decision_rows(decisions)
    ]


def _difference_cells(row: Decision) -> dict[str, str]:
    return {
        "difference, pp": measure(row, "delta_pp", signed=True),
        "worst seed, pp": number(row.worst_delta, signed=True),
        "NLL difference": nll(row),
    }


def _cost_cells(row: Any) -> dict[str, str]:
    """Return what the model of a row takes, of the decisions or of a leaderboard; blank if no trial finished."""
    return {
        "parameters (active)": f"{number(row.params_total, 0)} ({number(row.params_active, 0)})" if row.n_seeds else "",
        "FLOPs/example": number(row.flops_per_example, 0),
    }


def cost_cells(decisions: pd.DataFrame) -> Cells:
    """Return what every arm takes, with its ratio to what its control takes."""
    titles = dict(zip(COSTS, ("parameters", "active", "FLOPs/example"), strict=True))
    rows = decision_rows(decisions)
    controls = {f"{row.phase}/{row.arm}": row for row in rows if row.is_control}

    def ratio(row: Decision, name: str) -> str:
        value, control = getattr(row, name), controls[row.control]
        return f"{number(value, 0)} ({TIMES} {number(value / getattr(control, name))})" if row.n_seeds else ""

    return [
        {"phase": phase_label(row.phase), "arm": row.arm, **{title: ratio(row, name) for name, title in titles.items()}}
        for row in rows
    ]


def rule(decisions: pd.DataFrame, shares: Decisions) -> str:
    """Return in one paragraph what is compared with what, what words and verdicts mean, and what the seeds can show."""
    compared: dict[str, list[Decision]] = {}
    for row in decision_rows(decisions):
        if row.phase != START and not row.is_control:
            compared.setdefault(row.control, []).append(row)
    controls = {name: control_row(decisions, name) for name in compared or [CONTINUED]}
    kinds = [
        f"`{row.arm}`, {CONTROLS.get(name, 'of ' + phase_label(row.phase))}, for {_said(compared.get(name, []))}"
        for name, row in controls.items()
    ]
    margins = [
        f"{number(row.margin_pp)} pp and {number(row.margin_nll, 4)} nats beside `{row.arm}`"
        for row in controls.values()
    ]
    gains = [f"{number(row.gain_pp)} pp beside `{row.arm}`" for row in controls.values()]
    phases = listed([phase_label(row.phase) for row in headline_rows(decisions)])
    return (
        f"Every arm is compared seed by seed with a control that trains for as many steps: {'; '.join(kinds)}. "
        f"The {100 * shares.confidence:g} % interval of the difference in test accuracy says its word, the first that "
        "holds: BETTER, it lies above zero; WORSE, below; EQUIVALENT, within the margin on both sides; NO WORSE, above "
        "the lower margin; UNDECIDED, else. NOTHING DONE: the arm never operated and equals its control in every seed. "
        f"The margin is {100 * shares.margin:g} % of the control's error, and as large a share of its negative "
        f"log-likelihood (NLL): {', '.join(margins)}. The primary arm decides its phase by the claim. Harmless: GO if "
        "accuracy and NLL lose no more than their margins, NO-GO if one of them certainly does. Gain: GO if accuracy "
        f"is BETTER, else NO-GO if it certainly gains less than {100 * shares.gain:g} % of the control's error: "
        f"{', '.join(gains)}. INCONCLUSIVE: neither, or NOTHING DONE. NO ASSAY: the known winner of the phase is not "
        "certainly ahead of its known loser by the margin of the assay, so there is no verdict. "
        f"The phases are tested in a fixed order, {phases}; each is decided by itself, without correction across them. "
        "The other arms are exploratory: BETTER and WORSE also have to pass Holm's correction within their phase. An "
        "arm with a failed trial is WORSE or UNDECIDED, if it did anything, never GO, and NO-GO if all its trials "
        "failed. A seed that its control failed counts against no arm. "
        f"{reach(control_row(decisions).n_seeds, shares)}"
    )


def _said(rows: list[Decision]) -> str:
    """Return the phases that these rows decide, and the further arms: `7b.1 and sham of 7c.3`."""
    whole = {row.phase for row in rows if row.primary}
    further = [f"`{row.arm}` of {phase_label(row.phase)}" for row in rows if row.phase not in whole]
    phases = dict.fromkeys(phase_label(row.phase) for row in rows if row.phase in whole)
    return listed([*phases, *further])


def listed(parts: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def reach(seeds: int, shares: Decisions) -> str:
    """Return in a sentence what so many seeds can decide: the half width of the interval of a usual difference."""
    if seeds < 2:
        return "One seed decides nothing."
    half = half_width(shares.spread_pp / sqrt(seeds), seeds, shares.confidence)
    return (
        f"With {seeds} seeds a difference that spreads by {shares.spread_pp:g} pp from seed to seed, as differences "
        f"of harmless arms did in earlier runs, is known to ±{number(half)} pp."
    )


def decisions_markdown(
    decisions: pd.DataFrame, failures: pd.DataFrame, claims: Mapping[str, Stated], shares: Decisions
) -> str:
    """Return the text of `reports/decisions.md`: the rule, a line per phase, the decisions, and the failed trials."""
    lines = ["# Decisions", "", rule(decisions, shares), ""]
    for row in headline_rows(decisions):
        hypothesis, label = verbatim(stated(claims[row.phase])), phase_label(row.phase)
        lines.append(f"- **{label}** {hypothesis} **{outcome(row, decisions)}**")
    lines += ["", "Primary arms in bold; intervals over seeds, of accuracies also over test examples.", ""]
    return "\n".join([*lines, *markdown_rows(decisions), *failed_lines(failures, "Failed trials")]) + "\n"


def markdown_rows(decisions: pd.DataFrame, columns: Sequence[str] = ()) -> list[str]:
    """Return the decisions as a Markdown table, with all columns of `decision_cells` or some, primary arms in bold."""
    cells = decision_cells(decisions)
    for row, primary in zip(cells, decisions["primary"], strict=True):
        bold = ("arm", "verdict", "word", "difference, pp") if primary else ()
        row |= {title: f"**{row[title]}**" for title in bold if row[title]}
    return markdown_table([{title: row[title] for title in columns or row} for row in cells])


def markdown_table(cells: Cells) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [list(cells[0]), ["---"] * len(cells[0]), *([escaped(text) for text in row.values()] for row in cells)]
    return [f"| {' | '.join(line)} |" for line in lines]


def failed_lines(failures: pd.DataFrame, title: str) -> list[str]:
    """Return the failed trials as a Markdown list under its title; nothing if there are none."""
    listed = [f"- {escaped(phrase)}" for phrase in failure_list(failures)]
    return ["", f"{title}:", "", *listed] if listed else []


def escaped(text: str) -> str:
    """Return a text as part of a Markdown table or list."""
    return text.replace("|", "\\|").replace("_", "\\_")


def verbatim(text: str) -> str:
    """Return what people wrote as Markdown that shows every character as it is."""
    return re.sub(r"([\\`*_\[\]<>|&#~$])", r"\\\1", text)


def stated(claim: Stated) -> str:
    """Return a hypothesis as a sentence, with its claim, and the assay that has to hold for a verdict."""
    text, assay = " ".join(claim.hypothesis.split()), claim.assay
    return (
        f"{text if text.endswith(('.', '?', '!')) else f'{text}.'} (Claim: {claim.claim}; expected: {claim.expected}; "
        f"assay: {assay.better} beats {assay.worse} by more than {assay.margin_pp:g} pp.)"
    )


def leaderboard_cells(table: pd.DataFrame) -> Cells:
    """Return a leaderboard as people read it."""
    return [
        {"rank": number(row.rank, 0)}
        | {"candidate": f"{row.candidate}{' (chosen)' * row.chosen or ' (winner)' * row.winner}"}
        | {"gate accuracy, %": measure(row, "accuracy")}
        | {"test accuracy, %": interval(row.test_accuracy, row.test_lo, row.test_hi)}
        | {"published, %": number(row.published_accuracy)}
        | {"seeds": f"{row.n_seeds}, {row.n_failed} failed" if row.n_failed else str(row.n_seeds)}
        | _cost_cells(row)
        | {"settings": row.settings}
        for row in rows_of(table)
    ]


def task_cells(tasks: pd.DataFrame, confidence: float) -> Cells:
    """Return the accuracies of the further tasks by arm, over seeds."""
    return [
        {"phase": phase_label(str(phase)), "arm": str(arm), "task": str(task)}
        | {"own head, %": interval(*mean_interval(rows["accuracy"], confidence))}
        | {"derived, %": interval(*mean_interval(rows["derived"], confidence))}
        for (phase, arm, task), rows in tasks.groupby(["phase", "arm", "task"])
    ]
