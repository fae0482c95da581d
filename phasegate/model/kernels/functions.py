"""Make the kernels differentiable functions of float32 tensors on the CPU.

Each can be differentiated once. Elsewhere, for other types, and while torch compiles a program or a mode of torch's
watches every operation, plain torch stands in for them: `suit` tells which. A kernel trusts its addresses and numbers,
so nothing reaches one before every shape and type is known to fit; what does not fit goes to plain torch, which says
what is wrong.
"""

import threading
from array import array
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as count_modes
from torch.autograd.function import once_differentiable

from phasegate.model.kernels.compiled import Kernel, kernels

PANEL = 1 << 18  # floats that products need to work on
FLOAT, INT, STRIDED = torch.float32, torch.int64, torch.strided
ONE = torch.ones(1, dtype=FLOAT, device="cpu")  # whatever the default type and device are
PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may have no memory, as where torch traces shapes alone
T = TypeVar("T")


class _Workspace(threading.local):
    """Hold memory that kernels work on, for each thread: fresh pages at every call would cost more than the work."""

    floats, blank = ONE.new_empty(0), ONE.new_zeros(1 << 16)

    def addresses(self, *sizes: int) -> list[int]:
        """Return addresses of a panel and of so many floats each, valid until the next call in this thread."""
        ends = list(accumulate((PANEL, *sizes)))
        if self.floats.shape[0] < ends[-1]:
            self.floats = ONE.new_empty(ends[-1])
        return [self.floats.data_ptr() + 4 * place for place in (0, *ends[:-1])]

    def zeros(self, columns: int) -> Tensor:
        """Return zeros from which the elements of so many columns may start; nobody writes to them."""
        if self.blank.shape[0] < columns:
            self.blank = ONE.new_zeros(columns)
        return self.blank


workspace = _Workspace()


def suit(*tensors: Tensor, indices: tuple[Tensor, ...] = ()) -> bool:
    """Tell whether the kernels run for tensors of float32 and `indices` of int64, as they lie in this machine's memory.

    Not while torch traces: then what is made may have no memory. Nor have efficient zeros any.
    """
    if torch.compiler.is_compiling() or count_modes():
        return False
    for dtype, some in ((FLOAT, tensors), (INT, indices)):
        for x in some:
            if type(x) not in PLAIN or x.dtype is not dtype or not x.is_cpu or x.layout is not STRIDED or x.is_neg():
                return False
            if not x.data_ptr() and x.numel():
                return False
    return True


def _dense(x: Tensor) -> Tensor:
    """Return a gradient whose memory holds its numbers in order: no view of a part, of a transpose or of negatives."""
    if x.is_neg() or x._is_zerotensor():
        x = x.clone()
    if count_modes() and type(x.new_empty(0)) is not Tensor:
        raise TypeError("a gradient can't be traced alone: trace the computation that it belongs to, too")
    return x.contiguous()


def without_autocast(function: Callable[..., T]) -> Callable[..., T]:
    """Let a function of tensors compute in float32 at least where autocast asks for less."""

    @wraps(function)
    def call(x: Tensor, *others: Any) -> T:
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return function(x, *others)
        with torch.autocast(kind, enabled=False):
            return function(*_widen((x, *others)))

    return call


def _widen(value: Any) -> Any:
    """Return a tensor of fewer than 32 bits as float32, and tuples with such tensors; all else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_widen, value))
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


def multiply(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """Return start + a @ b without a gradient: a (M, K), b (K, N) of any strides, start (N,)."""
    (m, k), n = a.shape, b.shape[1]
    if b.stride(1) != 1 and b.stride(0) != 1:
        b = b.contiguous()
    c = a.new_empty(m, n)
    begin = workspace.zeros(n) if start is None else start.contiguous()
    kernels().product(
        a.data_ptr(), a.stride(0), a.stride(1), b.data_ptr(), b.stride(0), b.stride(1), c.data_ptr(), n,
        begin.data_ptr(), 0, m, n, k, *workspace.addresses(),
    )  # fmt: skip
    return c


@without_autocast
def product(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """Return start + a @ b for a (..., K), b (K, N) and start (N,); each element is a chain in the order of k."""
    fits = suit(a, b) and a.dim() > 1 and b.dim() == 2 and a.shape[-1] == b.shape[0]
    if not (fits and (start is None or (suit(start) and start.shape == b.shape[1:]))):
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
        (a, b), (needs_a, needs_b, needs_start), slope = ctx.saved_tensors, ctx.needs_input_grad, _dense(slope)
        d_a = multiply(slope, b.T) if needs_a else None
        if needs_b:  # laid out as b is
            d_b = multiply(a.T, slope) if b.stride(1) == 1 else multiply(slope.T, a).T
        d_start = multiply(slope.new_ones(1, slope.shape[0]), slope)[0] if needs_start else None
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
    ones = x.new_ones(experts.shape)
    _, rows, _, order, _ = _mix(*map(Tensor.contiguous, (x, ones, experts, w_in, w_out)))
    place = order[experts.numel() : 2 * experts.numel()]
    return rows[1][place].view(*experts.shape, x.shape[1])


def _mix(
    x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the experts of each token and sum what they put out: y, rows given and made, hidden, order, counts.

    `order` holds the slot of each row, the row of each slot, and where the rows of each expert end.
    """
    (n_experts, width, inside), top_k, slots = w_in.shape, experts.shape[-1], experts.numel()
    rows, hidden, y = x.new_empty(2, slots, width), x.new_empty(slots, inside), torch.empty_like(x)
    order, counts = experts.new_empty(2 * slots + n_experts), experts.new_empty(n_experts)
    sorting, outputs, (panel,) = _sorting(order, slots), rows.data_ptr() + 4 * slots * width, workspace.addresses()
    strange = array("q", [0])
    _run(kernels().sort_slots, experts, *sorting, counts, strange.buffer_info()[0], slots, n_experts)
    _refuse_strange(strange[0], "experts", n_experts)
    _run(
        kernels().mixture, x, weights, w_in, w_out, *sorting, rows, hidden, outputs, y,
        workspace.zeros(max(width, inside)), panel, slots // top_k, top_k, n_experts, width, inside,
    )  # fmt: skip
    return y, rows, hidden, order, counts


def _refuse_strange(found: int, what: str, count: int) -> None:
    """Raise IndexError if some indices, which are too large or too small, were found."""
    if found:
        indices = "1 index" if found == 1 else f"{found} indices"
        raise IndexError(f"{indices} of {what} out of range: there are {count} {what}")


def _sorting(order: Tensor, slots: int) -> tuple[int, int, int]:
    """Return the addresses of the three parts of an order of slots."""
    return order.data_ptr(), order.data_ptr() + 8 * slots, order.data_ptr() + 16 * slots


class Mix(torch.autograd.Function):
    """Run the experts (..., K) of tokens x (..., D), and sum what these put out by rank, weighted (..., K)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, weights, experts, w_in, w_out = map(Tensor.contiguous, (x, weights, experts, w_in, w_out))
        y, rows, hidden, order, counts = _mix(x, weights, experts, w_in, w_out)
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(x, weights, w_in, w_out, rows, hidden, order)
        return y, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weights, w_in, w_out, rows, hidden, order = ctx.saved_tensors
        (n_experts, width, inside), top_k, slots = w_in.shape, weights.shape[-1], weights.numel()
        d_x, d_weights, d_w_in, d_w_out = map(torch.empty_like, (x, weights, w_in, w_out))
        panel, some, d_hidden, d_rows = workspace.addresses(slots * width, slots * inside, slots * width)
        _run(
            kernels().mixture_gradient, _dense(slope), weights, w_in, w_out, rows, hidden,
            rows.data_ptr() + 4 * slots * width, *_sorting(order, slots), d_x, d_weights, d_w_in, d_w_out, some,
            d_hidden, d_rows, ONE, workspace.zeros(max(width, inside)), panel, slots // top_k, top_k, n_experts, width,
            inside,
        )  # fmt: skip
        return d_x, d_weights, None, d_w_in, d_w_out


class Route(torch.autograd.Function):
    """Route tokens x (G, N, D) to experts; the gates come twice, the second time as weights that teach hyperplanes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, router: Tensor, bias: Tensor, node_weight: Tensor, node_offset: Tensor, root: Tensor,
        child: Tensor, top_k: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        (n_gates, n, width), n_families, n_nodes = x.shape, router.shape[1], node_weight.shape[0]
        given = (x, router, bias, node_weight, node_offset, root, child)
        x, router, bias, node_weight, node_offset, root, child = map(Tensor.contiguous, given)
        logits, gates = x.new_empty(n_gates, n, n_families), x.new_empty(n_gates, n, top_k)
        families, experts = root.new_empty(n_gates, n, top_k), root.new_empty(n_gates, n, top_k)
        margins, (panel,) = x.new_empty(n_gates * n, n_nodes), workspace.addresses()
        _run(
            kernels().route, x, router, bias, node_weight, node_offset, root, child, logits, gates, families, experts,
            margins, workspace.zeros(n_families), panel, n_gates, n, n_families, width, top_k, n_nodes,
        )  # fmt: skip
        ctx.mark_non_differentiable(families, experts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, router, node_weight, root, child, logits, gates, families, margins)
        return logits, gates, gates.clone(), families, experts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_logits: Tensor | None, d_gates: Tensor | None, d_weights: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        x, router, node_weight, root, child, logits, gates, families, margins = ctx.saved_tensors
        (n_gates, n, width), n_families, top_k, n_nodes = x.shape, router.shape[1], gates.shape[2], node_weight.shape[0]
        d_logits, d_gates = _own(d_logits, logits), _own(d_gates, gates)
        d_weights = torch.zeros_like(gates) if d_weights is None else _dense(d_weights)
        d_x, d_router, (panel,) = torch.zeros_like(x), torch.empty_like(router), workspace.addresses()
        teaches = ctx.needs_input_grad[3] and n_nodes > 0
        d_margins = torch.zeros_like(margins) if teaches else margins
        _run(
            kernels().route_gradient, x, router, logits, families, gates, d_gates, d_weights, margins, root, child,
            d_logits, d_margins, d_x, d_router, workspace.zeros(width), panel,
            n_gates, n, n_families, width, top_k, n_nodes * teaches,
        )  # fmt: skip
        d_node = d_offset = None
        if teaches:
            d_x += multiply(d_margins, node_weight).view_as(d_x)
            d_node = multiply(d_margins.T, x.flatten(0, 1))
            d_offset = multiply(d_margins.new_ones(1, n_gates * n), d_margins)[0]
        return d_x, d_router, None, d_node, d_offset, None, None, None


def _own(slope: Tensor | None, like: Tensor) -> Tensor:
    """Return a copy of a gradient that may be changed; zeros where there is none."""
    return torch.zeros_like(like) if slope is None else _dense(slope).clone()


class Balance(torch.autograd.Function):
    """Compute Switch's balancing loss of logits (G, N, F) and the chosen families (G, N, K), summed over gates."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, families: Tensor) -> Tensor:
        (n_gates, n, n_families), top_k = logits.shape, families.shape[2]
        logits, families, strange = logits.contiguous(), families.contiguous(), array("q", [0])
        value, slopes, shares = logits.new_zeros(()), torch.empty_like(logits), logits.new_empty(n_families)
        for g in range(n_gates):
            found = strange.buffer_info()[0]
            _run(kernels().balance, logits[g], shares, families[g], value, slopes[g], found, n, n_families, top_k)
            _refuse_strange(strange[0], "families", n_families)
        ctx.save_for_backward(slopes)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * slope, None
