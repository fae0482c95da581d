"""From trials to verdicts: the decisions table, the leaderboards and the headline metrics.

A verdict compares an arm with the control arm `continue`, paired by seed, against a non-inferiority margin.
Accuracies are in percent, differences in percentage points (pp).
"""

from collections.abc import Mapping
from math import inf, isfinite
from typing import Any

import numpy as np
import pandas as pd

from phasegate.errors import UserError
from phasegate.statistics import (
    DECIMALS,
    Interval,
    holm,
    margin_p_value,
    mean_interval,
    paired_difference,
    seeds_needed,
)
from phasegate.study import OWN, PRIMARY, START, START_ARMS

BASELINE, CONTROL = START_ARMS
REFERENCES = "references"  # published models trained for comparison: no verdict

COSTS = ["params_total", "params_active", "flops_per_example", "train_seconds"]
AVERAGED = ["n_routed_start", "n_routed_end", *COSTS]
COLUMNS = [
    *("phase", "arm", "primary", "n_seeds", "n_failed", "accuracy", "accuracy_lo", "accuracy_hi"),
    *("delta_pp", "delta_lo", "delta_hi", "p_value", "verdict", "seeds_needed"),
    *AVERAGED,
    "p_holm",
    "delta_sd",
]
LEADERBOARD_COLUMNS = [
    *("candidate", "kind", "rank", "chosen", "n_seeds", "n_failed", "accuracy", "accuracy_lo", "accuracy_hi"),
    *("test_accuracy", "test_lo", "test_hi", "published_accuracy", *COSTS, "settings"),
]


def relabel_control(table: pd.DataFrame) -> pd.DataFrame:
    """The same table with the phase `continue` under the name it has in reports: phase p7a, arm continue."""
    return table.assign(phase=table["phase"].replace({CONTROL: START}))


def decide(
    trials: pd.DataFrame,
    margin_pp: float,
    confidence: float,
    primary: Mapping[str, str],
    failures: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The decisions table: one row per phase and arm of `trials` and `failures`, in the columns `COLUMNS`.

    `primary` names the arm that decides each phase. Its verdict follows from the interval alone; the other arms are
    exploratory, and theirs also needs a p-value that survives Holm's correction over the exploratory arms of their
    phase, so that another phase changes no verdict.

    `failures` are trials that did not finish (phase, arm, seed). A row compares the n_seeds seeds that both the arm and
    the control finished; n_failed counts the arm's failures in the seeds that the control finished, and for the rows of
    7a all their own. An arm with a failed trial is never GO: NO-GO if its interval says so or if nothing is left to
    compare, which leaves its numbers blank, else INCONCLUSIVE. More seeds would not mend that, so `seeds_needed` is
    blank unless they could tell that it is NO-GO. In Holm's correction an arm without numbers counts with p = 1.

    Raises:
        UserError: for a seed that is missing among the finished and the failed, a trial given twice, a number that
            isn't finite, a phase without its primary arm, or a control of which no trial finished.
    """
    if not margin_pp >= 0:
        raise UserError(f"margin_pp is {margin_pp}: the largest loss accepted, in pp, is 0 or more")
    arms = paired_arms(trials, failures)
    primary = {**primary, START: BASELINE}
    for phase in {phase for phase, _ in arms} - {START}:
        if (phase, primary.get(phase, "")) not in arms:
            raise UserError(f"the primary arm of phase {phase} is {primary.get(phase)}: it has no trials")
    # The study's phases in order, and what was added to them last; arms keep their order but for the primary.
    keys = sorted(arms, key=lambda key: (key[0] == OWN, key[0], primary[key[0]] != key[1]))
    control = arms[START, CONTROL]
    table = pd.DataFrame(
        {"phase": phase, "arm": arm, "primary": primary[phase] == arm}
        | _measured(arms[phase, arm], control, margin_pp, confidence)
        for phase, arm in keys
    )
    started = table["phase"] == START
    table.loc[started, "n_failed"] = [int(arms[key]["accuracy"].isna().sum()) for key in keys if key[0] == START]
    exploratory = ~table["primary"] & ~started
    table.loc[started, "p_value"] = np.nan  # the baseline and the control aren't on trial
    table["p_holm"] = np.nan
    # In the worst case an exploratory arm has to reach Holm's strictest level: plan its seeds for that.
    levels = pd.Series(confidence, index=table.index)
    for _, tried in table[exploratory].groupby("phase"):
        table.loc[tried.index, "p_holm"] = holm(tried["p_value"].fillna(1))
        levels[tried.index] = 1 - (1 - confidence) / len(tried)
    table["p_holm"] = table["p_holm"].where(table["p_value"].notna())
    table["verdict"] = [_verdict(row, margin_pp, confidence) for row in table.itertuples()]
    table["seeds_needed"] = pd.array(
        [_seeds(row, margin_pp, level) for row, level in zip(table.itertuples(), levels, strict=True)],
        dtype="Int64",
    )
    return table[COLUMNS]


def _measured(
    trials: pd.DataFrame, control: pd.DataFrame, margin_pp: float, confidence: float
) -> dict[str, float | None]:
    """What one arm's trials say beside the control's (both indexed by seed), before any verdict."""
    done, compared = trials["accuracy"].notna(), control["accuracy"].notna()
    counts = {"n_seeds": int((done & compared).sum()), "n_failed": int((~done & compared).sum())}
    if not counts["n_seeds"]:
        return {**counts}
    trials, control = trials[done & compared], control[done & compared]
    deltas = paired_difference(trials["accuracy"], control["accuracy"])
    return {
        **counts,
        **_columns("accuracy", "accuracy", mean_interval(trials["accuracy"], confidence)),
        **_columns("delta_pp", "delta", mean_interval(deltas, confidence)),
        "delta_sd": float(deltas.std(ddof=1)) if len(deltas) > 1 else None,
        "p_value": margin_p_value(deltas, margin_pp),
        **_means(trials, AVERAGED),
    }


def _verdict(row: Any, margin_pp: float, confidence: float) -> str:
    """The verdict of one row of the decisions table."""
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


def _seeds(row: Any, margin_pp: float, confidence: float) -> int | None:
    """Seeds that would decide an inconclusive row; blank otherwise and where one seed shows no spread."""
    if row.verdict != "INCONCLUSIVE" or pd.isna(row.delta_sd) or (row.n_failed and row.delta_pp >= -margin_pp):
        return None
    return seeds_needed(row.delta_pp, row.delta_sd, margin_pp, confidence=confidence)


def metrics(decisions: pd.DataFrame, phase: str, arm: str = PRIMARY) -> dict[str, str | bool | int | float]:
    """The headline: the row of the phase's primary arm (p7a: the baseline), or another, as plain Python values.

    What the row leaves blank, and the infinite bounds of a single seed, are left out; so is all that an arm without a
    finished trial did not measure. Raises UserError for an unknown phase or arm, and for any other number that isn't
    finite: DVC would pass it on silently.
    """
    chosen = decisions["primary"].astype(bool) if arm == PRIMARY else decisions["arm"] == arm
    rows = decisions[(decisions["phase"] == phase) & chosen]
    if len(rows) != 1:
        known = ", ".join(f"{row.phase}/{row.arm}" for row in decisions.itertuples())
        raise UserError(f"the decisions have {len(rows)} rows for phase {phase}, arm {arm}: they have {known}")
    may_be_blank = {
        "accuracy_lo",
        "accuracy_hi",
        "delta_lo",
        "delta_hi",
        "p_value",
        "p_holm",
        "seeds_needed",
        "delta_sd",
    }
    row = rows.iloc[0]
    values: dict[str, str | bool | int | float] = {}
    for column, value in row.items():
        name, plain = str(column), value.item() if isinstance(value, np.generic) else value
        if isinstance(plain, str | bool):
            values[name] = plain
        elif not pd.isna(plain) and isfinite(plain):
            values[name] = int(plain) if name in ("n_seeds", "n_failed", "seeds_needed") else plain
        elif row["n_seeds"] and name not in may_be_blank:
            raise UserError(f"{name} of phase {phase} is {plain}: the headline needs a finite number")
    return values


def winner(search: pd.DataFrame) -> str:
    """The candidate with the best mean gate accuracy; ties go to fewer FLOPs, then to the name.

    Raises:
        UserError: if no candidate finished all its trials.
    """
    best, runs = _ranked(search)[0]
    if _failed(runs):
        first = search["failure"].dropna().iloc[0]
        raise UserError(f"every candidate of the search has a failed trial, so none can be chosen; the first: {first}")
    return best


def leaderboard(
    search: pd.DataFrame,
    chosen: str,
    confidence: float,
    references: pd.DataFrame | None = None,
    trials: pd.DataFrame | None = None,
    published: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Candidates by mean gate accuracy (percent), then the references in the same order, without a rank.

    Nor has a candidate a rank of which a trial failed: it comes after the others, with the means of those that
    finished. `search` and `references` hold one row per candidate and seed. `chosen` is the candidate that goes on. A
    reference's test accuracy comes from the phase `references` of `trials`, its `published` accuracy
    (percent) from the literature. Bounds are those of the interval over seeds.
    """
    if chosen not in set(search["candidate"]):
        raise UserError(f"the chosen candidate {chosen} isn't in the search")
    rows = []
    for rank, (name, runs) in enumerate(_ranked(search), start=1):
        rows.append(
            {"candidate": name, "kind": "search", "rank": None if _failed(runs) else rank, "chosen": name == chosen}
            | _gate_result(runs, confidence)
        )
    for name, runs in [] if references is None else _ranked(references):
        rows.append(
            {"candidate": name, "kind": "reference", "chosen": False, **_gate_result(runs, confidence)}
            | _test_result(name, trials, confidence)
            | {"published_accuracy": (published or {}).get(name)}
        )
    table = pd.DataFrame(rows).reindex(columns=LEADERBOARD_COLUMNS)
    return table.astype({"rank": "Int64", "published_accuracy": float})


def _ranked(search: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Candidates with their rows, best first; those with a failed trial come after all others."""
    keys = ["candidate", "seed"]
    _check_numbers(search, [], keys)
    _check_numbers(search[search["failure"].isna()], ["accuracy", *COSTS], keys)
    groups = [(str(name), runs) for name, runs in search.groupby("candidate", sort=True)]
    if not groups:
        raise UserError("the search has no candidates")

    def merit(group: tuple[str, pd.DataFrame]) -> tuple[bool, float, float, str]:
        name, runs = group
        accuracy, flops = (float(runs[column].mean()) for column in ("accuracy", "flops_per_example"))
        known = not np.isnan(accuracy)
        return _failed(runs) > 0, -round(accuracy, DECIMALS) if known else inf, flops if known else inf, name

    return sorted(groups, key=merit)


def _failed(runs: pd.DataFrame) -> int:
    """How many of a candidate's trials did not finish."""
    return int(runs["failure"].notna().sum())


def _gate_result(runs: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """A candidate's columns: means over the seeds that finished, blank where none did."""
    done = runs[runs["failure"].isna()]
    measured = _columns("accuracy", "accuracy", mean_interval(done["accuracy"], confidence)) if len(done) else {}
    return {
        "n_seeds": len(done),
        "n_failed": _failed(runs),
        **measured,
        **_means(done, COSTS),
        "settings": runs["settings"].iloc[0],
    }


def _test_result(reference: str, trials: pd.DataFrame | None, confidence: float) -> dict[str, float]:
    if trials is None:
        return {}
    runs = trials[(trials["phase"] == REFERENCES) & (trials["arm"] == reference)]
    return _columns("test_accuracy", "test", mean_interval(runs["accuracy"], confidence)) if len(runs) else {}


def paired_arms(trials: pd.DataFrame, failures: pd.DataFrame | None = None) -> dict[tuple[str, str], pd.DataFrame]:
    """Trials by phase and arm, each indexed by the control's seeds; a failed trial is a row of blanks."""
    keys = ["phase", "arm", "seed"]
    _check_numbers(trials, [], keys)
    trials = relabel_control(trials[trials["phase"] != REFERENCES])
    _check_numbers(trials, ["accuracy", *AVERAGED], keys)
    if failures is not None and len(failures):
        failures = relabel_control(failures[failures["phase"] != REFERENCES])
        trials = pd.concat([trials, failures[keys]])
        _check_numbers(trials, [], keys)
    arms = {
        (str(phase), str(arm)): rows.set_index("seed").sort_index()
        for (phase, arm), rows in trials.groupby(["phase", "arm"], sort=False)
    }
    if (START, CONTROL) not in arms:
        raise UserError(f"the trials have no control arm: phase {CONTROL}, arm {CONTROL}")
    if arms[START, CONTROL]["accuracy"].isna().all():
        raise UserError(
            f"every trial of the control failed: phase {CONTROL}, arm {CONTROL}; there is nothing to compare"
        )
    control = set(arms[START, CONTROL].index)
    for (phase, arm), rows in arms.items():
        if lacking := control - set(rows.index):
            raise UserError(f"phase {phase}, arm {arm} has no trial for seed {min(lacking)}, the control has")
        if lacking := set(rows.index) - control:
            raise UserError(
                f"phase {START}, arm {CONTROL} (the control) has no trial for seed {min(lacking)}, "
                f"phase {phase}, arm {arm} has"
            )
    return arms


def _check_numbers(table: pd.DataFrame, numbers: list[str], keys: list[str]) -> None:
    """Refuse missing columns, repeated keys and numbers that aren't finite, naming where."""
    if missing := [column for column in [*keys, *numbers] if column not in table.columns]:
        raise UserError(f"the table lacks the column {missing[0]}: it has {', '.join(table.columns)}")
    repeated = table.duplicated(keys)
    if repeated.any():
        raise UserError(f"{_where(table[repeated], keys)} is in the table twice")
    for column in numbers:
        bad = ~np.isfinite(table[column].to_numpy(dtype=np.float64))
        if bad.any():
            raise UserError(f"{column} of {_where(table[bad], keys)} is {table[column][bad].iloc[0]}")


def _where(rows: pd.DataFrame, keys: list[str]) -> str:
    return ", ".join(f"{key} {rows[key].iloc[0]}" for key in keys)


def _columns(mean: str, bounds: str, interval: Interval) -> dict[str, float]:
    """An interval as three table columns."""
    return {mean: interval.mean, f"{bounds}_lo": interval.lo, f"{bounds}_hi": interval.hi}


def _means(rows: pd.DataFrame, columns: list[str]) -> dict[str, float]:
    return {column: float(rows[column].mean()) for column in columns}
