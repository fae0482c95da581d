"""Make the kernels differentiable functions of float32 tensors on the CPU.

Each can be differentiated once. Elsewhere, for other types, and while a program is exported, plain torch stands in for
them: `suit` tells which.
"""

from array import array
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phasegate.kernels.compiled import kernels

ZEROS = torch.zeros(1 << 16)
PANEL = torch.empty(1 << 14)
CPU = torch.device("cpu")


def suit(x: Tensor) -> bool:
    """Tell whether the kernels run for a tensor."""
    return x.dtype == torch.float32 and x.device == CPU and not torch.compiler.is_exporting()


def multiply(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """Return start + a @ b without a gradient: a (M, K), b (K, N) of any strides, start (N,)."""
    (m, k), n = a.shape, b.shape[1]
    if b.stride(1) != 1 and b.stride(0) != 1:
        b = b.contiguous()
    c = a.new_empty(m, n)
    begin = ZEROS if start is None else start
    kernels().product(
        a.data_ptr(), a.stride(0), a.stride(1), b.data_ptr(), b.stride(0), b.stride(1), c.data_ptr(), n,
        begin.data_ptr(), 0, m, n, k, PANEL.data_ptr(),
    )  # fmt: skip
    return c


def product(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """Return start + a @ b for a (..., K), b (K, N) and start (N,); each element is a chain in the order of k."""
    if not suit(a):
        return a @ b if start is None else a @ b + start
    c: Tensor = Product.apply(a.flatten(0, -2), b, start)  # type: ignore[no-untyped-call]
    return c.view(*a.shape[:-1], b.shape[1])


class Product(torch.autograd.Function):
    """Multiply matrices, and leave out the gradients that nobody needs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, start: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        return multiply(a, b, start)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), (needs_a, needs_b, needs_start), slope = ctx.saved_tensors, ctx.needs_input_grad, slope.contiguous()
        d_a = multiply(slope, b.T) if needs_a else None
        if needs_b:  # laid out as b is
            d_b = multiply(a.T, slope) if b.stride(1) == 1 else multiply(slope.T, a).T
        d_start = multiply(slope.new_ones(1, len(slope)), slope)[0] if needs_start else None
        return d_a, d_b if needs_b else None, d_start


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether every number of some tensors is finite."""
    addresses, found = array("q"), array("q", [-1])
    for tensor in tensors:
        if not (suit(tensor) and tensor.is_contiguous()):
            if not tensor.isfinite().all():
                return False
        else:
            addresses.extend((tensor.data_ptr(), tensor.numel()))
    kernels().find_not_finite(addresses.buffer_info()[0], found.buffer_info()[0], len(addresses) // 2)
    return found[0] < 0


def sort_slots(experts: Tensor, n_experts: int) -> tuple[Tensor, ...]:
    """Return what `Sorted` in phasegate/model/experts.py holds, for the expert of each slot (M,)."""
    experts = experts.contiguous()
    made = (torch.empty_like(experts), torch.empty_like(experts), *experts.new_empty(2, n_experts))
    kernels().sort_slots(*[tensor.data_ptr() for tensor in (experts, *made)], len(experts), n_experts)
    return made


class Mixture(torch.autograd.Function):
    """Sum what the experts of each token put out, weighted by gates."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, slot: Tensor, place: Tensor, ends: Tensor
    ) -> Tensor:
        (n, width), (n_experts, _, inside), top_k = x.shape, w_in.shape, gates.shape[1]
        x, gates, w_in, w_out = x.contiguous(), gates.contiguous(), w_in.contiguous(), w_out.contiguous()
        rows, hidden, y, out = (
            x.new_empty(n * top_k, width), x.new_empty(n * top_k, inside), x.new_empty(n * top_k, width),
            torch.empty_like(x),
        )  # fmt: skip
        inputs = (x, gates, w_in, w_out, slot, place, ends, rows, hidden, y, out, ZEROS, PANEL)
        kernels().mixture(*[tensor.data_ptr() for tensor in inputs], n, top_k, n_experts, width, inside)
        ctx.save_for_backward(gates, w_in, w_out, rows, hidden, y, slot, place, ends)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gates, w_in, w_out, rows, hidden, y, slot, place, ends = ctx.saved_tensors
        slope = slope.contiguous()
        (n, top_k), (n_experts, width, inside) = gates.shape, w_in.shape
        made = [torch.empty_like(tensor) for tensor in (slope, gates, w_in, w_out, rows, hidden, rows)]
        ones = slope.new_ones(n * top_k)
        inputs = (slope, gates, w_in, w_out, rows, hidden, y, slot, place, ends, *made, ones, ZEROS, PANEL)
        kernels().mixture_gradient(*[tensor.data_ptr() for tensor in inputs], n, top_k, n_experts, width, inside)
        return (*made[:4], None, None, None)


class Route(torch.autograd.Function):
    """Choose and weigh the experts of tokens."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, router: Tensor, bias: Tensor, node_weight: Tensor, node_offset: Tensor, root: Tensor,
        child: Tensor, top_k: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        (n_gates, n, width), n_families, n_nodes = x.shape, router.shape[1], len(node_weight)
        n_experts, tokens = len(child) - n_nodes, n_gates * n
        x, router = x.contiguous(), router.contiguous()
        logits, gates = x.new_empty(n_gates, n, n_families), x.new_empty(n_gates, n, top_k)
        families, experts = (torch.empty(n_gates, n, top_k, dtype=torch.int64) for _ in range(2))
        slot, place = (torch.empty(tokens * top_k, dtype=torch.int64) for _ in range(2))
        ends, counts = torch.empty(2, n_experts, dtype=torch.int64)
        margins = x.new_empty(tokens, n_nodes)
        tensors = (
            x, router, bias, node_weight, node_offset, root, child, logits, gates, families, experts, margins,
            ZEROS, PANEL, slot, place, ends, counts,
        )  # fmt: skip
        sizes = (n_gates, n, n_families, width, top_k, n_nodes, n_experts)
        kernels().route(*[tensor.data_ptr() for tensor in tensors], *sizes)
        ctx.mark_non_differentiable(families, experts, slot, place, ends, counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, router, logits, families, gates)
        return logits, gates, families, experts, slot, place, ends, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor | None, d_gates: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, router, logits, families, gates = ctx.saved_tensors
        (n_gates, n, width), n_families, top_k = x.shape, router.shape[1], gates.shape[2]
        d_logits = torch.zeros_like(logits) if d_logits is None else d_logits.clone(memory_format=torch.contiguous_format)
        d_gates = torch.zeros_like(gates) if d_gates is None else d_gates.contiguous()
        d_x, d_router = torch.empty_like(x), torch.empty_like(router)
        tensors = (d_gates, x, router, logits, families, gates, d_logits, d_x, d_router, ZEROS, PANEL)
        sizes = (n_gates, n, n_families, width, top_k, ctx.needs_input_grad[0])
        kernels().route_gradient(*[tensor.data_ptr() for tensor in tensors], *sizes)
        return d_x, d_router, None, None, None, None, None, None
