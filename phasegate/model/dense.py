"""Define layers that every token or example passes, on the compiled product."""

from itertools import product as pairs
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phasegate.model.kernels.functions import product, suit, without_autocast


class Linear(nn.Linear):
    """Compute x @ weight' + bias for x (..., features)."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight.T, self.bias)


class _Rows(torch.autograd.Function):
    """Gather what a kernel covers of padded x (B, positions, channels) -> (B, places of the kernel, its size)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: tuple[int, ...], step: tuple[int, ...]) -> Tensor:
        rows, axes = x, len(kernel)
        for axis in range(axes):
            rows = rows.unfold(axis + 1, kernel[axis], step[axis])
        ctx.shape, ctx.sizes, ctx.kernel, ctx.step = x.shape, rows.shape[: axes + 1], kernel, step
        return rows.movedim(axes + 1, -1).flatten(axes + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        d_x, parts = slope.new_zeros(ctx.shape), slope.view(*ctx.sizes, -1, ctx.shape[-1]).unbind(-2)
        for place, part in zip(pairs(*map(range, ctx.kernel)), parts, strict=True):
            steps = zip(place, ctx.step, ctx.sizes[1:], strict=True)
            d_x[:, *(slice(at, at + step * size, step) for at, step, size in steps)].add_(part)
        return d_x, None, None


@without_autocast
def _convolve(x: Tensor, weight: Tensor, bias: Tensor, conv: nn.Conv1d | nn.Conv2d) -> Tensor:
    """Convolve x (B, channels, length or height x width) as one product; in memory, channels are last."""
    if not suit(x, weight) or x.dim() != weight.dim():  # one example without a batch
        y: Tensor = conv._conv_forward(x, weight, bias)
        return y
    assert not isinstance(conv.padding, str)
    pads = [pad for pad in reversed(conv.padding) for _ in range(2)]
    padded = F.pad(x.movedim(1, -1), [0, 0, *pads])
    rows: Tensor = _Rows.apply(padded, conv.kernel_size, conv.stride)  # type: ignore[no-untyped-call]
    return product(rows, weight.movedim(1, -1).flatten(1).T, bias).movedim(-1, 1)


class Conv1d(nn.Conv1d):
    """Convolve sequences; torch's own convolution gives other bits for other numbers of examples."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(x, self.weight, self.bias, self)


class Conv2d(nn.Conv2d):
    """Convolve images; see `Conv1d`."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(x, self.weight, self.bias, self)
