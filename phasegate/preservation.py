"""Does a kind of growth keep the function, however often it is done? Operations in a row, without training between."""

from pathlib import Path

import pandas as pd
import torch

from phasegate import checkpoint, execution
from phasegate.expert_manager import ExpertManager
from phasegate.hyperplanes import halve, principal_direction
from phasegate.model import Model
from phasegate.randomness import generator
from phasegate.training import PROBE, correct, load_examples, predict


@torch.no_grad()
def in_a_row(prepared: Path, start: Path, seed: int, operation: str, count: int) -> pd.DataFrame:
    """Split or clone an arbitrary expert of a checkpoint's first layer, `count` times; one row per operation.

    Columns: seed, operation, done, output_change (of all so far, relative, on the probe batch), accuracy (gate,
    percent).
    """
    torch.set_num_threads(1)  # the same bits on any machine
    _, signal, gate = load_examples(prepared, execution.device())
    model = checkpoint.load(start, gate, gate.x.device).model
    assert isinstance(model, Model), "not a 7a checkpoint"
    moe, draws = model.layers[0], generator(seed, "in a row")
    manager, before = ExpertManager(moe), predict(model, signal.x[:PROBE])[0].logits[0]
    rows = []
    for done in range(1, count + 1):
        e = int(torch.randint(moe.n_routed, (1,), generator=draws))
        if operation == "split":
            routing = predict(model, signal.x)[0].routings[0]
            tokens = routing.tokens[0][(routing.experts[0] == e).any(-1)]
            manager.split(int(moe.expert_id[e]), *halve(tokens, principal_direction(tokens)))
        else:
            manager.clone(int(moe.expert_id[e]))
        after = predict(model, signal.x[:PROBE])[0].logits[0]
        change = float((after - before).norm() / before.norm())
        rows.append((seed, operation, done, change, 100 * correct(model, gate) / len(gate)))
    return pd.DataFrame(rows, columns=["seed", "operation", "done", "output_change", "accuracy"])
