"""Numbers as text: intervals, findings, and the tables of `reports/decisions.md` and the page.

A finding is always made from the row it describes, so no sentence or title can contradict the table.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import pandas as pd

from phasegate.decisions import CONTROL, COSTS
from phasegate.errors import UserError
from phasegate.statistics import mean_interval
from phasegate.study import START

MINUS = "\N{MINUS SIGN}"


DATA_LABELS = {
    "mnist1d": "MNIST-1D",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "npz": "data of one's own",
}


def data_label(name: str) -> str:
    """The name that people use for a data set."""
    return DATA_LABELS.get(name, name)


def phase_label(phase: str) -> str:
    """The name people use: `p7b1` is 7b.1, `p7a` is 7a; other names stay."""
    if not phase.startswith("p7"):
        return phase
    return f"{phase[1:3]}.{phase[3:]}" if phase[3:] else phase[1:]


def number(value: float, digits: int = 2, signed: bool = False) -> str:
    """A number with a real minus sign and thousands separators; blank for a blank."""
    if pd.isna(value):
        return ""
    text = f"{float(value):{'+' if signed else ''},.{digits}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("+-")


def interval(mean: float, lo: float, hi: float, digits: int = 2, signed: bool = False, unit: str = "") -> str:
    """`−0.42 [−0.91, +0.07]`, a unit after the mean if there is one; says so where one seed gives no interval."""
    if pd.isna(mean):
        return ""
    known = isfinite(lo) and isfinite(hi)
    bounds = f"{number(lo, digits, signed)}, {number(hi, digits, signed)}" if known else "no interval"
    return f"{number(mean, digits, signed)}{f' {unit}' if unit else ''} [{bounds}]"


def p_text(p: float) -> str:
    """A p-value for a table: three decimals, `< 0.001` below them, blank for a blank."""
    return "" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def failed(row: Any) -> str:
    """`1 of 10 trials failed`, of a row of the decisions or of a leaderboard; blank if none did."""
    total = row.n_seeds + row.n_failed
    if not row.n_failed:
        return ""
    if row.n_seeds:
        return f"{row.n_failed} of {total} trials failed"
    return f"all {total} trials failed" if total > 1 else "the one trial failed"


def verdict(row: Any) -> str:
    """The verdict of a row of the decisions, and the failures that it has to live with."""
    return f"{row.verdict}, {failed(row)}" if row.n_failed else row.verdict


def failure_list(failures: pd.DataFrame) -> list[str]:
    """Every failed trial with step and reason, in a phrase each; arms that failed alike share one."""
    alike = failures.groupby(["phase", "seed", "step", "reason"], sort=False)["arm"]
    return [
        f"{phase_label(str(phase))} {', '.join(arms)}, seed {seed}, step {step}: {reason}"
        for (phase, seed, step, reason), arms in alike
    ]


def finding(row: Any, margin_pp: float) -> str:
    """What a row of the decisions says in a few words: verdict, arm, difference with interval, failures."""
    if not row.n_seeds:
        return f"{row.verdict}: {row.arm}, {failed(row)}"
    text = _compared(row, margin_pp)
    if not row.n_failed:
        return text
    return f"{text}, {'but' if row.verdict == 'INCONCLUSIVE' else 'and'} {failed(row)}"


def _compared(row: Any, margin_pp: float) -> str:
    """The same of the trials that finished."""
    margin = f"{margin_pp:g} pp"
    signed = interval(row.delta_pp, row.delta_lo, row.delta_hi, signed=True, unit="pp")
    within = row.verdict == "GO" or (row.verdict == "INCONCLUSIVE" and row.primary and row.delta_lo >= -margin_pp)
    if row.verdict == "CONTROL":
        return f"{row.arm}: the control"
    if row.verdict == "NO-GO":
        loss = interval(-row.delta_pp, -row.delta_hi, -row.delta_lo, unit="pp")
        said = f"loses {loss} against {CONTROL}"
    elif changed_nothing(row):
        said = f"changed nothing and equals {CONTROL} in every seed{' that finished' if row.n_failed else ''}"
    elif within and row.delta_hi <= margin_pp:
        said = f"stays within {margin} of {CONTROL}, {signed}"
    elif row.verdict == "INCONCLUSIVE" and not within:
        said = f"may or may not stay within {margin} of {CONTROL}, {signed}"
    else:
        said = f"stands at {signed} against {CONTROL}"
    return f"{row.verdict}: {row.arm} {said}"


def changed_nothing(row: Any) -> bool:
    """Whether an arm came out as the control in every seed, as one does that never operates."""
    return bool(row.verdict != "CONTROL" and row.delta_lo == row.delta_hi == 0)


def outcome(row: Any, decisions: pd.DataFrame, margin_pp: float) -> str:
    """The finding as a sentence: with the seeds behind it, the number that would decide, and what the arm spends."""
    if not row.n_seeds:
        return f"{finding(row, margin_pp)}."
    seeds = f"{row.n_seeds} seed{'s' if row.n_seeds != 1 else ''}"
    if row.verdict == "INCONCLUSIVE":
        if not pd.isna(row.seeds_needed):
            seeds += f"; about {int(row.seeds_needed):,} would decide"
        elif not row.n_failed:
            seeds += "; no realistic number would decide" if row.n_seeds > 1 else "; one can't decide"
    control = rows_of(of_arm(decisions, START, CONTROL))[0]
    return f"{finding(row, margin_pp)} ({seeds}){spending(row, control)}."


def spending(row: Any, control: Any) -> str:
    """What an arm's model takes beyond the control's, `, with 65 % more parameters`; blank below one percent.

    Seconds are left to the tables: they depend on what else the machine did.
    """
    more = {
        "parameters": row.params_total / control.params_total,
        "FLOPs per example": row.flops_per_example / control.flops_per_example,
    }
    said = [f"{100 * (ratio - 1):.0f} % more {what}" for what, ratio in more.items() if ratio >= 1.01]
    return f", with {' and '.join(said)} than {CONTROL}" if said else ""


def rows_of(table: pd.DataFrame) -> list[Any]:
    """The table's rows with columns as attributes (Any: the stubs take a cell for any scalar)."""
    return list(table.itertuples(index=False))


def of_arm(table: pd.DataFrame, phase: str, arm: str) -> pd.DataFrame:
    """The rows of one arm, of any table that has phases and arms."""
    rows: pd.DataFrame = table[(table["phase"] == phase) & (table["arm"] == arm)]
    return rows


def headline_rows(decisions: pd.DataFrame) -> list[Any]:
    """The rows that decide a phase, in the table's order: the primary arms without the 7a baseline."""
    return [row for row in rows_of(decisions) if row.primary and row.phase != START]


def decision_cells(decisions: pd.DataFrame) -> list[dict[str, str]]:
    """The decisions as people read them: one dict of column title and text per row."""
    return [
        {
            "phase": phase_label(row.phase),
            "arm": row.arm,
            "verdict": verdict(row),
            "accuracy, %": interval(row.accuracy, row.accuracy_lo, row.accuracy_hi),
            "difference, pp": ""
            if row.verdict == "CONTROL"
            else interval(row.delta_pp, row.delta_lo, row.delta_hi, signed=True),
            "p": p_text(row.p_value),
            "p (Holm)": p_text(row.p_holm),
            "seeds": str(row.n_seeds),
            "seeds needed": "" if pd.isna(row.seeds_needed) else f"{int(row.seeds_needed):,}",
            "experts": f"{row.n_routed_start:g} → {round(row.n_routed_end, 1):g}" if row.n_seeds else "",
            **_spent(row),
        }
        for row in rows_of(decisions)
    ]


def _spent(row: Any) -> dict[str, str]:
    """What the model of a row takes, of the decisions or of a leaderboard; blank if no trial finished."""
    return {
        "parameters (active)": f"{number(row.params_total, 0)} ({number(row.params_active, 0)})" if row.n_seeds else "",
        "FLOPs/example": number(row.flops_per_example, 0),
        "train, s": number(row.train_seconds, 0),
    }


def cost_cells(decisions: pd.DataFrame) -> list[dict[str, str]]:
    """What every arm takes, with its ratio to the control's: one dict of column title and text per row."""
    control = of_arm(decisions, START, CONTROL).iloc[0]
    digits = dict.fromkeys(COSTS, 0) | {"train_seconds": 1}

    def ratio(row: "pd.Series[Any]", name: str) -> str:
        times = f"\N{MULTIPLICATION SIGN} {number(row[name] / control[name])}"
        return f"{number(row[name], digits[name])} ({times})" if row["n_seeds"] else ""

    return [
        {"phase": phase_label(row["phase"]), "arm": row["arm"]}
        | {
            title: ratio(row, name)
            for name, title in zip(COSTS, ("parameters", "active", "FLOPs/example", "train, s"), strict=True)
        }
        for _, row in decisions.iterrows()
    ]


def rule(margin_pp: float, confidence: float) -> str:
    """One sentence on what is compared with what, and what the verdicts mean."""
    bound = f"{MINUS}{margin_pp:g} pp"
    return (
        f"Every arm is compared seed by seed with `{CONTROL}`, the same 7a checkpoints trained for as many "
        f"steps without control head or surgery: GO if the {100 * confidence:g} % interval of the difference "
        f"lies at or above {bound} (the margin), NO-GO if it lies below, else INCONCLUSIVE; only the primary "
        "arm decides its phase, the others are exploratory and also have to pass Holm's correction within their phase. "
        "An arm with a trial that failed is never GO, and NO-GO if all failed, while a seed that "
        f"`{CONTROL}` failed counts against none."
    )


def decisions_markdown(
    decisions: pd.DataFrame,
    failures: pd.DataFrame,
    hypotheses: Mapping[str, str],
    margin_pp: float,
    confidence: float,
) -> str:
    """The text of `reports/decisions.md`: the rule, one line per phase, the table with primary arms in bold, and
    the trials that failed.

    Raises UserError for a phase without a hypothesis.
    """
    lines = ["# Decisions", "", rule(margin_pp, confidence), ""]
    for row in headline_rows(decisions):
        said = hypothesis(hypotheses, row.phase)
        lines.append(f"- **{phase_label(row.phase)}** {said} **{outcome(row, decisions, margin_pp)}**")
    lines += ["", "Primary arms in bold; intervals over seeds.", "", *markdown_rows(decisions)]
    lines += failed_lines(failures)
    return "\n".join(lines) + "\n"


def markdown_rows(decisions: pd.DataFrame, columns: Sequence[str] | None = None) -> list[str]:
    """The decisions as a Markdown table, all columns of `decision_cells` or some, primary arms in bold."""
    cells = decision_cells(decisions)
    titles = list(columns or cells[0])
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for row, primary in zip(cells, decisions["primary"], strict=True):
        bold = {"arm", "verdict", "difference, pp"} if primary else set()
        texts = (f"**{row[title]}**" if title in bold and row[title] else row[title] for title in titles)
        lines.append("| " + " | ".join(escaped(text) for text in texts) + " |")
    return lines


def failed_lines(failures: pd.DataFrame, title: str = "Failed trials") -> list[str]:
    """The failed trials as a Markdown list under its title; nothing if there are none."""
    listed = [f"- {escaped(phrase)}" for phrase in failure_list(failures)]
    return ["", f"{title}:", "", *listed] if listed else []


def escaped(text: str) -> str:
    """A text as part of a Markdown table or list."""
    return text.replace("|", "\\|").replace("_", "\\_")


def hypothesis(hypotheses: Mapping[str, str], phase: str) -> str:
    """The phase's hypothesis, ending in a full stop; UserError if there is none."""
    text = " ".join(hypotheses.get(phase, "").split())
    if not text:
        raise UserError(f"phase {phase} has no hypothesis: state one before the phase runs")
    return text if text.endswith((".", "?", "!")) else f"{text}."


def leaderboard_cells(table: pd.DataFrame) -> list[dict[str, str]]:
    """A leaderboard as people read it: one dict of column title and text per row."""
    return [
        {
            "rank": "" if pd.isna(row.rank) else str(row.rank),
            "candidate": f"{row.candidate} (chosen)" if row.chosen else row.candidate,
            "gate accuracy, %": interval(row.accuracy, row.accuracy_lo, row.accuracy_hi),
            "test accuracy, %": interval(row.test_accuracy, row.test_lo, row.test_hi),
            "published, %": number(row.published_accuracy),
            "seeds": f"{row.n_seeds}, {row.n_failed} failed" if row.n_failed else str(row.n_seeds),
            **_spent(row),
            "settings": row.settings,
        }
        for row in rows_of(table)
    ]


def task_cells(tasks: pd.DataFrame, confidence: float) -> list[dict[str, str]]:
    """Accuracies of the further tasks by arm, over seeds: one dict of column title and text per row."""
    return [
        {
            "phase": phase_label(str(phase)),
            "arm": str(arm),
            "task": str(task),
            "own head, %": interval(*mean_interval(rows["accuracy"].to_numpy(), confidence)),
            "derived, %": interval(*mean_interval(rows["derived"].to_numpy(), confidence)),
        }
        for (phase, arm, task), rows in tasks.groupby(["phase", "arm", "task"])
    ]
