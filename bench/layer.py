"""Measure the MoE layer, forward and backward, against a dense network of the same active FLOPs and other libraries.

Shapes: N tokens, D model width, H expert width, E experts, K chosen.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import peers
from bench.timing import Case, Entry, Request, entry, in_turn
from phasegate.model.moe import MoE
from phasegate.surgery.operations import ExpertManager


class Size(NamedTuple):
    """Hold the size of a layer and of its input."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return ", ".join(map(str, self))


SIZES = (
    Size(2048, 256, 512, 12, 2),
    Size(2048, 256, 512, 48, 2),
    Size(1280, 64, 128, 12, 2),
    Size(128, 64, 128, 12, 2),
)
MANY = (12, 48, 192)  # experts


def dense(size: Size) -> nn.Module:
    """Return two layers that cost a token as much as K experts: no layer that routes can be faster."""
    hidden = size.top_k * size.hidden
    return nn.Sequential(
        nn.Linear(size.width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, size.width, bias=False)
    )


class Ours(nn.Module):
    """Run our layer on tokens (N, D), with `split` of its experts halved."""

    def __init__(self, size: Size, split: int = 0) -> None:
        super().__init__()
        self.moe = MoE(size.width, size.experts, size.hidden, size.top_k)
        self.moe.node_weight.requires_grad_(False)
        self.moe.node_offset.requires_grad_(False)
        manager = ExpertManager(self.moe)
        for expert in range(split):
            manager.split(expert, torch.randn(size.width), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x[None])[0].squeeze(0)  # type: ignore[no-any-return]


def forward_backward(layer: nn.Module, size: Size) -> Case:
    """Return a case: one pass over random tokens, and its gradient with respect to tokens and weights."""
    x = torch.randn(size.tokens, size.width, requires_grad=True)
    slope, learnt = torch.randn(size.tokens, size.width), [x, *layer.parameters()]

    def case() -> None:
        layer(x).backward(slope)
        for tensor in learnt:
            tensor.grad = None

    return case


def case(name: str, size: list[int], split: int = 0) -> Case:
    """Return the case of a layer by its name: ours, limit, or a peer's."""
    torch.manual_seed(0)
    sized = Size(*size)
    layer = Ours(sized, split) if name == "ours" else dense(sized) if name == "limit" else peers.layers(sized)[name]()
    return forward_backward(layer, sized)


def entries(threads: int, rounds: int) -> Iterator[Entry]:
    """Measure the layer at all sizes, with split experts, and with many experts."""
    for size in SIZES:
        found = {name: request(name, size) for name in ("ours", "limit", *peers.layers(size))}
        yield entry(f"layer ({size})", threads, in_turn(found, {"ours"}, threads, rounds))
    size = Size(1280, 64, 128, 12, 2)
    few, *more = (size._replace(experts=experts) for experts in MANY)
    others = {f"layer ({size}), half of the experts split": request("ours", size, size.experts // 2)}
    for name, ours in (others | {f"layer ({many})": request("ours", many) for many in more}).items():
        found = {"ours": ours, "limit": request("ours", few)}
        yield entry(name, threads, in_turn(found, {"ours", "limit"}, threads, rounds))


def request(name: str, size: Size, split: int = 0) -> Request:
    """Return the request of `case`, to be made in another process."""
    return ("bench.layer", "case", [name, size, split])
