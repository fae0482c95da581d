"""Compare the two halves of each split: do experts that began as one come to differ?"""

import pandas as pd
import torch
import torch.nn.functional as F

from phasegate.model.classifier import Network, Output
from phasegate.model.moe import MoE, relative_distance
from phasegate.training.batches import Examples
from phasegate.training.predictions import EVALUATION_BATCH, predict

KEY = ["block", "expert", "parent", "step"]  # of a split
HALVES_COLUMNS = [*KEY, "smaller_share", "weight_distance", "output_distance", "swap_loss"]


def split_halves(model: Network, surgeries: pd.DataFrame, examples: Examples) -> pd.DataFrame:
    """Measure, on the first examples, every split of the log whose two halves are both still there; one row each.

    Columns: smaller_share, of the tokens that reach the split's hyperplane, of the side that gets fewer (0 to 0.5);
    weight_distance, between the halves' weights, and output_distance, between their outputs on the tokens that either
    runs (both relative to the norm of the mean of the two); swap_loss, what each of these tokens would lose if the
    halves traded places (nats).
    """
    splits = surgeries[surgeries["operation"] == "split"].to_dict("records") if model.layers else []
    examples = Examples(examples.x[:EVALUATION_BATCH], examples.y[:EVALUATION_BATCH])
    output = predict(model, examples.x)[0] if splits else None
    rows = []
    for split in splits:
        index = {expert: e for e, expert in enumerate(model.layers[split["block"]].expert_id.tolist())}
        a, b = index.get(split["parent"]), index.get(split["expert"])
        if output and a is not None and b is not None:
            measured = _measure(model, split["block"], a, b, output, examples)
            rows.append({name: int(split[name]) for name in KEY} | measured)
    return pd.DataFrame(rows, columns=HALVES_COLUMNS)


@torch.no_grad()
def _measure(model: Network, block: int, a: int, b: int, output: Output, examples: Examples) -> dict[str, float]:
    """Measure expert indices a and b, which a hyperplane of the layer separates."""
    moe, routing = model.layers[block], output.routings[block]
    (node,) = (moe.path[a] * moe.path[b] == -1).nonzero().flatten().tolist()
    side = moe.path[:, node][routing.experts[0]].sum(-1)  # (N,)
    tokens = routing.tokens[0][((routing.experts[0] == a) | (routing.experts[0] == b)).any(-1)]
    sides = [int((side == sign).sum()) for sign in (-1, 1)]
    _trade(moe, a, b)
    traded = predict(model, examples.x)[0]
    _trade(moe, a, b)
    lost = float(F.cross_entropy(traded.logits[0], examples.y)) - float(F.cross_entropy(output.logits[0], examples.y))
    return {
        "smaller_share": min(sides) / max(sum(sides), 1),
        "weight_distance": relative_distance(moe.weights(a), moe.weights(b)),
        "output_distance": relative_distance(moe.run(a, tokens), moe.run(b, tokens)),
        "swap_loss": lost * len(examples) / max(len(tokens), 1),
    }


def _trade(moe: MoE, a: int, b: int) -> None:
    """Let two experts of a family trade their places in its tree."""
    moe.path[[a, b]] = moe.path[[b, a]]
    moe.refresh()
