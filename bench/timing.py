"""Take medians of cases that run in turn, so that a disturbance of the machine disturbs all of them."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Case = Callable[[], object]
"""What is timed. A case that runs in another process returns its seconds as a float."""
Request = tuple[str, str, list[object]]
"""A module, a function of it that makes a case, and its arguments."""

PINNED = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}
"""The environment that the study runs in."""


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
            own = case()
            if turn >= warm_up:
                taken[name].append(own if isinstance(own, float) else time.perf_counter() - begun)
    return {name: 1e3 * statistics.median(times) for name, times in taken.items()}


def in_turn(requests: Mapping[str, Request], pinned: set[str], threads: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of cases that run in two processes.

    In one, which runs those in `pinned`, torch computes as in the study. In the other it is as fast as it can be.
    """
    outside = {name: value for name, value in os.environ.items() if name not in PINNED}
    children = {}
    for kind, environment in (("default", outside), ("pinned", outside | PINNED)):
        words = [sys.executable, "-m", "bench.child", kind]
        children[kind] = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )

    def ask(child: subprocess.Popen[str], request: object) -> float:
        assert child.stdin and child.stdout
        print(json.dumps(request), file=child.stdin, flush=True)
        return float(child.stdout.readline())

    def case(name: str) -> Case:
        child, (module, function, arguments) = children["pinned" if name in pinned else "default"], requests[name]
        number = int(ask(child, [module, function, threads, arguments]))
        return lambda: ask(child, number)

    try:
        return medians({name: case(name) for name in requests}, rounds, warm_up=1)
    finally:
        for child in children.values():
            child.communicate()


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
