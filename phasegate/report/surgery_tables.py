"""The surgery study as text: its findings in a sentence each, and the tables of the page."""

from collections.abc import Mapping
from math import inf
from typing import Any

import pandas as pd

from phasegate.report.tables import interval, number, phase_label, rows_of

STUDY = "surgery"  # the phase whose operations are planned
GROWTH = {("split", "split"): "splits", ("clone", "clone"): "clones", ("reinit", "reinit"): "fresh experts"}
PRUNING = {"remove_by_usage": "removals by usage", "remove_by_loss": "removals by measured loss", "merge": "merges"}


def surgery_finding(summary: pd.DataFrame) -> list[str]:
    """What the study found, made from its rows: a sentence on growth and one on pruning, where there was any."""
    pruning = {(arm, operation): name for arm, name in PRUNING.items() for operation in ("remove", "merge")}
    starts = {"Against the same training without surgery": GROWTH, "After as many splits": pruning}
    found = {start: _named(summary, names) for start, names in starts.items()}
    return [
        f"{start}, {'; '.join(f'{_ending(row, name)}, {_at_once(row)}' for name, row in rows)}."
        for start, rows in found.items()
        if rows
    ]


def short_finding(summary: pd.DataFrame) -> str:
    """Where the three kinds of growth end, for a title; blank where nothing was grown."""
    parts = [_ending(row, name) for name, row in _named(summary, GROWTH)]
    return f"Against the same training without surgery, {', '.join(parts)}" if parts else ""


def _named(summary: pd.DataFrame, names: Mapping[tuple[str, str], str]) -> list[tuple[str, Any]]:
    """The study's rows of these arms and operations, as far as there are any, each with its name."""
    study = {(row.arm, row.operation): row for row in rows_of(summary) if row.phase == STUDY}
    return [(name, study[key]) for key, name in names.items() if key in study]


def _ending(row: Any, name: str) -> str:
    ends = interval(row.delta_pp, row.delta_lo, row.delta_hi, signed=True, unit="pp")
    return f"{row.surgeries / row.n_seeds:g} {name} end {ends}"


def _at_once(row: Any) -> str:
    lost = interval(row.accuracy_lost, row.accuracy_lost_lo, row.accuracy_lost_hi, unit="pp")
    return f"each changing the output by {change(row.output_change)} and costing {lost} at once"


def dead_finding(curves: pd.DataFrame) -> str:
    """Whether experts went without a token for a whole interval between points of the curves, in one sentence."""
    points = curves[(curves["step"] > 0) & (curves["n_routed"] > 0)]
    dead = points[points["dead_experts"] > 0]
    if dead.empty:
        return (
            f"In each of the {len(points):,} intervals of the learning curves every expert that was there got tokens."
        )
    worst = rows_of(dead.sort_values("dead_experts", kind="stable"))[-1]
    return (
        f"In {len(dead):,} of the {len(points):,} intervals of the learning curves some expert got no token; at most "
        f"{worst.dead_experts:.0f} at once (phase {phase_label(worst.phase)}, {worst.arm}, seed {worst.seed}, up to "
        f"step {worst.step})."
    )


def surgery_cells(summary: pd.DataFrame) -> list[dict[str, str]]:
    """The summary of the surgeries as people read it: one dict of column title and text per row."""
    return [
        {
            "phase": phase_label(row.phase),
            "arm": row.arm,
            "operation": row.operation,
            "surgeries": str(row.surgeries),
            "seeds with any": "" if row.operation == "none" else str(row.seeds_operated),
            "output change": change(row.output_change),
            "accuracy lost at once, pp": interval(row.accuracy_lost, row.accuracy_lost_lo, row.accuracy_lost_hi),
            "median recovery, steps": steps(row.recovery_steps),
            "recovered": percent(row.recovered),
            "final difference, pp": ""
            if row.operation == "none"
            else interval(row.delta_pp, row.delta_lo, row.delta_hi, signed=True),
        }
        for row in rows_of(summary)
    ]


def halves_cells(summary: pd.DataFrame) -> list[dict[str, str]]:
    """What became of the halves of splits as people read it: one dict of column title and text per row."""
    return [
        {
            "phase": phase_label(row.phase),
            "arm": row.arm,
            "pairs": f"{row.pairs:.0f}",
            "each has a quarter of the tokens": percent(row.balanced),
            "distance of outputs": percent(row.output_distance),
            "loss if they traded places, nats per token": interval(
                row.swap_loss, row.swap_loss_lo, row.swap_loss_hi, digits=4, signed=True
            ),
        }
        for row in rows_of(summary[summary["pairs"].notna()])
    ]


def change(value: float) -> str:
    """A relative change: in percent, or as a power of ten where it is tiny; blank for a blank."""
    if 0 < value < 1e-3:
        return f"{value:.1e}"
    return percent(value, 1 if 0 < value < 0.1 else 0)


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage; blank for a blank."""
    return "" if pd.isna(share) else f"{number(100 * share, digits)} %"


def steps(value: float) -> str:
    """A number of steps, `never` if endless; blank for a blank."""
    return "" if pd.isna(value) else "never" if value == inf else f"{value:g}"
