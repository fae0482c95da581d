"""Summarise how good each signal is over all seeds, as a table and as text.

Chance is 0 for rank correlations, and 0.5 for the area under the ROC curve by which a signal tells planted dead experts
from living ones. For a regret it is the regret of as many experts drawn at random, seed by seed.
Regrets are in nats.
"""

from typing import Any

import pandas as pd

from phasegate.params.names import MEASURED
from phasegate.verdicts import statistics, wording
from phasegate.verdicts.decisions import BETTER, NOTHING_DONE, WORSE, Decision, decision_rows, of_arm
from phasegate.verdicts.statistics import column_names, interval_columns, margin_p_value
from phasegate.verdicts.wording import measure, number, rows_of

PHASE = "p7b4"
CORRELATIONS = {  # with what a signal is correlated
    "spearman_prune": "a removal does immediately",
    "spearman_recovered": "a removal does after recovery",
    "spearman_grow": "a split does after training",
}
DEAD = "auc_dead"
CHANCE = dict.fromkeys(CORRELATIONS, 0.0) | {DEAD: 0.5}
GONE = (1, 2, 4)
REGRETS = tuple(f"regret_{gone}" for gone in GONE)
REGRET = REGRETS[-1]  # when the most experts are removed
COLUMNS = ["signal", "n_seeds"]
COLUMNS += [name for kind in (*CHANCE, *REGRETS, *(f"saved_{k}" for k in GONE)) for name in column_names(kind)]
COLUMNS += [*(f"chance_{gone}" for gone in GONE), *(f"p_{name}" for name in (*CHANCE, *REGRETS))]
"""saved_k: by how much the regret lies below chance, paired by seed. p_*: of a two-sided t-test of no difference from
chance, Holm-corrected over the signals that have this measure, the control among them. Blank: not measured."""


def signal_summary(signals: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Return a row per signal of `signals.csv`, in its order of signals."""
    rows = []
    for signal, runs in signals.groupby("signal", sort=False):
        row: dict[str, Any] = {"signal": signal, "n_seeds": len(runs)}
        for name, chance in CHANCE.items():
            if runs[name].notna().all():
                given = name, runs[name], confidence
                row |= statistics.bounded_columns(*given, 1.0) if name == DEAD else interval_columns(*given)
                row[f"p_{name}"] = margin_p_value(runs[name], -chance)
        for gone, name in zip(GONE, REGRETS, strict=True):
            regret, at_random = runs[name], runs[f"chance_{gone}"]
            row[f"chance_{gone}"] = at_random.mean()
            if regret.notna().all():
                less = statistics.paired_difference(at_random, regret)
                row |= interval_columns(name, regret, confidence) | {f"p_{name}": margin_p_value(less, 0)}
                row |= interval_columns(f"saved_{gone}", less, confidence)
        rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    for column in [f"p_{name}" for name in (*CHANCE, *REGRETS)]:
        known = table[column].notna()
        table.loc[known, column] = statistics.holm(table.loc[known, column])
    return table


def beats_chance(row: Any, name: str, confidence: float) -> bool:
    """Tell whether a signal's row is better than chance in a measure of `CHANCE` or `REGRETS`."""
    better = getattr(row, name.replace("regret", "saved")) > CHANCE.get(name, 0)
    return bool(better and getattr(row, f"p_{name}") < 1 - confidence)


def words(signal: str) -> str:
    """Return a signal's name as people read it."""
    return signal.replace("_", " ")


def signal_findings(
    summary: pd.DataFrame, decisions: pd.DataFrame, surgeries: pd.DataFrame, confidence: float
) -> list[str]:
    """Return in a sentence each which signals beat chance, what each costs, and whether acting on ground truth pays."""
    kinds = [_describe_kind(summary, name, confidence) for name in CORRELATIONS]
    others = [_describe_dead(summary, confidence), _describe_regret(summary, confidence)]
    return [*kinds, *others, *acting_findings(decisions, surgeries)]


def _describe_kind(summary: pd.DataFrame, name: str, confidence: float) -> str:
    _, better, rest = _rank(summary, name, confidence)
    if not better:
        text = f"no signal's rank correlation is shown to be better than chance: {_list(rest, name)}"
    else:
        text = f"rank correlation better than chance for {_list(better, name)}"
        text += f"; not shown to be for {_list(rest, name)}" if rest else ""
    if MEASURED in [row.signal for row in rest]:
        text += "; measuring again is not shown to agree with what was measured, so this distinguishes no signals"
    return f"What {CORRELATIONS[name]}: {text}."


def _describe_dead(summary: pd.DataFrame, confidence: float) -> str:
    _, better, others = _rank(summary, DEAD, confidence)
    worse = [row for row in others if getattr(row, f"{DEAD}_hi") < CHANCE[DEAD]]
    rest = [row for row in others if row not in worse]
    parts = [f"above chance (0.50) for {_list(better, DEAD)}"] if better else []
    parts += [f"below it for {_list(worse, DEAD)}"] if worse else []
    parts += [f"not shown to differ from it for {_list(rest, DEAD)}"] if rest else []
    found = "; ".join(parts) or "which no signal has"
    return f"Which experts are dead, where some were killed: area under the ROC curve, {found}."


def _describe_regret(summary: pd.DataFrame, confidence: float) -> str:
    rows, better, rest = _rank(summary, REGRET, confidence)
    if not rows:
        return f"{regret_title(summary, confidence)}."
    parts = [_list(better, REGRET)] if better else []
    parts += [f"not shown to cost less than chance, {_list(rest, REGRET)}"] if rest else []
    return (
        "Letting a signal choose the 4 experts to remove costs, beyond the best choice, in nats: "
        f"{'; '.join(parts)}; chance costs {number(rows[0].chance_4, 3)}."
    )


def correlation_finding(summary: pd.DataFrame, confidence: float) -> str:
    """Return how many signals predict better than chance what a removal and a split would do, and which are dead."""
    scored, parts = summary[summary["signal"] != MEASURED], []
    for name, what in CORRELATIONS.items():
        rows, better, _ = _rank(scored, name, confidence)
        best = f", {words(better[0].signal)} best" if better else ""
        parts.append(f"{len(better)} of {len(rows)} signals predict better than chance what {what}{best}")
    rows, better, _ = _rank(scored, DEAD, confidence)
    return "; ".join([*parts, f"{len(better)} of {len(rows)} score killed experts below living ones"])


def regret_title(summary: pd.DataFrame, confidence: float) -> str:
    """Return which signal costs least when it chooses, measurement aside, beside chance."""
    rows, better, _ = _rank(summary[summary["signal"] != MEASURED], REGRET, confidence)
    if not rows:
        return "No signal could choose 4 experts to remove"
    return (
        f"When 4 experts are removed, {len(better)} of {len(rows)} signals choose better than chance; "
        f"{words(rows[0].signal)} costs least, {_value(rows[0], REGRET)} nats beyond the best choice, where chance "
        f"costs {number(rows[0].chance_4, 3)}"
    )


def acting_findings(decisions: pd.DataFrame, surgeries: pd.DataFrame) -> list[str]:
    """Return how often each arm of 7b.4 operated, and whether it beat the fixed architecture at the same budget."""
    control, sentences = wording.control_row(decisions), []
    for row in decision_rows(decisions[decisions["phase"] == PHASE]):
        who = f"{'Self-modification on ground truth' if row.primary else 'Arm'} `{row.arm}`"
        if not row.n_seeds:
            sentences.append(f"{who}: {wording.failed(row)}.")
            continue
        sentences.append(
            f"{who} operated {_count(row, control, surgeries)} and {_compare(row)} the fixed architecture trained for "
            f"as many steps: {measure(row, 'delta_pp', signed=True, unit='pp')}"
            f"{'; ' if row.n_failed else ''}{wording.failed(row)}."
        )
    return sentences


def signal_cells(summary: pd.DataFrame, confidence: float) -> wording.Cells:
    """Return the signals as people read them; a star marks what beats chance."""
    titles = {name: f"what {what}" for name, what in CORRELATIONS.items()}
    titles |= {DEAD: "killed experts told, area under ROC"}
    titles |= {name: f"regret of {gone}, nats" for name, gone in zip(REGRETS, GONE, strict=True)}
    return [
        {"signal": words(row.signal), "seeds": str(row.n_seeds)}
        | {titles[name]: f"{_value(row, name)}{' *' if beats_chance(row, name, confidence) else ''}" for name in titles}
        for row in rows_of(summary)
    ]


def _rank(summary: pd.DataFrame, name: str, confidence: float) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the rows that have a measure, best first: all, those better than chance, and those not shown to be."""
    ranked = summary.dropna(subset=name).sort_values(name, ascending=name in REGRETS, kind="stable")
    rows = rows_of(ranked)
    better = [row for row in rows if beats_chance(row, name, confidence)]
    return rows, better, [row for row in rows if row not in better]


def _list(rows: list[Any], name: str) -> str:
    return ", ".join(f"{words(row.signal)} {_value(row, name)}" for row in rows)


def _value(row: Any, name: str) -> str:
    return measure(row, name, 3 if name in REGRETS else 2)


def _count(row: Decision, control: Decision, surgeries: pd.DataFrame) -> str:
    """Return how often an arm operated. Seeds that the control failed are not among the seeds of the row."""
    done = of_arm(surgeries, PHASE, row.arm)
    if done.empty:
        return f"not once in {row.n_seeds} seeds"
    kinds = ", ".join(f"{count} {wording.TIMES} {name}" for name, count in done["operation"].value_counts().items())
    of = "" if control.n_failed else f" of {row.n_seeds}"
    return f"{len(done)} times in {done['seed'].nunique()}{of} seeds ({kinds})"


def _compare(row: Decision) -> str:
    known = {BETTER: "beats", WORSE: "is worse than", NOTHING_DONE: "equals"}
    return known.get(row.word, "neither beats nor loses to")
