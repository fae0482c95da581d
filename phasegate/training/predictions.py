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
NEWTON, COLDEST = 12, 16.0  # steps, and the largest factor on logits, where a temperature is fitted


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


def calibrated_losses(model: Network, examples: Examples) -> Tensor:
    """Return the losses of `example_losses` at the temperature that makes their mean least (arXiv 1706.04599).

    Newton's method finds the inverse temperature, within `COLDEST` of one.
    """
    logits = first_task_logits(model, examples.x).double()
    right, inverse = logits.gather(1, examples.y[:, None])[:, 0], logits.new_ones(())
    for _ in range(NEWTON):
        probs = (inverse * logits).softmax(-1)
        mean = (probs * logits).sum(-1)
        curvature = ((probs * logits.square()).sum(-1) - mean.square()).mean()
        step = (mean - right).mean() / curvature.clamp(min=torch.finfo(curvature.dtype).tiny)
        inverse = (inverse - step).clamp(inverse / 2, inverse * 2).clamp(1 / COLDEST, COLDEST)
    return F.cross_entropy(inverse * logits, examples.y, reduction="none").to(examples.x.dtype)
