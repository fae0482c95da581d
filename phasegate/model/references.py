"""Define published reference models. If our loop trains them to their published accuracy, the loop is sound."""

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from phasegate.model.classifier import Model, ModelSpec, Network, Output, convolution
from phasegate.model.dense import Linear


@dataclass(frozen=True)
class ReferenceSpec:
    """Describe a perceptron by its hidden widths, or a strided convolutional network by its channels."""

    input_shape: tuple[int, ...]
    classes: int
    hidden: tuple[int, ...] | None
    channels: tuple[int, ...] | None

    @property
    def heads(self) -> tuple[int, ...]:
        """Return the classes of each task: there is one task."""
        return (self.classes,)


class Reference(Network):
    """Classify without experts.

    On MNIST-1D, hidden = () is its paper's logistic regression, (100, 100) its MLP of 15,210 parameters, and
    channels = (25, 25, 25) its CNN of 5,210 (arXiv 2011.14439).
    """

    spec: ReferenceSpec

    def __init__(self, spec: ReferenceSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.channels is None:
            widths = pairwise((prod(spec.input_shape), *(spec.hidden or ())))
            layers = [layer for fan_in, width in widths for layer in (Linear(fan_in, width), nn.ReLU())]
            self.trunk = nn.Sequential(nn.Flatten(), *layers)
        else:
            self.trunk = nn.Sequential(*convolutions(spec.input_shape, spec.channels), nn.Flatten())
        with torch.no_grad():
            width = self.trunk(torch.zeros(1, *spec.input_shape)).shape[1]
        self.head = Linear(width, spec.classes)

    def forward(self, x: Tensor, n_tasks: int = 1) -> Output:
        features = self.trunk(x)
        return Output((self.head(features),), features[None], ())


def convolutions(input_shape: tuple[int, ...], channels: tuple[int, ...]) -> list[nn.Module]:
    """Build strided convolutions. A padded axis of one or two is too short for the published first kernel of five."""
    conv, first = convolution(input_shape), min(5, 2 + min(input_shape[1:]))
    layers: list[nn.Module] = []
    for fan_in, width in pairwise((input_shape[0], *channels)):
        layers += [conv(fan_in, width, 3 if layers else first, stride=2, padding=1), nn.ReLU()]
    return layers


Spec = ModelSpec | ReferenceSpec


def build(spec: Spec) -> Network:
    """Build the network that a specification describes, with random weights."""
    return Model(spec) if isinstance(spec, ModelSpec) else Reference(spec)
