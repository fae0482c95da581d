"""What it costs to let a signal choose the experts that go, beside the best choice that there was.

Shapes: E experts.
"""

import random
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import combinations
from math import comb, inf

from torch import Tensor

from phasegate.oracle import MOST_EXPERTS, loss_without, losses_of_all_sets
from phasegate.probe import Probe

FEW = 16  # ways to break a tie that are tried where each one is a pass over the examples


class Removals:
    """The mean loss (nats) of a layer with any of its experts gone.

    All sets are known where the exhaustive oracle can try them; else experts are really removed, and the best set is
    the greedy one: one after the other the expert that costs least.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe, self.n_routed = probe, probe.layer.n_routed
        self.exhaustive = self.n_routed <= MOST_EXPERTS and not probe.layer.path.shape[1] and probe.length == 1

    def loss(self, gone: Iterable[int]) -> float:
        """With these experts gone, by index; inf where too few would be left."""
        if not self.exhaustive:
            return loss_without(self.probe, gone)
        alive = (1 << self.n_routed) - 1
        for expert in gone:
            alive &= ~(1 << expert)
        return float(self._of_sets[alive])

    def lowest(self, count: int) -> float:
        """With the best `count` experts gone; inf where too few would be left."""
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
        """With the `count` experts of the lowest scores (E,) gone: the mean over all ways to break ties.

        At most `FEW` of them where experts have to be removed for each.
        """
        ways = list(lowest_sets(scores.tolist(), count, None if self.exhaustive else FEW))
        return sum(map(self.loss, ways)) / len(ways)

    @cached_property
    def _of_sets(self) -> Tensor:
        return losses_of_all_sets(self.probe)


def lowest_sets(scores: list[float], count: int, most: int | None = None) -> Iterator[tuple[int, ...]]:
    """The sets of `count` indices with the lowest scores: one, unless a tie leaves a choice.

    Of more than `most` such sets, so many are drawn.
    """
    last = sorted(scores)[count - 1]
    below = tuple(i for i, score in enumerate(scores) if score < last)
    tied, free = [i for i, score in enumerate(scores) if score == last], count - len(below)
    if most is None or comb(len(tied), free) <= most:
        yield from (below + some for some in combinations(tied, free))
    else:
        draws = random.Random(0)
        yield from (below + tuple(draws.sample(tied, free)) for _ in range(most))
