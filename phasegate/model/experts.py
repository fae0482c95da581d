"""Run experts on tokens. Tokens are sorted by expert, so that each expert is one contiguous matrix product.

Shapes: N tokens, K experts of each token, M = N * K rows (pairs of a token and one of its experts), D model width,
H expert width, E experts.

`torch.export` can trace neither `bincount`, whose length depends on the data, nor the grouped product in float32.
Plain operations replace both during an export; on a CPU the exported program gives the same bits.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Sorted(NamedTuple):
    """Hold the order of rows by expert."""

    token: Tensor  # (M,) the token of each row
    place: Tensor  # (N, K) the row of each token and expert
    ends: Tensor  # (E,) int32, the end of each expert's rows


def count(experts: Tensor, n_experts: int) -> Tensor:
    """Count how often `experts` (any shape) holds each expert -> (E,)."""
    if torch.compiler.is_exporting():
        ones = torch.ones_like(experts.flatten())
        return torch.zeros(n_experts, dtype=ones.dtype, device=ones.device).scatter_add(0, experts.flatten(), ones)
    return torch.bincount(experts.flatten(), minlength=n_experts)


def sort(experts: Tensor, counts: Tensor) -> Sorted:
    """Sort the rows of tokens that run `experts` (N, K), of which `counts` (E,) are the numbers of rows."""
    order = experts.flatten().argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return Sorted(order // experts.shape[1], place.view_as(experts), counts.cumsum(0, dtype=torch.int32))


def outputs(x: Tensor, w_in: Tensor, w_out: Tensor, rows: Sorted) -> Tensor:
    """Return the ungated output of each expert of each token x (N, D) -> (N, K, D)."""
    hidden = grouped_mm(x.index_select(0, rows.token), w_in, rows.ends).relu()
    return F.embedding(rows.place, grouped_mm(hidden, w_out, rows.ends))


def mixture(x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, rows: Sorted) -> Tensor:
    """Return for each token x (N, D) the sum of the outputs of its experts, weighted by gates (N, K) -> (N, D).

    Weights are (E, D, H) and (E, H, D). The sum can be differentiated once, by everything but `rows`.
    """
    mixed: Tensor = _Mixture.apply(x, gates, w_in, w_out, *rows)  # type: ignore[no-untyped-call]
    return mixed


class _Mixture(torch.autograd.Function):
    """Compute `mixture` and its gradient, without autograd's copies and with half of its small operations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, token: Tensor, place: Tensor, ends: Tensor
    ) -> Tensor:
        x = x.index_select(0, token)  # (M, D)
        hidden = grouped_mm(x, w_in, ends).relu_()
        y = grouped_mm(hidden, w_out, ends)
        ctx.save_for_backward(x, hidden, y, gates, w_in, w_out, token, place, ends)
        return F.embedding_bag(place, y, per_sample_weights=gates, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, y, gates, w_in, w_out, token, place, ends = ctx.saved_tensors
        slope = slope.index_select(0, token)  # (M, D)
        d_gates = torch.linalg.vecdot(slope, y).take(place)
        gate = torch.empty_like(gates).view(-1).scatter_(0, place.view(-1), gates.reshape(-1))  # (M,)
        slope = slope.mul_(gate.unsqueeze(1))
        d_w_out = grouped_outer(hidden, slope, ends)
        d_hidden = grouped_mm(slope, w_out.transpose(1, 2), ends)
        d_hidden = torch.ops.aten.threshold_backward(d_hidden, hidden, 0)  # the gradient of relu
        d_w_in = grouped_outer(x, d_hidden, ends)
        d_x = F.embedding_bag(place, grouped_mm(d_hidden, w_in.transpose(1, 2), ends), mode="sum")
        return d_x, d_gates, d_w_in, d_w_out, None, None, None


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows x (M, A), grouped by expert up to `ends` (E,), by their expert's weights (E, A, B) -> (M, B)."""
    if can_group(x, *weights.shape[1:]):
        return F.grouped_mm(x, weights, offs=ends)
    return torch.cat([rows @ weight for rows, weight in zip(_split(x, ends), weights, strict=True)])


def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Sum the outer products of rows x (M, A) and y (M, B) in each group up to `ends` (E,) -> (E, A, B)."""
    if can_group(x, x.shape[1], y.shape[1]):
        return F.grouped_mm(x.t(), y, offs=ends)
    return torch.stack([left.T @ right for left, right in zip(_split(x, ends), _split(y, ends), strict=True)])


def can_group(x: Tensor, *sizes: int) -> bool:
    """Tell whether `torch.nn.functional.grouped_mm` can run: float32 on a CPU, rows of 16 bytes, no export."""
    possible = x.dtype == torch.float32 and not x.is_cuda and all(size % 4 == 0 for size in sizes)
    return possible and not torch.compiler.is_exporting()


def _split(x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, ends.diff(prepend=ends.new_zeros(1)).tolist())
