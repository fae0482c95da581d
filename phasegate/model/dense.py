"""Define layers that every token or example passes, on the compiled product."""

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from phasegate.kernels.functions import product, suit


class Linear(nn.Linear):
    """Compute x @ weight' + bias for x (..., features)."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight.T, self.bias)


def _convolve(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve x (B, channels, length or height x width) as one product over all positions of all examples."""
    axes, (channels, *kernel) = x.dim() - 2, conv.weight.shape[1:]
    flat = [(1,) * (2 - axes) + tuple(sizes) for sizes in (kernel, conv.stride)]
    padding = (0,) * (2 - axes) + tuple(map(int, conv.padding))
    columns = F.unfold(x.view(len(x), channels, *(1,) * (2 - axes), *x.shape[2:]), flat[0], 1, padding, flat[1])
    rows = columns.transpose(1, 2).flatten(0, 1)  # (B * positions, channels * kernel)
    sizes = [
        (size + 2 * int(pad) - width) // step + 1
        for size, pad, width, step in zip(x.shape[2:], conv.padding, kernel, conv.stride, strict=True)
    ]
    y = product(rows, conv.weight.flatten(1).T, conv.bias)
    return y.view(len(x), prod(sizes), y.shape[1]).transpose(1, 2).unflatten(2, sizes)


class Conv1d(nn.Conv1d):
    """Convolve sequences; torch's own convolution gives other bits for other numbers of examples."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, x) if suit(x) else super().forward(x)


class Conv2d(nn.Conv2d):
    """Convolve images; see `Conv1d`."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, x) if suit(x) else super().forward(x)
