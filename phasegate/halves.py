"""What became of the halves of each split: do two experts that began as one come to differ?"""

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from phasegate.model import Model, Output
from phasegate.moe import MoE, relative_distance
from phasegate.training import EVALUATION_BATCH, Examples, predict

HALVES_COLUMNS = [
    *("block", "expert", "parent", "step"),
    *("smaller_share", "weight_distance", "output_distance", "swap_loss"),
]


def halves(model: nn.Module, surgeries: pd.DataFrame, examples: Examples) -> pd.DataFrame:
    """One row per split of the log whose two halves are both still there, measured on the first examples.

    Columns: step (of the split); smaller_share, of the tokens that reach the split's hyperplane, of the side that
    gets fewer (0 to 0.5); weight_distance, between the halves' weights, and output_distance, between their outputs
    on the tokens that either runs (both relative to the norm of the mean of the two); swap_loss, what each of these
    tokens would lose if the halves traded places (nats).
    """
    splits = surgeries[surgeries["operation"] == "split"].to_dict("records")
    if not isinstance(model, Model) or not splits:
        return pd.DataFrame(columns=HALVES_COLUMNS)
    examples = Examples(examples.x[:EVALUATION_BATCH], examples.y[:EVALUATION_BATCH])
    output = predict(model, examples.x)[0]
    rows = []
    for split in splits:
        moe = model.layers[split["block"]]
        index = {expert: e for e, expert in enumerate(moe.expert_id.tolist())}
        a, b = index.get(split["parent"]), index.get(split["expert"])
        if a is not None and b is not None:
            row = {name: int(split[name]) for name in ("block", "expert", "parent", "step")}
            rows.append(row | _measured(model, split["block"], a, b, output, examples))
    return pd.DataFrame(rows, columns=HALVES_COLUMNS)


@torch.no_grad()
def _measured(model: Model, block: int, a: int, b: int, output: Output, examples: Examples) -> dict[str, float]:
    """The measures of expert indices a and b, which a hyperplane of the layer separates."""
    moe, routing = model.layers[block], output.routings[block]
    (node,) = (moe.path[a] * moe.path[b] == -1).nonzero().flatten().tolist()
    side = moe.path[:, node][routing.experts[0]].sum(-1)  # (N,)
    tokens = routing.tokens[0][((routing.experts[0] == a) | (routing.experts[0] == b)).any(-1)]
    sides = [int((side == sign).sum()) for sign in (-1, 1)]
    weights = [moe.weights(e) for e in (a, b)]
    _trade(moe, a, b)
    loss = [float(F.cross_entropy(o.logits[0], examples.y)) for o in (predict(model, examples.x)[0], output)]
    _trade(moe, a, b)
    return {
        "smaller_share": min(sides) / max(sum(sides), 1),
        "weight_distance": relative_distance(*weights),
        "output_distance": relative_distance(moe.run(a, tokens), moe.run(b, tokens)),
        "swap_loss": (loss[0] - loss[1]) * len(examples) / max(len(tokens), 1),
    }


def _trade(moe: MoE, a: int, b: int) -> None:
    """Let two experts of a family trade their places in its tree."""
    moe.path[[a, b]] = moe.path[[b, a]]
    moe.refresh()
