"""Add tasks to a model with a fixed architecture (phase 7b.3): further heads, and gates per task if wanted."""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from phasegate.model.classifier import Model, Output
from phasegate.model.dense import Linear
from phasegate.surgery.moments import rebuild


@dataclass(frozen=True)
class Tasks:
    """Describe further tasks: label maps (class -> task label), their weight, and whether each has its own gates."""

    label_maps: tuple[tuple[int, ...], ...]
    weight: float
    own_gates: bool


def add_tasks(model: Model, optimizer: Optimizer, classes: list[int], own_gates: bool) -> None:
    """Add a head per task of `classes`, and with `own_gates` a router per task over the shared experts.

    New routers are copies of the first, and new heads touch nothing before them, so the first task's output is
    exactly what it was. Source of the gates: MMoE (Ma et al., KDD 2018).
    """
    device = model.norm.weight.device
    heads = [Linear(model.spec.architecture.width, count, device=device) for count in classes]
    model.heads.extend(heads)
    decay = optimizer.param_groups[0]["weight_decay"]
    optimizer.add_param_group({"params": [head.weight for head in heads], "weight_decay": decay})
    optimizer.add_param_group({"params": [head.bias for head in heads], "weight_decay": 0.0})
    n_gates = len(model.heads) if own_gates else model.spec.n_gates
    for moe in model.layers if own_gates else ():
        rebuild(moe, optimizer, {"gate": [0] * n_gates})
    model.spec = replace(model.spec, heads=(*model.spec.heads, *classes), n_gates=n_gates)


def further_losses(output: Output, y: Tensor, label_maps: list[Tensor]) -> Tensor:
    """Average the cross-entropy (nats) of the tasks after the first; a map (classes,) gives each class a task label."""
    tasks = zip(output.logits[1:], label_maps, strict=True)
    losses = [F.cross_entropy(logits, label_map[y]) for logits, label_map in tasks]
    total: Tensor = sum(losses[1:], start=losses[0])
    return total / len(losses)
