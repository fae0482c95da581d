"""Decide on every arm: compare it with the control arm, paired by seed, and say it in a word; and on every phase."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from math import isfinite, isnan, nan
from typing import Any, NamedTuple

import pandas as pd

from phasegate.base.errors import UserError
from phasegate.params.names import BASELINE, CONTINUED, CONTROL, PRIMARY, REFERENCES, START
from phasegate.params.phases import Claim, Decisions
from phasegate.records.tables import COSTS, DECIMALS, check_numbers
from phasegate.verdicts.statistics import holm, interval_columns, margin_p_value, mean_interval, paired_difference

AVERAGED = ["balanced_accuracy", "n_routed_start", "n_routed_end", *COSTS]
BETTER, WORSE, EQUIVALENT, NO_WORSE = "BETTER", "WORSE", "EQUIVALENT", "NO WORSE"
UNDECIDED, NOTHING_DONE = "UNDECIDED", "NOTHING DONE"
GO, NO_GO, INCONCLUSIVE, NO_ASSAY = "GO", "NO-GO", "INCONCLUSIVE", "NO ASSAY"


class Decision(NamedTuple):
    """Hold one arm beside its control: a row of the decisions table, in which unknown numbers are NaN, words blank."""

    phase: str
    arm: str
    primary: bool  # whether the arm decides its phase
    n_seeds: int  # finished by the arm and by the control
    n_failed: int
    accuracy: float = nan  # on the test split, percent; its bounds are over seeds and test examples
    accuracy_lo: float = nan
    accuracy_hi: float = nan
    delta_pp: float = nan  # the arm's accuracy minus the control's; its bounds are over seeds
    delta_lo: float = nan
    delta_hi: float = nan
    p_value: float = nan  # of no difference
    verdict: str = ""  # of a primary arm
    n_routed_start: float = nan
    n_routed_end: float = nan
    params_total: float = nan
    params_active: float = nan
    flops_per_example: float = nan
    p_holm: float = nan
    delta_sd: float = nan
    claim: str = ""  # of a primary arm, as the next two
    expected: str = ""  # the verdict if the hypothesis is right
    as_expected: str = ""  # yes | no | open
    word: str = ""
    nll_delta: float = nan  # the arm's NLL minus the control's, nats
    nll_lo: float = nan
    nll_hi: float = nan
    worst_delta: float = nan  # of all seeds, pp
    operations: float = nan  # mean per seed
    delta_test_se: float = nan  # what the choice of test examples adds to the standard error of delta_pp
    assay_pp: float = nan  # of a primary arm: by how much the phase's known winner beats its known loser
    assay_lo: float = nan
    assay_hi: float = nan
    margin_pp: float = nan  # these three are shares of the control's error, or of its NLL
    margin_nll: float = nan  # nats
    gain_pp: float = nan  # the smallest gain worth having
    balanced_accuracy: float = nan  # the mean over classes, percent
    control: str = ""  # phase/arm; a control arm is its own

    @property
    def is_control(self) -> bool:
        """Tell whether other arms are compared with this one."""
        return self.control == f"{self.phase}/{self.arm}"


def decision_rows(decisions: pd.DataFrame) -> list[Decision]:
    """Return the rows of a decisions table, also of one that was read from a file, where blank words are missing."""
    kinds = Decision.__annotations__
    filled = decisions.fillna({name: "" for name, kind in kinds.items() if kind is str})
    cells = filled[list(Decision._fields)].itertuples(index=False, name=None)
    return [Decision(*[kind(value) for kind, value in zip(kinds.values(), row, strict=True)]) for row in cells]


def decide(tables: Mapping[str, pd.DataFrame], claims: Mapping[str, Claim], rule: Decisions) -> pd.DataFrame:
    """Return the decisions table: a `Decision` for each phase and arm of `trials` and `failures` (phase, arm, seed).

    Of `tables` it takes these two, `surgeries`, and `sampling` (phase, arm, accuracy_se, delta_se; pp): the standard
    errors that the choice of test examples gives the mean accuracy of an arm and its difference from its control.
    Claims say what the control of an arm is. Margins are shares of the control's mean error, and of its mean NLL, over
    the seeds that it finished.

    A row compares the seeds that both the arm and its control finished. It counts the arm's failures in the seeds that
    the control finished; for controls and the arms of 7a, all failures. `word` and `verdict` say what follows from a
    row. Holm's correction is over the exploratory arms of a phase, so another phase changes nothing in this one; an arm
    without a p-value counts there with p = 1. Phases come in the order of `claims`, their arms in that of the trials,
    after the primary. Raises UserError for a phase without its primary arm, a control or the arms of its assay, and as
    `paired_arms` does.
    """
    arms = paired_arms(tables["trials"], tables["failures"])
    primary = {phase: claim.primary for phase, claim in claims.items()} | {START: BASELINE}
    for phase in {phase for phase, _ in arms} - {START}:
        if (phase, primary.get(phase, "")) not in arms:
            raise UserError(f"the primary arm of phase {phase} is {primary.get(phase)}: it has no trials")
    order, rows = [START, *claims], []
    for phase, arm in sorted(arms, key=lambda key: (order.index(key[0]), primary[key[0]] != key[1])):
        named = control_of(claims, phase, arm)
        control = _control(named, arms)
        error, nll = 100 - control["accuracy"].mean(), control["nll"].mean()
        shares = (rule.margin * error, rule.margin * nll, rule.gain * error)
        margin, margin_nll, gain = (round(float(share), DECIMALS) for share in shares)  # differences may equal them
        row = Decision(phase, arm, primary[phase] == arm, 0, 0, control=named)
        row = row._replace(margin_pp=margin, margin_nll=margin_nll, gain_pp=gain)
        row = _compare(row, arms[phase, arm], control, tables, rule.confidence)
        if row.primary and phase != START:
            claim = claims[phase]
            row = row._replace(claim=claim.claim, expected=claim.expected, **_assay(claim, arms, rule.confidence))
        rows.append(row)
    phases = groupby(rows, key=lambda row: row.phase)
    return pd.DataFrame(row for phase, group in phases for row in _decide_phase(list(group), claims.get(phase), rule))


def key_of(name: str) -> tuple[str, str]:
    """Return phase and arm of a name, phase/arm."""
    phase, _, arm = name.partition("/")
    return phase, arm


def of_arm(table: pd.DataFrame, phase: str, arm: str) -> pd.DataFrame:
    """Return the rows of one arm, of any table that has phases and arms."""
    return table[(table["phase"] == phase) & (table["arm"] == arm)]


def control_of(claims: Mapping[str, Claim], phase: str, arm: str) -> str:
    """Return what an arm is compared with, phase/arm."""
    return claims[phase].control_of(arm) if phase in claims else CONTINUED


def word(row: Decision, certain: bool = True) -> str:
    """Return in a word what a row says of its arm, from the interval of the difference in accuracy.

    `certain`: whether a difference from zero may be claimed. An arm with a failed trial is WORSE or UNDECIDED. An arm
    that did no operation and is the control in every seed, in accuracy and in NLL, is NOTHING DONE.
    """
    if not row.n_seeds or _apart(row):
        return ""
    if row.operations == 0 and row.worst_delta == row.delta_pp == row.nll_delta == 0:
        return NOTHING_DONE
    if certain and row.delta_hi < 0:
        return WORSE
    if row.n_failed or row.delta_lo < -row.margin_pp:
        return UNDECIDED
    if certain and row.delta_lo > 0:
        return BETTER
    return EQUIVALENT if row.delta_hi <= row.margin_pp else NO_WORSE


def verdict(row: Decision, assay_margin_pp: float) -> str:
    """Return the verdict of a phase from the row of its primary arm, by the claim.

    `harmless`: GO if neither accuracy nor NLL loses more than its margin, NO-GO if either certainly does. `gain`: GO if
    the arm is better, NO-GO if it certainly gains less than is worth having. INCONCLUSIVE otherwise, and if nothing was
    done. NO ASSAY if the phase's known winner does not beat its known loser by more than `assay_margin_pp`. An arm with
    a failed trial is never GO, and NO-GO if nothing is left to compare.
    """
    if not row.n_seeds:
        return NO_GO
    if not row.assay_lo > assay_margin_pp:
        return NO_ASSAY
    if row.word == NOTHING_DONE:
        return INCONCLUSIVE
    if row.claim == "gain":
        go, no_go = row.delta_lo > 0, row.delta_hi < row.gain_pp
    else:
        go = row.delta_lo >= -row.margin_pp and row.nll_hi <= row.margin_nll
        no_go = row.delta_hi < -row.margin_pp or row.nll_lo > row.margin_nll
    return GO if go and not row.n_failed else NO_GO if no_go else INCONCLUSIVE


def _apart(row: Decision) -> bool:
    """Tell whether a row is on no trial: it is of 7a, or the control of others."""
    return row.phase == START or row.is_control


def _control(name: str, arms: Mapping[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """Return the trials of a control, phase/arm; `UserError` if there are none, or none that finished."""
    phase, arm = key_of(name)
    if (phase, arm) not in arms:
        raise UserError(f"the trials have no control arm: phase {phase}, arm {arm}")
    if arms[phase, arm]["accuracy"].isna().all():
        raise UserError(f"every trial of the control failed (phase {phase}, arm {arm}): nothing can be compared")
    return arms[phase, arm]


def _compare(
    row: Decision, trials: pd.DataFrame, control: pd.DataFrame, tables: Mapping[str, pd.DataFrame], confidence: float
) -> Decision:
    """Return the row of an arm with its numbers, from trials that are indexed by seed."""
    done, compared = trials["accuracy"].notna(), control["accuracy"].notna()
    failed = ~done if _apart(row) else ~done & compared
    row = row._replace(n_seeds=int((done & compared).sum()), n_failed=int(failed.sum()))
    if not row.n_seeds:
        return row
    trials, control = trials[done & compared], control[done & compared]
    deltas, nll = (paired_difference(trials[name], control[name]) for name in ("accuracy", "nll"))
    surgeries, sampling = (of_arm(tables[name], row.phase, row.arm) for name in ("surgeries", "sampling"))
    [(accuracy_se, delta_se)] = sampling[["accuracy_se", "delta_se"]].itertuples(index=False, name=None)
    numbers: dict[str, Any] = {column: float(trials[column].mean()) for column in AVERAGED}
    numbers |= interval_columns("accuracy", trials["accuracy"], confidence, accuracy_se)
    numbers |= interval_columns("delta_pp", deltas, confidence)
    numbers |= dict(zip(("nll_delta", "nll_lo", "nll_hi"), mean_interval(nll, confidence), strict=True))
    numbers |= {"worst_delta": float(deltas.min()), "delta_test_se": delta_se}
    numbers |= {"operations": surgeries["seed"].isin(trials.index).sum() / row.n_seeds}
    row = row._replace(**numbers, delta_sd=float(deltas.std(ddof=1)) if len(deltas) > 1 else nan)
    return row if _apart(row) or word(row) == NOTHING_DONE else row._replace(p_value=margin_p_value(deltas, 0))


def _assay(claim: Claim, arms: Mapping[tuple[str, str], pd.DataFrame], confidence: float) -> dict[str, Any]:
    """Return the interval by which a phase's known winner beats its known loser; blank if no seed finished both."""
    accuracy = []
    for name in (claim.assay.better, claim.assay.worse):
        if (key := key_of(name)) not in arms:
            raise UserError(f"an assay needs the arm {name}: it has no trials")
        accuracy.append(arms[key]["accuracy"])
    both = accuracy[0].notna() & accuracy[1].notna()
    if not both.any():
        return {}
    return interval_columns("assay_pp", paired_difference(*(values[both] for values in accuracy)), confidence)


def _decide_phase(rows: list[Decision], claim: Claim | None, rule: Decisions) -> Iterator[Decision]:
    """Yield the rows of one phase, 7a without a claim, with their corrected p-values, words and verdicts."""
    exploratory = [row for row in rows if not row.primary and not _apart(row)]
    adjusted = holm([1 if isnan(row.p_value) else row.p_value for row in exploratory])
    p_holm = {row.arm: p for row, p in zip(exploratory, adjusted.tolist(), strict=True) if not isnan(row.p_value)}
    for row in rows:
        row = row._replace(p_holm=p_holm.get(row.arm, nan))
        row = row._replace(word=word(row, row.primary or row.p_holm < 1 - rule.confidence))
        if row.is_control:
            row = row._replace(verdict="CONTROL")
        elif not claim:
            row = row._replace(verdict="BASELINE")
        elif row.primary:
            found = verdict(row, claim.assay.margin_pp)
            decided = row.n_seeds and found in (GO, NO_GO)  # failed trials confirm no hypothesis
            known = "open" if not decided else "yes" if found == row.expected else "no"
            row = row._replace(verdict=found, as_expected=known)
        yield row


def metrics(decisions: pd.DataFrame, phase: str, arm: str) -> dict[str, str | bool | int | float]:
    """Return the row of one arm of a phase, "primary" or by name, as plain finite values for `metrics.json`."""
    rows = decision_rows(decisions)
    found = [row for row in rows if row.phase == phase and (row.primary if arm == PRIMARY else row.arm == arm)]
    if len(found) != 1:
        known = ", ".join(f"{row.phase}/{row.arm}" for row in rows)
        raise UserError(f"the decisions have {len(found)} rows for phase {phase}, arm {arm}: they have {known}")
    values = found[0]._asdict().items()
    return {name: value for name, value in values if (value if isinstance(value, str) else isfinite(value))}


def paired_arms(trials: pd.DataFrame, failures: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Return trials by phase and arm, each indexed by the seeds of 7a's control; a failed trial is a row of blanks.

    Raises UserError for a seed without a trial or a failure, a trial given twice, a number that isn't finite, or a
    control without a finished trial.
    """
    keys = ["phase", "arm", "seed"]
    trials, failures = (table[table["phase"] != REFERENCES] for table in (trials, failures))
    check_numbers(trials, ["accuracy", "nll", *AVERAGED], keys)
    if len(failures):
        trials = pd.concat([trials, failures[keys]])
        check_numbers(trials, [], keys)
    arms = {
        (str(phase), str(arm)): rows.set_index("seed").sort_index()
        for (phase, arm), rows in trials.groupby(["phase", "arm"], sort=False)
    }
    _control(CONTINUED, arms)
    control = (START, CONTROL)
    for key in arms:
        for lacking, having in ((key, control), (control, key)):
            if seeds := set(arms[having].index) - set(arms[lacking].index):
                raise UserError(
                    f"phase {lacking[0]}, arm {lacking[1]} has no trial for seed {min(seeds)}, but phase {having[0]}, "
                    f"arm {having[1]} has one"
                )
    return arms
