"""How the load of every expert develops: with the log of surgeries, the lineage of a trial's experts."""

from typing import Any

import pandas as pd

from phasegate.model import Model

LOADS = "loads.csv"
LOAD_COLUMNS = ["step", "block", "expert", "share"]


class Loads:
    """The share of its block's tokens that each expert got since the last point, at points of a training."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._rows: list[tuple[int, int, int, float]] = []

    def measure(self, step: int) -> None:
        """Add the point of a step, from the counts that the layers hold; resetting those is the caller's business."""
        for block, moe in enumerate(self.model.layers):
            shares = moe.load / moe.load.sum().clamp(min=1)
            ids = moe.expert_id.tolist()
            self._rows += [(step, block, expert, share) for expert, share in zip(ids, shares.tolist(), strict=True)]

    def table(self) -> pd.DataFrame:
        """One row per point, block and expert (by its stable id)."""
        return pd.DataFrame(self._rows, columns=LOAD_COLUMNS)

    def state_dict(self) -> dict[str, Any]:
        """What a snapshot must hold, as JSON can."""
        return {"rows": self._rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        self._rows = [(step, block, expert, share) for step, block, expert, share in state["rows"]]
