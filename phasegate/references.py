"""Published reference models, trained by our own loop: if they reach their published accuracy, the loop is sound."""

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from phasegate.model import Output, convolution


@dataclass(frozen=True)
class ReferenceSpec:
    """A perceptron with these hidden widths, or a strided convolutional network with these channels."""

    input_shape: tuple[int, ...]
    classes: int
    hidden: tuple[int, ...] | None
    channels: tuple[int, ...] | None


class Reference(nn.Module):
    """A plain classifier with the interface of `model.Model`.

    On MNIST-1D, hidden = () is its paper's logistic regression, (100, 100) its MLP of 15,210 parameters, and
    channels = (25, 25, 25) its CNN of 5,210 (arXiv 2011.14439).
    """

    def __init__(self, spec: ReferenceSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.channels is None:
            self.trunk = nn.Sequential(nn.Flatten(), *_perceptron(prod(spec.input_shape), spec.hidden or ()))
        else:
            self.trunk = nn.Sequential(*_strided(spec.input_shape, spec.channels), nn.Flatten())
        with torch.no_grad():
            width = self.trunk(torch.zeros(1, *spec.input_shape)).shape[1]
        self.head = nn.Linear(width, spec.classes)

    def forward(self, x: Tensor, n_tasks: int = 1) -> Output:
        """Logits for examples x (B, channels, ...)."""
        features = self.trunk(x)
        return Output((self.head(features),), features[None], ())


def _perceptron(inputs: int, hidden: tuple[int, ...]) -> list[nn.Module]:
    return [layer for fan_in, width in pairwise((inputs, *hidden)) for layer in (nn.Linear(fan_in, width), nn.ReLU())]


def _strided(input_shape: tuple[int, ...], channels: tuple[int, ...]) -> list[nn.Module]:
    conv, widths = convolution(input_shape), pairwise((input_shape[0], *channels))
    first = min(5, 2 + min(input_shape[1:]))  # a padded axis of one or two is too short for the published five
    return [
        layer
        for depth, (fan_in, width) in enumerate(widths)
        for layer in (conv(fan_in, width, 3 if depth else first, stride=2, padding=1), nn.ReLU())
    ]
