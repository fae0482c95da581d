"""Measure a step of 7a training, against the same step of a dense network with the same active FLOPs."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn

from bench.timing import Case, Entry, Request, entry, in_turn
from phasegate.model.classifier import Model, ModelSpec, Network, Output
from phasegate.params import load_params
from phasegate.params.pretraining import Architecture
from phasegate.training.batches import Batches, Examples
from phasegate.training.loop import fit, make_optimizer
from phasegate.training.losses import plain_objective

INPUT, CLASSES = (1, 40), 10
STEPS = 20  # of training at a time


class Dense(Network):
    """Classify as our model does, with one dense block in place of its experts that costs an example as much."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, hidden = architecture.width, architecture.top_k * architecture.expert_width
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(prod(INPUT), width), nn.ReLU())
        self.block = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, n_tasks: int = 1) -> Output:
        h = self.stem(x)
        features = self.norm(h + self.block(h))
        return Output((self.head(features),), features[None], ())


def entries(threads: int, rounds: int) -> Iterator[Entry]:
    """Measure a step with the default number of experts per token, and with four."""
    params = load_params()
    for top_k in (params.model.top_k, 4):
        cases: dict[str, Request] = {
            "ours": ("bench.step", "training_case", [top_k]),
            "limit": ("bench.step", "training_case", [top_k, True]),
        }
        each = {name: taken / STEPS for name, taken in in_turn(cases, {"ours"}, threads, rounds).items()}
        yield entry(f"7a training step, batch {params.training.batch}, top {top_k}", threads, each)


def training_case(top_k: int, dense: bool = False) -> Case:
    """Return a case: some steps of training the default architecture, with K experts per token, on random examples."""
    params, draws = load_params(), torch.Generator().manual_seed(0)
    architecture = params.model.model_copy(update={"top_k": top_k})
    model = Dense(architecture) if dense else Model(ModelSpec(architecture, INPUT, (CLASSES,)))
    examples = Examples(torch.randn(4000, *INPUT, generator=draws), torch.randint(CLASSES, (4000,), generator=draws))
    training = params.training
    optimizer = (
        torch.optim.AdamW(model.parameters(), fused=True) if dense else make_optimizer(model.parameters(), training)
    )
    batches, objective = Batches(examples, training.batch, 0, training), plain_objective(model, 0.0)
    return lambda: fit(model, optimizer, batches, objective, [training.lr] * STEPS, lambda step, loss: None)
