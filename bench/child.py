"""Time cases in a process of its own: `python -m bench.child default|pinned` answers requests, one JSON value a line.

A request is a module, a function of it that makes a case, and its arguments; or the number of a case, to be timed.
"""

import json
import os
import sys
import time
from importlib import import_module

import torch

from bench.timing import Case

SECONDS = 0.03  # of one turn


def main() -> None:
    """Answer each request with the number of the new case, or with the seconds that one call took."""
    if "default" in sys.argv:  # torch settles how it computes before phasegate is there to pin it
        torch.mm(torch.ones(64, 64), torch.ones(64, 64)).exp()
    answers, cases = os.fdopen(os.dup(1), "w", encoding="utf-8"), list[Case]()
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            print(seconds(cases[request]), file=answers, flush=True)
        else:
            module, function, threads, arguments = request
            torch.set_num_threads(threads)
            cases.append(getattr(import_module(module), function)(*arguments))
            print(len(cases) - 1, file=answers, flush=True)


def seconds(case: Case) -> float:
    """Call a case once, since the other process has emptied the caches, then time some calls: the mean."""
    begun = time.perf_counter()
    case()
    calls = max(1, int(SECONDS / (time.perf_counter() - begun)))
    begun = time.perf_counter()
    for _ in range(calls):
        case()
    return (time.perf_counter() - begun) / calls


if __name__ == "__main__":
    main()
