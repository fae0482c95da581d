"""Split or clone many times in a row, without training between, and measure how well the function is kept."""

from pathlib import Path

import pandas as pd
import torch

from phasegate.surgery.hyperplanes import cut
from phasegate.surgery.operations import ExpertManager
from phasegate.surgery.probe import Probe
from phasegate.training import batches, randomness
from phasegate.training.course import load_baseline
from phasegate.training.device import device
from phasegate.training.predictions import PROBE, correct, predict


@torch.no_grad()
def in_a_row(prepared: Path, start: Path, seed: int, operation: str, count: int) -> pd.DataFrame:
    """Split or clone an arbitrary expert of a checkpoint's first layer, `count` times; one row per operation.

    Columns: seed, operation, done, output_change (by all operations so far, relative, on the probe batch), accuracy
    (gate, percent).
    """
    torch.set_num_threads(1)  # the same bits on any machine
    _, signal, gate = batches.load_examples(prepared, device())
    model = load_baseline(start, gate)[0]
    moe, draws = model.layers[0], randomness.generator(seed, "in a row")
    manager, before = ExpertManager(moe), predict(model, signal.x[:PROBE])[0].logits[0]
    rows = []
    for done in range(1, count + 1):
        e = int(torch.randint(moe.n_routed, (1,), generator=draws))
        if operation == "split":
            manager.split(int(moe.expert_id[e]), *cut(Probe(model, 0, signal), e, "principal", draws))
        else:
            manager.clone(int(moe.expert_id[e]))
        after = predict(model, signal.x[:PROBE])[0].logits[0]
        change = float((after - before).norm() / before.norm())
        rows.append((seed, operation, done, change, 100 * correct(model, gate) / len(gate)))
    return pd.DataFrame(rows, columns=["seed", "operation", "done", "output_change", "accuracy"])
