"""Summarise what each kind of surgery did over all its trials, as a table and as text."""

from collections.abc import Mapping
from math import inf
from typing import Any

import numpy as np
import pandas as pd

from phasegate.params.names import CONTROL, START
from phasegate.verdicts.decisions import decision_rows, key_of, of_arm
from phasegate.verdicts.statistics import column_names, interval_columns, paired_difference
from phasegate.verdicts.wording import Cells, measure, number, phase_label, rows_of

COLUMNS = ["phase", "arm", "operation", "n_seeds", "surgeries", "seeds_operated", "output_change", "output_change_max"]
COLUMNS += [*column_names("accuracy_lost"), "recovery_steps", "recovered"]
COLUMNS += [*column_names("delta_pp"), *column_names("gate_delta_pp")]
COLUMNS += ["pairs", "balanced", "output_distance", *column_names("swap_loss")]
"""n_seeds: of the arm. surgeries: their number. seeds_operated: seeds with any such surgery; means of immediate effects
are over these seeds. output_change: mean, relative, immediate. accuracy_lost: pp of gate accuracy, immediate.
recovery_steps: median, where a surgery that never recovered counts as inf. recovered: share. delta_pp: the arm's final
difference from its control on test. gate_delta_pp: the same on the gate split, by which parameters are chosen. For
splits: pairs (both halves are still there at the end), balanced (share of pairs in which each half has at least a
quarter of the tokens), output_distance (mean, relative), swap_loss (nats per token if the halves traded places)."""
KEY = ["phase", "arm", "seed"]
AGAINST = "Against the same training without surgery"
BALANCED = 0.25  # the share of the pair's tokens that each half of a split should keep
STUDY = "surgery"  # the phase whose operations are planned
OPERATIONS = ["none", "split", "clone", "reinit", "remove", "merge"]  # in the order in which the study's are shown
GROWTH = {"split": "splits", "clone": "clones", "clone_carried": "clones with carried moments"}
GROWTH |= {"reinit": "fresh experts"}
PRUNING = {"remove_by_usage": "removals by usage", "remove_by_loss": "removals by measured loss"}
MERGING = {"merge": "merges"}


def surgery_summary(
    surgeries: pd.DataFrame, halves: pd.DataFrame, curves: pd.DataFrame, decisions: pd.DataFrame, confidence: float
) -> pd.DataFrame:
    """Return a row per phase, arm and operation, below 7a's control, without seeds that an arm's control failed."""
    arms = {(row.phase, row.arm): row for row in decision_rows(decisions)}
    ends = curves.sort_values("step", kind="stable").groupby(["phase", "arm", "seed"])["accuracy"].last()

    def control(phase: str, arm: str) -> "pd.Series[float]":
        found: pd.Series[float] = ends.loc[key_of(arms[phase, arm].control)]
        return found

    def compared(table: pd.DataFrame) -> pd.DataFrame:
        seeds = (seed in control(phase, arm) for phase, arm, seed in table[KEY].itertuples(index=False))
        return table[np.fromiter(seeds, bool, len(table))]

    def final(phase: str, arm: str) -> dict[str, Any]:
        test = {name: getattr(arms[phase, arm], name) for name in ("n_seeds", *column_names("delta_pp"))}
        gate = paired_difference(*ends[phase][arm].align(control(phase, arm), join="inner"))
        return test | interval_columns("gate_delta_pp", gate, confidence)

    nothing = {"phase": START, "arm": CONTROL, "operation": "none", "surgeries": 0, "seeds_operated": 0}
    rows, surgeries, halves = [nothing | final(START, CONTROL)], compared(surgeries), compared(halves)
    for (phase, arm, operation), done in surgeries.groupby(["phase", "arm", "operation"], sort=False):
        recovery = done["recovery_steps"].astype(float)
        lost = (done["accuracy_before"] - done["accuracy_after"]).groupby(done["seed"]).mean()
        row = {"phase": phase, "arm": arm, "operation": operation, "surgeries": len(done), "seeds_operated": len(lost)}
        row |= {"output_change": done["output_change"].mean(), "output_change_max": done["output_change"].max()}
        row |= {"recovery_steps": recovery.fillna(inf).median(), "recovered": recovery.notna().mean()}
        row |= interval_columns("accuracy_lost", lost, confidence) | final(str(phase), str(arm))
        pairs = of_arm(halves, str(phase), str(arm))
        if operation == "split" and len(pairs):
            row |= {"pairs": len(pairs), "balanced": (pairs["smaller_share"] >= BALANCED).mean()}
            row |= {"output_distance": pairs["output_distance"].mean()}
            row |= interval_columns("swap_loss", pairs.groupby("seed")["swap_loss"].mean(), confidence)
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def study_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the control and the study's arms: growth, and pruning without the splits that merges undo."""
    study = summary[summary["phase"] == STUDY]
    pruned = study[study["operation"].isin(["remove", "merge"])]
    grown = study[~study["arm"].isin(pruned["arm"])]
    rows = pd.concat([summary[summary["operation"] == "none"], grown, pruned])
    return rows.sort_values("operation", key=lambda names: names.map(OPERATIONS.index), kind="stable")


def surgery_finding(summary: pd.DataFrame) -> list[str]:
    """Return what the study found, made from its rows: a sentence each on growth, removals and merges, if any."""
    sentences = []
    for start, names in {AGAINST: GROWTH, "Of trained experts": PRUNING, "After as many splits": MERGING}.items():
        parts = [
            f"{ending}, each changing the output by {change(row.output_change)} and costing "
            f"{measure(row, 'accuracy_lost', unit='pp')} immediately"
            for ending, row in _describe_endings(summary, names)
        ]
        sentences += [f"{start}, {'; '.join(parts)}."] if parts else []
    return sentences


def short_finding(summary: pd.DataFrame) -> str:
    """Return where the three kinds of growth end, for a title; blank if nothing was grown."""
    parts = [ending for ending, _ in _describe_endings(summary, GROWTH)]
    return f"{AGAINST}, {', '.join(parts)}" if parts else ""


def _describe_endings(summary: pd.DataFrame, names: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Return where each of these arms of the study ends, with its row."""
    study = {row.arm: row for row in rows_of(study_rows(summary))}
    rows = [(name, study[arm]) for arm, name in names.items() if arm in study]
    return [
        (f"{row.surgeries / row.n_seeds:g} {name} end {measure(row, 'delta_pp', signed=True, unit='pp')}", row)
        for name, row in rows
    ]


def halves_finding(in_a_row: pd.DataFrame, summary: pd.DataFrame) -> str:
    """Return how far many operations in a row change the output, and how the halves of a split come to differ."""
    count = in_a_row["done"].max()
    worst = in_a_row[in_a_row["done"] == count].groupby("operation")["output_change"].max()
    text = (
        f"After {count} splits in a row the output has changed by {change(worst['split'])} at most, after {count} "
        f"clones by {change(worst['clone'])}"
    )
    for row in rows_of(of_arm(summary, STUDY, "split")):
        text += (
            f"; the halves of a split come to differ by {percent(row.output_distance)} in their outputs, and "
            f"{percent(row.balanced)} of the pairs keep a quarter of their tokens on each side"
        )
    return text


def dead_finding(curves: pd.DataFrame) -> str:
    """Return in one sentence whether experts got no token for a whole interval between points of the curves."""
    points = curves[(curves["step"] > 0) & (curves["n_routed"] > 0)]
    dead = points[points["dead_experts"] > 0]
    if dead.empty:
        return f"In each of the {len(points):,} intervals of the learning curves every existing expert got tokens."
    worst = rows_of(dead.sort_values("dead_experts", kind="stable"))[-1]
    return (
        f"In {len(dead):,} of the {len(points):,} intervals of the learning curves some expert got no token; at most "
        f"{worst.dead_experts:.0f} at once (phase {phase_label(worst.phase)}, {worst.arm}, seed {worst.seed}, up to "
        f"step {worst.step})."
    )


def surgery_cells(summary: pd.DataFrame) -> Cells:
    """Return the summary of the surgeries as people read it."""
    return [
        {"phase": phase_label(row.phase), "arm": row.arm, "operation": row.operation, "surgeries": str(row.surgeries)}
        | {"seeds with any": "" if row.operation == "none" else str(row.seeds_operated)}
        | {"output change": change(row.output_change), "accuracy lost immediately, pp": measure(row, "accuracy_lost")}
        | {"median recovery, steps": steps(row.recovery_steps), "recovered": percent(row.recovered)}
        | {"final difference, pp": "" if row.operation == "none" else measure(row, "delta_pp", signed=True)}
        for row in rows_of(summary)
    ]


def halves_cells(summary: pd.DataFrame) -> Cells:
    """Return what became of the halves of splits as people read it."""
    return [
        {"phase": phase_label(row.phase), "arm": row.arm, "pairs": f"{row.pairs:.0f}"}
        | {"each has a quarter of the tokens": percent(row.balanced)}
        | {"distance of outputs": percent(row.output_distance)}
        | {"loss if they traded places, nats per token": measure(row, "swap_loss", digits=4, signed=True)}
        for row in rows_of(summary[summary["pairs"].notna()])
    ]


def change(value: float) -> str:
    """Return a relative change in percent, or as a power of ten if it is tiny; blank for a blank."""
    return f"{value:.1e}" if 0 < value < 1e-3 else percent(value, 1 if 0 < value < 0.1 else 0)


def percent(share: float, digits: int = 0) -> str:
    """Return a share as a percentage; blank for a blank."""
    return "" if pd.isna(share) else f"{number(100 * share, digits)} %"


def steps(value: float) -> str:
    """Return a number of steps, `never` if it is infinite; blank for a blank."""
    return "" if pd.isna(value) else "never" if value == inf else f"{value:g}"
