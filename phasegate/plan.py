"""What `dvc repro` would run now, why, and about how long it takes: `python -m phasegate.plan`, or `make plan`.

Nothing is run or changed. The time is an estimate (`phasegate.estimates`), and says where it comes from.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phasegate import changes
from phasegate.errors import UserError, told_by
from phasegate.estimates import COMMITTED, HERE, ROUGH, UNKNOWN, Estimate, Estimator, locked
from phasegate.params import load_params
from phasegate.sections import load_yaml

WIDTH = 64  # characters of a reason


def main() -> None:
    """Print the plan for the folder that this runs in."""
    asked = _ask_dvc()
    params, now = load_params(), load_yaml(Path("params.yaml"))
    stages = changes.expanded(load_yaml(Path("dvc.yaml"))["stages"])
    then = locked(lock) if (lock := Path("dvc.lock")).exists() else {}
    from phasegate import execution  # it imports torch: while DVC thinks

    workers = execution.workers()
    estimator = Estimator(Path(), params, workers)
    plan = changes.plan(stages, _answer(asked), then, now)
    print("\n".join(said(plan, {name: estimator.estimate(name) for name in stages}, workers)))


def said(plan: changes.Plan, estimates: Mapping[str, Estimate], workers: int) -> list[str]:
    """The plan in lines: what would run and why, how long each takes and all together, and how sure that is."""
    if not plan.stale and not plan.absent:
        return ["Nothing would run: the results are those of the parameters and the code."]
    would = {name: reason for name in estimates if (reason := plan.stale.get(name) or plan.absent.get(name))}
    if not plan.stale:
        lines = [
            "Nothing would run but for missing files: the results are those of the parameters and the code,",
            "as `dvc repro --dry --allow-missing` says too. Data and models are not here, and need not be; plain",
            f"`dvc repro` would make them again, with {len(would)} stages and in {_total(would, estimates)}.",
        ]
        return [*lines, "", *_caveats(would, estimates, workers)]
    count = f"{len(would)} of {len(estimates)} stages"
    lines = [f"{count} would run:" if len(would) != 1 else "1 stage would run:", ""]
    longest = max(map(len, would))
    for name, reason in would.items():
        text = reason if len(reason) <= WIDTH else f"{reason[: WIDTH - 1]}…"
        lines.append(f"  {name:<{longest}}  {text:<{WIDTH}}  {_minutes(estimates[name].seconds):>9}".rstrip())
    return [*lines, "", f"All of it: {_total(would, estimates)}.", *_caveats(would, estimates, workers)]


def _total(would: Iterable[str], estimates: Mapping[str, Estimate]) -> str:
    """`about 23 min`, or that the time is unknown where that of some stages is."""
    known = [seconds for name in would if (seconds := estimates[name].seconds) is not None]
    unknown = sum(estimates[name].seconds is None for name in would)
    if not known:
        return "an unknown time"
    if unknown:
        new = f"{unknown} stage{'s' if unknown > 1 else ''}"
        return f"an unknown time: {new} never ran on this data set, the rest takes about {_minutes(sum(known))}"
    return f"about {_minutes(sum(known))}"


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return "< 1 min" if seconds < 30 else f"{max(1, round(seconds / 60)):,} min"


def _caveats(would: Iterable[str], estimates: Mapping[str, Estimate], workers: int) -> list[str]:
    """Where the numbers come from."""
    sources = [estimates[name].source for name in would]
    told = {
        HERE: "what their trials last took on this machine",
        COMMITTED: "what the committed study's trials took on its machine",
        ROUGH: "rough constants of two slow cores",
    }
    parts = [f"{count}: {text}" for source, text in told.items() if (count := sources.count(source))]
    if unknown := sources.count(UNKNOWN):
        parts.append(f"{unknown}: unknown, since no run on this data set is known")
    workers_said = f"{workers} worker{'s' if workers != 1 else ''}"
    return [
        f"An estimate for {workers_said} (PHASEGATE_WORKERS). Stages by what it rests on:",
        *(f"  {part}" for part in parts),
        "Trials that are kept in .phasegate/trials, and runs in DVC's cache, make it shorter.",
    ]


def _ask_dvc() -> "subprocess.Popen[str]":
    words = ["dvc", "status", "--json"]
    try:
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise UserError("there is no command dvc: activate .venv, or use `make plan`") from None


def _answer(asked: "subprocess.Popen[str]") -> dict[str, Any]:
    """What DVC says of every stage. Raises UserError with its own words if it fails."""
    out, err = asked.communicate()
    if asked.returncode:
        lines = [line for line in err.splitlines() if line.startswith("ERROR: ")] or err.splitlines()[-1:]
        raise UserError(f"dvc status failed: {' '.join(lines).removeprefix('ERROR: ')}")
    status: dict[str, Any] = json.loads(out)
    return status


if __name__ == "__main__":
    try:
        with told_by("plan"):
            main()
    except KeyboardInterrupt:
        sys.exit(130)
