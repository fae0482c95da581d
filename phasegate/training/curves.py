"""Record the learning curve of a trial."""

from statistics import mean
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from phasegate.model.classifier import Network
from phasegate.model.moe import routing_entropy
from phasegate.records.trial_folder import LOAD_COLUMNS
from phasegate.training.batches import Examples
from phasegate.training.predictions import predict


class Curve:
    """Record points of training loss (mean since the last point, nats), gate accuracy (percent) and routing.

    An expert is dead if it existed at the last point and ran no token since. Surgery moves experts, so their loads are
    measured before it, and all else after it.
    """

    def __init__(self, model: Network, gate: Examples) -> None:
        self.model, self.gate = model, gate
        self.points: list[dict[str, float]] = []
        self.loads: list[list[float]] = []
        self._losses: list[Tensor] = []
        self._slots: list[int] = []
        self._known = [moe.expert_id for moe in model.layers]

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of one step, and how many experts a token ran in it, over all blocks."""
        self._losses.append(loss)
        self._slots.append(sum(moe.slots for moe in self.model.layers))

    def measure_loads(self, step: int) -> None:
        """Add the share of its block's tokens that each expert ran since the last point."""
        for block, moe in enumerate(self.model.layers):
            shares = (moe.load / moe.load.sum().clamp(min=1)).tolist()
            self.loads += [[step, block, *row] for row in zip(moe.expert_id.tolist(), shares, strict=True)]

    def measure(self, step: int) -> int:
        """Add the point of a step, and return the number of correct gate examples."""
        outputs = predict(self.model, self.gate.x)
        logits = torch.cat([output.logits[0] for output in outputs])
        right = int((logits.argmax(-1) == self.gate.y).sum())
        entropies = [routing_entropy(routing.probs[0]) for output in outputs for routing in output.routings]
        self.points.append(
            {
                "step": step,
                "loss": float(torch.stack(self._losses).mean()) if self._losses else float("nan"),
                "accuracy": 100 * right / len(self.gate),
                "n_routed": self.model.n_routed,
                "dead_experts": self._count_dead() if self._losses else 0,
                "routing_entropy": float(torch.cat(entropies).mean()) if entropies else float("nan"),
                "slots": mean(self._slots) if self._slots else float("nan"),
            }
        )
        self._losses.clear()
        self._slots.clear()
        return right

    def _count_dead(self) -> int:
        dead = 0
        for block, moe in enumerate(self.model.layers):
            dead += int(((moe.load == 0) & torch.isin(moe.expert_id, self._known[block])).sum())
            moe.load.zero_()
            self._known[block] = moe.expert_id
        return dead

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return a row per point, and a row per point of the loads, block and expert (by its stable id)."""
        return pd.DataFrame(self.points), pd.DataFrame(self.loads, columns=LOAD_COLUMNS)

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "loads": self.loads} | {
            f"known.{block}": ids for block, ids in enumerate(self._known)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points, self.loads = state["points"], state["loads"]
        self._known = [state[f"known.{block}"].to(self.gate.x.device) for block in range(len(self._known))]
