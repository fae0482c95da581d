"""Make the kernels differentiable functions of float32 tensors on the CPU.

Each can be differentiated once. Elsewhere, for other types, and while a program is exported, plain torch stands in for
them: `suit` tells which.
"""

import threading
from array import array
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phasegate.model.kernels.compiled import Kernel, kernels

ZEROS, ONE = torch.zeros(1 << 16), torch.ones(1)
PANEL = 1 << 18  # floats that products need to work on
CPU = torch.device("cpu")


class _Workspace(threading.local):
    """Hold memory that kernels work on, for each thread: fresh pages at every call would cost more than the work."""

    floats = torch.empty(0)

    def addresses(self, *sizes: int) -> list[int]:
        """Return addresses of a panel and of so many floats each, valid until the next call in this thread."""
        ends = list(accumulate((PANEL, *sizes)))
        if len(self.floats) < ends[-1]:
            self.floats = torch.empty(ends[-1])
        return [self.floats.data_ptr() + 4 * place for place in (0, *ends[:-1])]


workspace = _Workspace()


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
        begin.data_ptr(), 0, m, n, k, *workspace.addresses(),
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


def _run(kernel: Kernel, *arguments: Tensor | int) -> None:
    kernel(*[argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments])


def run_experts(x: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Return what the experts (N, K) of tokens x (N, D) put out, without gates or gradient -> (N, K, D)."""
    (n, top_k), (n_experts, width, inside) = experts.shape, w_in.shape
    slots, made = n * top_k, x.new_empty(n * top_k, width)
    slot, place, ends, counts = *experts.new_empty(2, slots), *experts.new_empty(2, n_experts)
    _run(kernels().sort_slots, experts.contiguous(), slot, place, ends, counts, slots, n_experts)
    panel, rows, hidden, out = workspace.addresses(slots * width, slots * inside, n * width)
    weights, sizes = (ONE.expand(slots).contiguous(), w_in, w_out), (n, top_k, n_experts, width, inside)
    sorting = (slot, place, ends)
    _run(kernels().mixture, x.contiguous(), *weights, *sorting, rows, hidden, made, out, ZEROS, panel, *sizes)
    return made[place].view(n, top_k, width)


class Layer(torch.autograd.Function):
    """Route tokens x (G, N, D) to experts, and sum what these put out, weighted by gates."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, router: Tensor, bias: Tensor, node_weight: Tensor, node_offset: Tensor, root: Tensor,
        child: Tensor, w_in: Tensor, w_out: Tensor, top_k: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        (n_gates, n, width), n_families, n_nodes = x.shape, router.shape[1], len(node_weight)
        n_experts, _, inside = w_in.shape
        tokens, slots, x, router = n_gates * n, n_gates * n * top_k, x.contiguous(), router.contiguous()
        logits, gates, y = x.new_empty(n_gates, n, n_families), x.new_empty(n_gates, n, top_k), torch.empty_like(x)
        families, experts = root.new_empty(n_gates, n, top_k), root.new_empty(n_gates, n, top_k)
        counts, order = root.new_empty(n_experts), root.new_empty(2 * slots + n_experts)
        slot = order.data_ptr()
        sorting = (slot, slot + 8 * slots, slot + 16 * slots)
        margins, rows, hidden = x.new_empty(tokens, n_nodes), x.new_empty(2, slots, width), x.new_empty(slots, inside)
        (panel,), tree = workspace.addresses(), (node_weight, node_offset, root, child)
        _run(
            kernels().route, x, router, bias, *tree, logits, gates, families, experts, margins, ZEROS, panel,
            *sorting, counts, n_gates, n, n_families, width, top_k, n_nodes, n_experts,
        )  # fmt: skip
        outputs = rows.data_ptr() + 4 * slots * width
        _run(
            kernels().mixture, x, gates, w_in, w_out, *sorting, rows, hidden, outputs, y, ZEROS, panel,
            tokens, top_k, n_experts, width, inside,
        )  # fmt: skip
        ctx.mark_non_differentiable(families, experts, counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x, router, node_weight, root, child, w_in, w_out, logits, gates, families, margins, rows, hidden, order
        )
        return y, logits, gates, families, experts, counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, slope: Tensor | None, d_logits: Tensor | None, d_gates: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        (
            x, router, node_weight, root, child, w_in, w_out, logits, gates, families, margins, rows, hidden, order
        ) = ctx.saved_tensors  # fmt: skip
        (n_gates, n, width), n_families, top_k, slots = x.shape, router.shape[1], gates.shape[2], gates.numel()
        n_experts, _, inside = w_in.shape
        slope = torch.zeros_like(x) if slope is None else slope.contiguous()
        d_logits, d_gates = _own(d_logits, logits), _own(d_gates, gates)
        d_x, d_mixed, d_w_in, d_w_out, d_router = map(torch.empty_like, (x, gates, w_in, w_out, router))
        panel, some, d_hidden, d_rows = workspace.addresses(slots * width, slots * inside, slots * width)
        slot, outputs = order.data_ptr(), rows.data_ptr() + 4 * slots * width
        _run(
            kernels().mixture_gradient, slope, gates, w_in, w_out, rows, hidden, outputs,
            slot, slot + 8 * slots, slot + 16 * slots, d_x, d_mixed, d_w_in, d_w_out, some, d_hidden, d_rows,
            ONE, ZEROS, panel, n_gates * n, top_k, n_experts, width, inside,
        )  # fmt: skip
        teaches = ctx.needs_input_grad[3] and len(node_weight) > 0
        d_margins = torch.zeros_like(margins) if teaches else margins
        _run(
            kernels().route_gradient, x, router, logits, families, gates, d_gates, d_mixed, margins, root, child,
            d_logits, d_margins, d_x, d_router, ZEROS, panel,
            n_gates, n, n_families, width, top_k, len(node_weight) * teaches,
        )  # fmt: skip
        d_weight = d_offset = None
        if teaches:
            d_x += multiply(d_margins, node_weight).view_as(d_x)
            d_weight = multiply(d_margins.T, x.flatten(0, 1))
            d_offset = multiply(d_margins.new_ones(1, len(d_margins)), d_margins)[0]
        return d_x, d_router, None, d_weight, d_offset, None, None, d_w_in, d_w_out, None


def _own(slope: Tensor | None, like: Tensor) -> Tensor:
    """Return a copy of a gradient that may be changed; zeros where there is none."""
    return torch.zeros_like(like) if slope is None else torch.empty_like(like).copy_(slope)


class Balance(torch.autograd.Function):
    """Compute Switch's balancing loss of logits (G, N, F) and the chosen families (G, N, K), summed over gates."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, families: Tensor) -> Tensor:
        (n_gates, n, n_families), top_k = logits.shape, families.shape[2]
        logits, families = logits.contiguous(), families.contiguous()
        value, slopes, shares = logits.new_zeros(()), torch.empty_like(logits), logits.new_empty(n_families)
        for g in range(n_gates):
            _run(kernels().balance, logits[g], shares, families[g], value, slopes[g], n, n_families, top_k)
        ctx.save_for_backward(slopes)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * slope, None
