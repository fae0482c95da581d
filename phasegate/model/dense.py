"""Define layers that every token or example passes, on the compiled product."""

from itertools import product as pairs
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phasegate.model.kernels.functions import multiply, product, suit


class Linear(nn.Linear):
    """Compute x @ weight' + bias for x (..., features)."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight.T, self.bias)


class _Convolution(torch.autograd.Function):
    """Convolve padded x (B, positions, channels) with weights (places of the kernel * channels, width) and a bias.

    The product multiplies one row for each position of each example: what the kernel covers there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor, kernel: tuple[int, ...], step: tuple[int, ...]) -> Tensor:
        rows, axes = x, len(kernel)
        for axis in range(axes):
            rows = rows.unfold(axis + 1, kernel[axis], step[axis])
        sizes = rows.shape[: axes + 1]
        rows = rows.movedim(axes + 1, -1).reshape(-1, len(w))
        ctx.save_for_backward(rows, w)
        ctx.shape, ctx.sizes, ctx.kernel, ctx.step = x.shape, sizes, kernel, step
        return multiply(rows, w, bias).view(*sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (rows, w), d_x, slope = ctx.saved_tensors, None, slope.reshape(-1, slope.shape[-1])
        if ctx.needs_input_grad[0]:
            d_x = slope.new_zeros(ctx.shape)
            parts = multiply(slope, w.T).view(*ctx.sizes, -1, ctx.shape[-1]).unbind(-2)
            for place, part in zip(pairs(*map(range, ctx.kernel)), parts, strict=True):
                steps = zip(place, ctx.step, ctx.sizes[1:], strict=True)
                d_x[:, *(slice(at, at + step * size, step) for at, step, size in steps)].add_(part)
        d_bias = multiply(slope.new_ones(1, len(slope)), slope)[0]
        return d_x, multiply(slope.T, rows).T, d_bias, None, None


def _convolve(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve x (B, channels, length or height x width); in memory, channels are last."""
    assert not isinstance(conv.padding, str)
    pads = [pad for pad in reversed(conv.padding) for _ in range(2)]
    padded, w = F.pad(x.movedim(1, -1), [0, 0, *pads]), conv.weight.movedim(1, -1).flatten(1).T
    y: Tensor = _Convolution.apply(padded, w, conv.bias, conv.kernel_size, conv.stride)  # type: ignore[no-untyped-call]
    return y.movedim(-1, 1)


class Conv1d(nn.Conv1d):
    """Convolve sequences; torch's own convolution gives other bits for other numbers of examples."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, x) if suit(x) else super().forward(x)


class Conv2d(nn.Conv2d):
    """Convolve images; see `Conv1d`."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, x) if suit(x) else super().forward(x)
