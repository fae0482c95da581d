"""The scoring of signals as text: what phase 7b.4 found, in plain words, and the table of the page."""

from typing import Any

import pandas as pd

from phasegate.decisions import CONTROL
from phasegate.report.tables import failed, interval, number, of_arm, rows_of
from phasegate.signal_summary import CORRELATIONS, GONE, beats_chance
from phasegate.study import MEASURED, START

PHASE = "p7b4"
KINDS = dict(
    zip(
        CORRELATIONS,
        ("a removal does at once", "a removal does after recovery", "a split does after training"),
        strict=True,
    )
)
MOST_GONE = GONE[-1]


def words(signal: str) -> str:
    """A signal's name as people read it."""
    return signal.replace("_", " ")


def signal_findings(
    summary: pd.DataFrame, decisions: pd.DataFrame, surgeries: pd.DataFrame, confidence: float
) -> list[str]:
    """Which signals beat chance, what trusting each costs, and whether acting on ground truth pays: a sentence each."""
    return [
        *(_told_apart(summary, name, confidence) for name in CORRELATIONS),
        regret_finding(summary, confidence),
        *acting_findings(decisions, surgeries),
    ]


def correlation_finding(summary: pd.DataFrame, confidence: float) -> str:
    """How many signals tell better than chance what a removal and a split would do, for a title."""
    parts = []
    for name, what in KINDS.items():
        rows = [row for row in _ranked(summary, name) if row.signal != MEASURED]
        better = [row for row in rows if beats_chance(row, name, confidence)]
        best = f", {words(better[0].signal)} best" if better else ""
        parts.append(f"{len(better)} of {len(rows)} signals tell better than chance what {what}{best}")
    return "; ".join(parts)


def _told_apart(summary: pd.DataFrame, name: str, confidence: float) -> str:
    """One kind of operation: the signals that beat chance, best first, and those that don't."""
    better, rest = _parted(_ranked(summary, name), name, confidence)
    text = f"What {KINDS[name]}: "
    if better:
        text += f"rank correlation better than chance for {_listed(better, name)}"
        text += f"; not shown to be for {_listed(rest, name)}" if rest else ""
    else:
        text += f"no signal's rank correlation is shown to be better than chance: {_listed(rest, name)}"
    if MEASURED in [row.signal for row in rest]:
        text += "; measuring again is not shown to agree with what was measured, so this tells no signals apart"
    return f"{text}."


def regret_finding(summary: pd.DataFrame, confidence: float) -> str:
    """What it costs to let each signal choose the experts that go, cheapest first."""
    name = f"regret_{MOST_GONE}"
    rows = sorted(
        (row for row in rows_of(summary) if not pd.isna(getattr(row, name))), key=lambda row: getattr(row, name)
    )
    if not rows:
        return f"No signal could be asked to let {MOST_GONE} experts go."
    better, rest = _parted(rows, name, confidence)
    parts = [_listed(better, name, 3)] if better else []
    parts += [f"not shown to cost less than chance, {_listed(rest, name, 3)}"] if rest else []
    return (
        f"Letting a signal choose the {MOST_GONE} experts that go costs, beyond the best choice, in nats: "
        f"{'; '.join(parts)}; chance costs {number(getattr(rows[0], f'chance_{MOST_GONE}'), 3)}."
    )


def regret_title(summary: pd.DataFrame, confidence: float) -> str:
    """The signal that it costs least to go by, measurement aside, beside chance; for a title."""
    name = f"regret_{MOST_GONE}"
    rows = [row for row in rows_of(summary) if row.signal != MEASURED and not pd.isna(getattr(row, name))]
    if not rows:
        return f"No signal could be asked to let {MOST_GONE} experts go"
    best = min(rows, key=lambda row: getattr(row, name))
    better = sum(beats_chance(row, name, confidence) for row in rows)
    return (
        f"When {MOST_GONE} experts go, {better} of {len(rows)} signals choose better than chance; "
        f"{words(best.signal)} costs least, {_of(best, name, 3)} nats beyond the best choice, where chance costs "
        f"{number(getattr(best, f'chance_{MOST_GONE}'), 3)}"
    )


def acting_findings(decisions: pd.DataFrame, surgeries: pd.DataFrame) -> list[str]:
    """How often each arm of 7b.4 changed the architecture, and whether it beat the fixed one at the same budget."""
    control = rows_of(of_arm(decisions, START, CONTROL))[0]
    sentences = []
    for row in rows_of(decisions[decisions["phase"] == PHASE]):
        who = f"{'Self-modification on ground truth' if row.primary else 'Arm'} `{row.arm}`"
        if not row.n_seeds:
            sentences.append(f"{who}: {failed(row)}.")
            continue
        difference = interval(row.delta_pp, row.delta_lo, row.delta_hi, signed=True, unit="pp")
        sentences.append(
            f"{who} operated {_times(row, control, surgeries)} and {_beside(row)} the fixed architecture trained "
            f"for as many steps: {difference}, at {row.train_seconds:.0f} s a trial instead of "
            f"{control.train_seconds:.0f} s{f'; {failed(row)}' if row.n_failed else ''}."
        )
    return sentences


def signal_cells(summary: pd.DataFrame, confidence: float) -> list[dict[str, str]]:
    """The signals as people read them: one dict of column title and text per row; a star marks what beats chance."""
    names = {
        **{name: f"what {what}" for name, what in KINDS.items()},
        **{f"regret_{gone}": f"regret of {gone}, nats" for gone in GONE},
    }
    return [
        {"signal": words(row.signal), "seeds": str(row.n_seeds)}
        | {
            title: _of(row, name, 3 if name.startswith("regret") else 2)
            + (" *" if beats_chance(row, name, confidence) else "")
            for name, title in names.items()
        }
        | {"seconds": number(row.seconds, 3)}
        for row in rows_of(summary)
    ]


def _ranked(summary: pd.DataFrame, name: str) -> list[Any]:
    """Rows that say something of the kind, best correlation first."""
    rows = [row for row in rows_of(summary) if not pd.isna(getattr(row, name))]
    return sorted(rows, key=lambda row: -getattr(row, name))


def _parted(rows: list[Any], name: str, confidence: float) -> tuple[list[Any], list[Any]]:
    """The rows that are better than chance, and those not shown to be, each in their order."""
    better = [row for row in rows if beats_chance(row, name, confidence)]
    return better, [row for row in rows if row not in better]


def _listed(rows: list[Any], name: str, digits: int = 2) -> str:
    return ", ".join(f"{words(row.signal)} {_of(row, name, digits)}" for row in rows)


def _of(row: Any, name: str, digits: int) -> str:
    """A measure of a row with its interval; blank for a blank."""
    return interval(getattr(row, name), getattr(row, f"{name}_lo"), getattr(row, f"{name}_hi"), digits)


def _times(row: Any, control: Any, surgeries: pd.DataFrame) -> str:
    """How often an arm operated. Seeds that the control failed are not among those of the row."""
    done = of_arm(surgeries, PHASE, row.arm)
    if done.empty:
        return f"not once in {row.n_seeds} seeds"
    kinds = ", ".join(
        f"{count} \N{MULTIPLICATION SIGN} {name}" for name, count in done["operation"].value_counts().items()
    )
    of = "" if control.n_failed else f" of {row.n_seeds}"
    return f"{len(done)} times in {done['seed'].nunique()}{of} seeds ({kinds})"


def _beside(row: Any) -> str:
    """What the interval of the difference says."""
    if row.delta_lo > 0:
        return "beats"
    if row.delta_hi < 0:
        return "is worse than"
    return "equals" if row.delta_lo == row.delta_hi == 0 else "neither beats nor loses to"
