"""Decide on every arm: compare it with the control arm, paired by seed, against a non-inferiority margin."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from math import isfinite, isnan, nan
from typing import Any, NamedTuple

import pandas as pd

from phasegate.base.errors import UserError
from phasegate.params.names import BASELINE, CONTROL, PLUGINS, PRIMARY, REFERENCES, START
from phasegate.records.tables import COSTS, check_numbers
from phasegate.verdicts.statistics import holm, interval_columns, margin_p_value, paired_difference, seeds_needed

AVERAGED = ["n_routed_start", "n_routed_end", *COSTS]


class Decision(NamedTuple):
    """Hold one arm beside the control: a row of the decisions table, in which unknown numbers are NaN."""

    phase: str
    arm: str
    primary: bool  # whether the arm decides its phase
    n_seeds: int  # finished by the arm and by the control
    n_failed: int
    accuracy: float = nan  # on the test split, percent
    accuracy_lo: float = nan
    accuracy_hi: float = nan
    delta_pp: float = nan  # the arm's accuracy minus the control's
    delta_lo: float = nan
    delta_hi: float = nan
    p_value: float = nan  # of a difference of exactly the margin
    verdict: str = ""
    seeds_needed: float = nan
    n_routed_start: float = nan
    n_routed_end: float = nan
    params_total: float = nan
    params_active: float = nan
    flops_per_example: float = nan
    p_holm: float = nan
    delta_sd: float = nan


def decision_rows(decisions: pd.DataFrame) -> list[Decision]:
    """Return the rows of a decisions table, also of one that was read from a file."""
    kinds = list(Decision.__annotations__.values())
    cells = decisions[list(Decision._fields)].itertuples(index=False, name=None)
    return [Decision(*[kind(value) for kind, value in zip(kinds, row, strict=True)]) for row in cells]


def decide(
    trials: pd.DataFrame, failures: pd.DataFrame, margin_pp: float, confidence: float, primary: Mapping[str, str]
) -> pd.DataFrame:
    """Return the decisions table: a `Decision` for each phase and arm of `trials` and `failures` (phase, arm, seed).

    `primary` names the arm that decides each phase. Its verdict follows from the interval alone. The verdict of another
    arm also needs a p-value that survives Holm's correction over these exploratory arms of the phase, so another phase
    changes no verdict. An arm without numbers counts there with p = 1.

    A row compares the seeds that both the arm and the control finished. It counts the arm's failures in the seeds that
    the control finished; for the arms of 7a, all failures. An arm with a failed trial is NO-GO if its interval says so
    or if nothing is left to compare, else INCONCLUSIVE. More seeds would not make it GO, so `seeds_needed` is blank
    unless they could show a NO-GO. Raises UserError for a phase without its primary arm, and as `paired_arms` does.
    """
    arms = paired_arms(trials, failures)
    primary = {**primary, START: BASELINE}
    for phase in {phase for phase, _ in arms} - {START}:
        if (phase, primary.get(phase, "")) not in arms:
            raise UserError(f"the primary arm of phase {phase} is {primary.get(phase)}: it has no trials")
    # The study's phases in order, then the plugins; arms keep their order, after the primary.
    keys = sorted(arms, key=lambda key: (key[0] == PLUGINS, key[0], primary[key[0]] != key[1]))
    control = arms[START, CONTROL]
    rows = [
        _compare(Decision(phase, arm, primary[phase] == arm, 0, 0), arms[phase, arm], control, margin_pp, confidence)
        for phase, arm in keys
    ]
    phases = groupby(rows, key=lambda row: row.phase)
    return pd.DataFrame(row for _, phase in phases for row in _decide_phase(list(phase), margin_pp, confidence))


def _compare(
    row: Decision, trials: pd.DataFrame, control: pd.DataFrame, margin_pp: float, confidence: float
) -> Decision:
    """Return the row of an arm with its numbers, from trials that are indexed by seed."""
    on_trial = row.phase != START
    done, compared = trials["accuracy"].notna(), control["accuracy"].notna()
    failed = ~done & compared if on_trial else ~done
    row = row._replace(n_seeds=int((done & compared).sum()), n_failed=int(failed.sum()))
    if not row.n_seeds:
        return row
    trials, control = trials[done & compared], control[done & compared]
    deltas = paired_difference(trials["accuracy"], control["accuracy"])
    numbers: dict[str, Any] = {column: float(trials[column].mean()) for column in AVERAGED}
    numbers |= interval_columns("accuracy", trials["accuracy"], confidence)
    numbers |= interval_columns("delta_pp", deltas, confidence)
    spread = float(deltas.std(ddof=1)) if len(deltas) > 1 else nan
    return row._replace(**numbers, delta_sd=spread, p_value=margin_p_value(deltas, margin_pp) if on_trial else nan)


def _decide_phase(rows: list[Decision], margin_pp: float, confidence: float) -> Iterator[Decision]:
    """Yield the rows of one phase with their corrected p-values, verdicts and seeds needed."""
    exploratory = [row for row in rows if not row.primary and row.phase != START]
    adjusted = holm([row.p_value if row.n_seeds else 1 for row in exploratory])
    p_holm = {row.arm: float(p) for row, p in zip(exploratory, adjusted, strict=True) if row.n_seeds}
    # In the worst case an exploratory arm has to reach Holm's strictest level: its seeds are planned for this level.
    strictest = 1 - (1 - confidence) / max(1, len(exploratory))
    for row in rows:
        row = row._replace(p_holm=p_holm.get(row.arm, nan))
        row = row._replace(verdict=_verdict(row, margin_pp, confidence))
        yield row._replace(seeds_needed=_seeds(row, margin_pp, confidence if row.primary else strictest))


def _verdict(row: Decision, margin_pp: float, confidence: float) -> str:
    if row.phase == START:
        return "BASELINE" if row.arm == BASELINE else "CONTROL"
    if not row.n_seeds:
        return "NO-GO"
    certain = row.primary or row.p_holm < 1 - confidence
    if certain and row.delta_lo >= -margin_pp and not row.n_failed:
        return "GO"
    if certain and row.delta_hi < -margin_pp:
        return "NO-GO"
    return "INCONCLUSIVE"


def _seeds(row: Decision, margin_pp: float, confidence: float) -> float:
    """Return the number of seeds that would decide an inconclusive row; NaN if none would, or if none is needed."""
    if row.verdict != "INCONCLUSIVE" or isnan(row.delta_sd) or (row.n_failed and row.delta_pp >= -margin_pp):
        return nan
    return seeds_needed(row.delta_pp, row.delta_sd, margin_pp, confidence) or nan


def metrics(decisions: pd.DataFrame, phase: str, arm: str) -> dict[str, str | bool | int | float]:
    """Return the row of one arm of a phase, "primary" or by name, as plain finite values for `metrics.json`."""
    rows = decision_rows(decisions)
    found = [row for row in rows if row.phase == phase and (row.primary if arm == PRIMARY else row.arm == arm)]
    if len(found) != 1:
        known = ", ".join(f"{row.phase}/{row.arm}" for row in rows)
        raise UserError(f"the decisions have {len(found)} rows for phase {phase}, arm {arm}: they have {known}")
    values = {name: value for name, value in found[0]._asdict().items() if isinstance(value, str) or isfinite(value)}
    return {name: int(value) if name == "seeds_needed" else value for name, value in values.items()}


def paired_arms(trials: pd.DataFrame, failures: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Return trials by phase and arm, each indexed by the control's seeds; a failed trial is a row of blanks.

    Raises UserError for a seed without a trial or a failure, a trial given twice, a number that isn't finite, or a
    control without a finished trial.
    """
    keys = ["phase", "arm", "seed"]
    trials, failures = (table[table["phase"] != REFERENCES] for table in (trials, failures))
    check_numbers(trials, ["accuracy", *AVERAGED], keys)
    if len(failures):
        trials = pd.concat([trials, failures[keys]])
        check_numbers(trials, [], keys)
    arms = {
        (str(phase), str(arm)): rows.set_index("seed").sort_index()
        for (phase, arm), rows in trials.groupby(["phase", "arm"], sort=False)
    }
    control = (START, CONTROL)
    if control not in arms:
        raise UserError(f"the trials have no control arm: phase {START}, arm {CONTROL}")
    if arms[control]["accuracy"].isna().all():
        raise UserError(f"every trial of the control failed (phase {START}, arm {CONTROL}): nothing can be compared")
    for key in arms:
        for lacking, having in ((key, control), (control, key)):
            if seeds := set(arms[having].index) - set(arms[lacking].index):
                raise UserError(
                    f"phase {lacking[0]}, arm {lacking[1]} has no trial for seed {min(seeds)}, but phase {having[0]}, "
                    f"arm {having[1]} has one"
                )
    return arms
