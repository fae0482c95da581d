"""Multi-task learning with a fixed architecture (phase 7b.3): further heads, and gates per task if wanted."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from phasegate.expert_manager import copy_gates
from phasegate.model import Model, Output


def add_tasks(model: Model, optimizer: Optimizer, classes: list[int], own_gates: bool) -> None:
    """Add a head per task of `classes`, and with `own_gates` a router per task over the shared experts.

    New routers are copies of the first, and new heads touch nothing before them, so the first task's output is
    exactly what it was. Source of the gates: MMoE (Ma et al., KDD 2018).
    """
    device = model.norm.weight.device
    heads = [nn.Linear(model.spec.architecture.width, count, device=device) for count in classes]
    model.heads.extend(heads)
    matrices = [head.weight for head in heads]
    optimizer.add_param_group({"params": matrices, "weight_decay": optimizer.param_groups[0]["weight_decay"]})
    optimizer.add_param_group({"params": [head.bias for head in heads], "weight_decay": 0.0})
    n_tasks = len(model.heads)
    if own_gates:
        for moe in model.layers:
            copy_gates(moe, optimizer, n_tasks)
    model.spec = replace(
        model.spec, heads=(*model.spec.heads, *classes), n_gates=n_tasks if own_gates else model.spec.n_gates
    )


def further_losses(output: Output, y: Tensor, label_maps: list[Tensor]) -> Tensor:
    """Mean cross-entropy of the tasks after the first, nats; a map (classes,) gives each class its task label."""
    losses = [
        F.cross_entropy(logits, label_map[y]) for logits, label_map in zip(output.logits[1:], label_maps, strict=True)
    ]
    total: Tensor = sum(losses[1:], start=losses[0])
    return total / len(losses)
