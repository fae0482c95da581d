"""The published story beside ours. Its numbers come from its author's own data: a reference, not a target."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from phasegate.report.tables import interval, rows_of, verdict
from phasegate.study import START


class Milestone(NamedTuple):
    """What the published story did in a phase and what came out, on its author's own data."""

    phase: str
    label: str
    done: str
    accuracy: float | None  # percent
    result: str


STORY = (
    Milestone("q1", "7a Q1", "search for the best training configuration", 70.15, ""),
    Milestone("q2", "7a Q2", "optimise the MoE architecture", 70.73, ""),
    Milestone("p7a", "7a", "baseline: 12 fixed routed experts", 69.80, ""),
    Milestone("p7b1", "7b.1", "control head trained on random labels", 58.30, "NO-GO"),
    Milestone("p7b2", "7b.2", "routing entropy as the signal", None, "broken: checkpoint loaded at 8.95 %"),
    Milestone("p7b3", "7b.3", "fixed experts, multi-task learning", None, "the next step"),
    Milestone("p7b4", "7b.4", "ground-truth signals", None, "the lesson"),
)


def story_cells(decisions: pd.DataFrame, leaderboards: Mapping[str, pd.DataFrame]) -> list[dict[str, str]]:
    """The published story beside ours; leaderboards keyed `q1`, `q2` give the winners' gate accuracies."""
    ours = {
        phase: f"{interval(best.accuracy, best.accuracy_lo, best.accuracy_hi)} (search, gate split)"
        for phase, table in leaderboards.items()
        for best in rows_of(table[table["chosen"].astype(bool)])
    }
    verdicts: dict[str, str] = {}
    for row in rows_of(decisions[decisions["primary"].astype(bool)]):
        ours[row.phase] = interval(row.accuracy, row.accuracy_lo, row.accuracy_hi)
        verdicts[row.phase] = "" if row.phase == START else f"{verdict(row)} ({row.arm})"
    return [
        {
            "phase": step.label,
            "what was done": step.done,
            "story, %": "" if step.accuracy is None else f"{step.accuracy:.2f}",
            "story's result": step.result,
            "here, %": ours.get(step.phase, ""),
            "verdict here": verdicts.get(step.phase, ""),
        }
        for step in STORY
    ]
