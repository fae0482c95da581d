"""Predict in evaluation mode, in large batches.

Shapes: N examples, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.model.classifier import Network, Output
from phasegate.training.batches import Examples

EVALUATION_BATCH = 2048
PROBE = 256  # signal examples on which surgery's change of the output is measured


@torch.no_grad()
def predict(model: Network, x: Tensor, n_tasks: int = 1) -> list[Output]:
    """Return the outputs for all of x (N, ...), one per batch of `EVALUATION_BATCH`."""
    model.eval()
    return [model(rows, n_tasks) for rows in torch.split(x, EVALUATION_BATCH)]


def first_task_logits(model: Network, x: Tensor) -> Tensor:
    """Return the logits of the first task for all of x, (N, C)."""
    return torch.cat([output.logits[0] for output in predict(model, x)])


def correct(model: Network, examples: Examples) -> int:
    """Count the examples whose label the first head predicts."""
    return int((first_task_logits(model, examples.x).argmax(-1) == examples.y).sum())


@torch.no_grad()
def example_losses(model: Network, examples: Examples) -> Tensor:
    """Return the loss of every example on the first task (N,), nats."""
    return F.cross_entropy(first_task_logits(model, examples.x), examples.y, reduction="none")
