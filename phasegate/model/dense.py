"""Define layers that every token or example passes, on the compiled product."""

import torch.nn.functional as F
from torch import Tensor, nn

from phasegate.model.kernels.functions import product, suit


class Linear(nn.Linear):
    """Compute x @ weight' + bias for x (..., features)."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight.T, self.bias)


def _convolve(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve x (B, channels, length or height x width) as one product over all positions of all examples."""
    (channels, *kernel), pads = conv.weight.shape[1:], [int(pad) for pad in conv.padding]
    flat = [(1,) * (4 - x.dim()) + tuple(sizes) for sizes in (kernel, conv.stride)]
    padding = (0,) * (4 - x.dim()) + tuple(pads)
    columns = F.unfold(x.view(len(x), channels, *(1,) * (4 - x.dim()), *x.shape[2:]), flat[0], 1, padding, flat[1])
    rows = columns.transpose(1, 2).flatten(0, 1)  # (B * positions, channels * kernel)
    sizes = [
        (size + 2 * pad - width) // step + 1
        for size, pad, width, step in zip(x.shape[2:], pads, kernel, conv.stride, strict=True)
    ]
    y = product(rows, conv.weight.flatten(1).T, conv.bias)
    return y.view(len(x), *sizes, y.shape[1]).movedim(-1, 1)


class Conv1d(nn.Conv1d):
    """Convolve sequences; torch's own convolution gives other bits for other numbers of examples."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, x) if suit(x) else super().forward(x)


class Conv2d(nn.Conv2d):
    """Convolve images; see `Conv1d`."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, x) if suit(x) else super().forward(x)
