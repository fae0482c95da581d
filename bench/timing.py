"""Take medians of cases that run in turn, so that a disturbance of the machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Case = Callable[[], object]


@dataclass(frozen=True)
class Entry:
    """Hold one line of the table: ours, the limit that nothing can beat, and the best of other libraries."""

    case: str
    threads: int
    ours_ms: float
    limit_ms: float | None = None
    ratio_to_limit: float | None = None  # limit / ours: one is perfect
    best_peer: str | None = None
    best_peer_ms: float | None = None
    ratio_to_best_peer: float | None = None  # best peer / ours: above one, ours is faster


def medians(cases: Mapping[str, Case], rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Return the median milliseconds of every case; in each round, every case runs once."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm_up + rounds):
        for name, case in cases.items():
            begun = time.perf_counter()
            case()
            if turn >= warm_up:
                taken[name].append(time.perf_counter() - begun)
    return {name: 1e3 * statistics.median(times) for name, times in taken.items()}


def entry(case: str, threads: int, times: Mapping[str, float]) -> Entry:
    """Return the line of a case from the times of `ours`, `limit` if there is one, and any peers."""
    ours, limit = times["ours"], times.get("limit")
    peers = {name: taken for name, taken in times.items() if name not in ("ours", "limit")}
    best = min(peers, key=lambda name: peers[name], default=None)
    return Entry(
        case=case,
        threads=threads,
        ours_ms=round(ours, 3),
        limit_ms=None if limit is None else round(limit, 3),
        ratio_to_limit=None if limit is None else round(limit / ours, 3),
        best_peer=best,
        best_peer_ms=None if best is None else round(peers[best], 3),
        ratio_to_best_peer=None if best is None else round(peers[best] / ours, 3),
    )
