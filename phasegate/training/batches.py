"""Draw batches of examples, shuffled and augmented by seed."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from phasegate.params.pretraining import Training
from phasegate.records.prepared import FIT, Split, load_splits
from phasegate.training.randomness import generator

AT_ONCE = 20  # batches per draw


@dataclass(frozen=True, eq=False)
class Examples:
    """Hold a split in memory: inputs x (N, channels, ...) float32, labels y (N,) int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return self.y.shape[0]


@lru_cache(maxsize=1)
def load_examples(prepared: Path, device: torch.device) -> tuple[Examples, Examples, Examples]:
    """Load and verify the train, signal and gate splits, once per process."""
    fit = load_splits(prepared / FIT)
    return on_device(fit["train"], device), on_device(fit["signal"], device), on_device(fit["gate"], device)


def on_device(split: Split, device: torch.device) -> Examples:
    """Copy a split to a device."""
    return Examples(torch.from_numpy(split.x).to(device), torch.from_numpy(split.y).to(device))


class Batches:
    """Draw shuffled batches without replacement. The batch of a step is the same for every trial with this seed.

    One draw yields `AT_ONCE` augmented batches. The last two draws are kept: the paired forks of a model all see the
    same few batches, and need no new draws.
    """

    def __init__(self, examples: Examples, size: int, seed: int, training: Training) -> None:
        self.examples, self.seed, self.training = examples, seed, training
        self.size = min(size, len(examples))
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the augmented batch of a step (from one)."""
        number, place = divmod(step - 1, AT_ONCE)
        if number not in self._kept:
            self._kept = dict([*self._kept.items()][-1:])
            self._kept[number] = self._draw(number)
        return self._kept[number][place]

    def _draw(self, number: int) -> list[tuple[Tensor, Tensor]]:
        total = len(self.examples)
        per_epoch = total // self.size
        batches = range(number * AT_ONCE, (number + 1) * AT_ONCE)
        epochs = {batch // per_epoch for batch in batches}
        orders = {e: torch.randperm(total, generator=generator(self.seed, "batches", e)) for e in epochs}
        places = ((orders[batch // per_epoch], batch % per_epoch * self.size) for batch in batches)
        rows = torch.cat([order[start : start + self.size] for order, start in places]).to(self.examples.y.device)
        draws = generator(self.seed, "augmentation", number)
        x = augment(self.examples.x[rows], self.training.shift, self.training.noise, draws)
        return list(zip(torch.split(x, self.size), torch.split(self.examples.y[rows], self.size), strict=True))


def augment(x: Tensor, shift: int, noise: float, draws: torch.Generator) -> Tensor:
    """Shift each example (B, channels, ...) circularly by up to `shift` per axis, then add Gaussian noise."""
    for axis in range(2, x.dim()) if shift else ():
        size = x.shape[axis]
        by = torch.randint(-shift, shift + 1, (x.shape[0], 1), generator=draws)
        index = (torch.arange(size) + by) % size  # (B, size)
        shape = [x.shape[0], *(size if dim == axis else 1 for dim in range(1, x.dim()))]
        x = x.gather(axis, index.view(shape).expand_as(x).to(x.device))
    if noise:
        x = x + noise * torch.randn(x.shape, generator=draws).to(x.device)
    return x
