"""Define the classifier: stem -> pre-norm residual MoE blocks -> one linear head per task.

Shapes: B examples, S tokens per example, D model width, G gates, C classes of a task.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from phasegate.model.dense import Conv1d, Conv2d, Linear
from phasegate.model.moe import MoE, Routing
from phasegate.params.fields import Section
from phasegate.params.pretraining import Architecture


@dataclass(frozen=True)
class ModelSpec:
    """Describe a model before any surgery; the sizes that surgery changes are read from the weights."""

    architecture: Architecture
    input_shape: tuple[int, ...]  # (channels, length) or (channels, height, width)
    heads: tuple[int, ...]  # classes of each task; the first task is the one that verdicts are about
    n_gates: int = 1  # one router for all tasks, or one per task


class Output(NamedTuple):
    """Hold the results of one forward pass."""

    logits: tuple[Tensor, ...]  # per task (B, C)
    features: Tensor  # (G, B, D) the input of the heads
    routings: tuple[Routing, ...]  # per block


class Block(nn.Module):
    """Compute x + dropout(MoE(LayerNorm(x))). Running statistics would drift when experts change: no BatchNorm."""

    def __init__(self, arch: Architecture, n_gates: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(arch.width)
        self.moe = MoE(arch.width, arch.n_routed, arch.expert_width, arch.top_k, arch.n_shared, n_gates)
        self.dropout = nn.Dropout(arch.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:  # x (G, N, D) -> the same shape
        y, routing = self.moe(self.norm(x))
        return x + self.dropout(y), routing


class Network(nn.Module):
    """Define what a mixture of experts and a reference model, which has no experts, have in common."""

    spec: Any  # what the network was built from; has `input_shape` and `heads`, the classes of each task
    architecture: Architecture | None = None  # of a mixture of experts

    @property
    def layers(self) -> list[MoE]:
        """Return the MoE layers, first block first."""
        return []

    @property
    def n_routed(self) -> int:
        """Count the routed experts of all blocks."""
        return sum(moe.n_routed for moe in self.layers)


class Model(Network):
    """Classify by a mixture of experts, with a head for each task."""

    spec: ModelSpec
    architecture: Architecture

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, self.architecture = spec, spec.architecture
        arch = spec.architecture
        self.stem = (mlp_stem if arch.stem == "mlp" else conv_stem)(spec.input_shape, arch.width)
        self.blocks = nn.ModuleList(Block(arch, spec.n_gates) for _ in range(arch.blocks))
        self.norm = nn.LayerNorm(arch.width)
        self.heads = nn.ModuleList(Linear(arch.width, classes) for classes in spec.heads)

    @property
    def layers(self) -> list[MoE]:
        return [block.moe for block in self.blocks]  # type: ignore[misc]

    def forward(self, x: Tensor, n_tasks: int = 1) -> Output:
        """Return the logits of the first `n_tasks` tasks for examples x (B, channels, ...)."""
        n_gates = min(n_tasks, self.spec.n_gates)
        tokens = self.stem(x).flatten(2).transpose(1, 2)  # (B, S, D)
        h = tokens.flatten(0, 1).expand(n_gates, -1, -1)
        return self.onward(h, tokens.shape[1], n_tasks)

    def onward(self, h: Tensor, length: int, n_tasks: int = 1, start: int = 0) -> Output:
        """Run the model from block `start`, whose input is h (G, B * S, D) with S = `length`."""
        routings = []
        for block in [*self.blocks][start:]:  # a slice of the ModuleList itself would be built as a module
            h, routing = block(h)
            routings.append(routing)
        if length > 1:
            h = h.view(h.shape[0], -1, length, h.shape[-1]).mean(2)
        features = self.norm(h)
        n_gates = features.shape[0]
        logits = tuple(head(features[min(task, n_gates - 1)]) for task, head in enumerate([*self.heads][:n_tasks]))
        return Output(logits, features, tuple(routings))

    @contextmanager
    def spare_layer(self, block: int) -> Iterator[MoE]:
        """Put a copy of a block's layer in its place while the context lasts, to try surgery on the copy."""
        whole, original = self.blocks[block], self.layers[block]
        whole.moe = copy.deepcopy(original)
        try:
            yield whole.moe
        finally:
            whole.moe = original


Natural = Annotated[int, Field(ge=0, strict=True)]


class Cost(Section):
    """Hold what a model costs. One prediction means the first task of one example."""

    params_total: Natural
    params_active: Natural  # used by one prediction
    flops_per_example: Natural  # of the matrix products and convolutions of one prediction; a multiply-add counts two


def cost(model: Network) -> Cost:
    """Count parameters and, by running one example in float64, floating-point operations."""
    total = active = sum(parameter.numel() for parameter in model.parameters())
    for moe in model.layers:
        active -= (moe.n_routed - moe.top_k) * moe.weights(0).numel() + moe.router[1:].numel()
    if isinstance(model, Model):
        active -= sum(parameter.numel() for parameter in model.heads[1:].parameters())
    multiplied: list[int] = []  # weights of each layer, counted once for every token or position

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(layer, MoE):
            multiplied.append(layer.multiplied * inputs[0][..., 0].numel())
        elif isinstance(layer, Linear | Conv1d | Conv2d):
            multiplied.append(layer.weight.numel() * output.numel() // len(layer.weight))

    probe = copy.deepcopy(model).cpu().double().eval()
    for layer in probe.modules():
        layer.register_forward_hook(count)
    with torch.no_grad():
        probe(torch.zeros(1, *model.spec.input_shape, dtype=torch.float64))
    return Cost(params_total=total, params_active=active, flops_per_example=2 * sum(multiplied))


def mlp_stem(input_shape: tuple[int, ...], width: int) -> nn.Module:
    """Build a stem that makes the whole input one token: (B, ...) -> (B, D, 1)."""
    return nn.Sequential(nn.Flatten(), Linear(prod(input_shape), width), nn.ReLU(), nn.Unflatten(1, (width, 1)))


def conv_stem(input_shape: tuple[int, ...], width: int) -> nn.Module:
    """Build two strided convolutions: (B, channels, length or height x width) -> (B, D, positions / 4 per axis)."""
    conv = convolution(input_shape)
    first = conv(input_shape[0], width, 5, stride=2, padding=2)
    return nn.Sequential(first, nn.ReLU(), conv(width, width, 3, stride=2, padding=1), nn.ReLU())


def convolution(input_shape: tuple[int, ...]) -> type[Conv1d] | type[Conv2d]:
    """Return the convolution for sequences (channels, length) or images (channels, height, width)."""
    return Conv1d if len(input_shape) == 2 else Conv2d
