"""The tables that a trial leaves in its folder: its learning curve, and for 7b its surgeries."""

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from phasegate import live
from phasegate.model import Model
from phasegate.moe import routing_entropy
from phasegate.references import Reference
from phasegate.training import Examples, predict

CURVE = "curve.csv"
SURGERIES = "surgeries.csv"
SURGERY_COLUMNS = [
    *("step", "block", "operation", "expert", "parent", "n_routed_before", "n_routed_after"),
    *("output_change", "accuracy_before", "accuracy_after", "routing_kl", "recovery_steps"),
]


class Curve:
    """Points of training loss (mean since the last point, nats), gate accuracy (percent) and routing.

    An expert is dead if it got no token since the last point, at which it was there already.
    """

    def __init__(self, model: Model | Reference, gate: Examples) -> None:
        self.model, self.gate = model, gate
        self.points: list[dict[str, float]] = []
        self._losses: list[Tensor] = []
        self._layers = model.layers if isinstance(model, Model) else []
        self._known = [moe.expert_id for moe in self._layers]

    def add_loss(self, loss: Tensor) -> None:
        """One step's loss."""
        self._losses.append(loss)

    def measure(self, step: int) -> int:
        """Add the point of a step; returns how many gate examples are right."""
        outputs = predict(self.model, self.gate.x)
        logits = torch.cat([output.logits[0] for output in outputs])
        right = int((logits.argmax(-1) == self.gate.y).sum())
        entropies = [routing_entropy(routing.probs[0]) for output in outputs for routing in output.routings]
        self.points.append(
            {
                "step": step,
                "loss": float(torch.stack(self._losses).mean()) if self._losses else float("nan"),
                "accuracy": 100 * right / len(self.gate),
                "n_routed": self.model.n_routed if isinstance(self.model, Model) else 0,
                "dead_experts": self._dead_experts() if self._losses else 0,
                "routing_entropy": float(torch.cat(entropies).mean()) if entropies else float("nan"),
            }
        )
        self._losses.clear()
        live.show(self.points)
        return right

    def _dead_experts(self) -> int:
        dead = 0
        for block, moe in enumerate(self._layers):
            dead += int(((moe.load == 0) & torch.isin(moe.expert_id, self._known[block])).sum())
            moe.load.zero_()
            self._known[block] = moe.expert_id
        return dead

    def table(self) -> pd.DataFrame:
        """One row per point."""
        return pd.DataFrame(self.points)

    def state_dict(self) -> dict[str, Any]:
        """What a snapshot right after a point must hold: tensors, and what JSON can hold."""
        return {"points": self.points} | {f"known.{block}": ids for block, ids in enumerate(self._known)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        self.points = state["points"]
        self._known = [state[f"known.{block}"].to(self.gate.x.device) for block in range(len(self._known))]
