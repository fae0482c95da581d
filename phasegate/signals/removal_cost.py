"""Measure what it costs to let a signal choose the experts that go, beside the best choice that there was.

Shapes: E experts.
"""

import random
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import combinations
from math import comb, inf

from torch import Tensor

from phasegate.signals.oracle import can_try_all_sets, losses_of_all_sets, losses_without
from phasegate.surgery.probe import Probe

FEW = 16  # ways to break a tie that are tried where each one is a pass over the examples


class Removals:
    """Return the mean loss (nats) of a layer with some of its experts gone; inf where too few would be left.

    All sets are known where the exhaustive oracle can try them. Elsewhere experts are really removed, and the best set
    is found greedily: one after the other, the expert that costs least.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe, self.n_routed, self.exhaustive = probe, probe.layer.n_routed, can_try_all_sets(probe)

    def loss(self, gone: Iterable[int]) -> float:
        """Return the loss with these experts gone, by index."""
        if not self.exhaustive:
            return float(losses_without(self.probe, gone).mean())
        return float(self._of_sets[(1 << self.n_routed) - 1 - sum(1 << expert for expert in gone)])

    def lowest(self, count: int) -> float:
        """Return the loss with the best `count` experts gone."""
        if count >= self.n_routed:
            return inf
        if self.exhaustive:
            return min(map(self.loss, combinations(range(self.n_routed), count)))
        gone: list[int] = []
        for _ in range(count):
            left = [e for e in range(self.n_routed) if e not in gone]
            gone.append(min(left, key=lambda e: self.loss([*gone, e])))
        return self.loss(gone)

    def chosen(self, scores: Tensor, count: int) -> float:
        """Return the loss with the `count` experts of the lowest scores (E,) gone: the mean over ways to break ties."""
        ways = list(lowest_sets(scores.tolist(), count, None if self.exhaustive else FEW))
        return sum(map(self.loss, ways)) / len(ways)

    @cached_property
    def _of_sets(self) -> Tensor:
        return losses_of_all_sets(self.probe)


def lowest_sets(scores: list[float], count: int, most: int | None = None) -> Iterator[tuple[int, ...]]:
    """Yield the sets of `count` indices with the lowest scores: all that a tie leaves, or `most` drawn from them."""
    last = sorted(scores)[count - 1]
    below = tuple(i for i, score in enumerate(scores) if score < last)
    tied, free = [i for i, score in enumerate(scores) if score == last], count - len(below)
    if most is None or comb(len(tied), free) <= most:
        yield from (below + some for some in combinations(tied, free))
    else:
        draws = random.Random(0)
        yield from (below + tuple(draws.sample(tied, free)) for _ in range(most))
