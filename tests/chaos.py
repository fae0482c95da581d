"""Kill the small study again and again, end it, and compare it with one that was left alone.

    python -m tests.chaos --kills 200 --seed 0

A worker, a stage and dvc itself are killed in turn (SIGKILL), after random times: some while they start, some only
when the study has come further. When a study ends, its models, data and reports must have the bits of the undisturbed
one, and the next study begins, until all kills are done.
"""

import argparse
import math
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from phasegate.base.paths import TIMINGS
from tests.small_study import Checkout, content

TARGETS = ("worker", "stage", "dvc")
SECONDS = (0.3, 60.0)  # from the start of a run to its kill, or to the next moment at which there is something to kill
LONGEST = 900  # seconds of any one run
COMPARED = ("models", "data", "reports")


def results(folder: Path) -> dict[str, str]:
    """All models, data and reports that a study leaves, by name, recorded times apart."""
    found = {f"{name}/{path}": text for name in COMPARED for path, text in content(folder / name).items()}
    return {name: text for name, text in found.items() if name != str(TIMINGS)}


@dataclass
class Done:
    """What was done."""

    kills: Counter[str] = field(default_factory=Counter)  # of each of `TARGETS`
    places: Counter[str] = field(default_factory=Counter)  # in each stage, or before the first of a run
    runs: int = 0
    studies: int = 0  # that ended

    def __str__(self) -> str:
        kills = ", ".join(f"{target} {self.kills[target]}" for target in TARGETS)
        return f"kills: {kills}, at {len(self.places)} places; runs: {self.runs}, studies: {self.studies}"


def chaos(checkout: Checkout, expected: dict[str, str], kills: int, seed: int) -> Done:
    """Kill studies in `checkout`, which begins with none, until so many kills are done; each must end as `expected`."""
    draws, done = random.Random(seed), Done()
    while (count := done.kills.total()) < kills or not done.studies:
        target = TARGETS[count % len(TARGETS)] if count < kills else None
        done.runs += 1
        ended, stage = run_and_kill(checkout, target, math.exp(draws.uniform(*map(math.log, SECONDS))))
        if stage and target:
            done.kills[target] += 1
            done.places[stage] += 1
        if ended:
            found = results(checkout.folder)
            differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            assert not differ, f"after {done}: {len(differ)} files differ, as {differ[:5]}"
            done.studies += 1
            checkout.command("git", "clean", "-fdxq")  # no results, no kept trials, no cache
        print(done, file=sys.stderr, flush=True)
    return done


def run_and_kill(checkout: Checkout, target: str | None, seconds: float) -> tuple[bool, str]:
    """Run what `make repro` runs, and kill a worker, a stage or dvc itself after so many seconds.

    Returns whether it ended, and the last stage that it had begun when it was hit; empty if it was not.
    """
    if repaired := checkout.command("python", "-m", "phasegate.tools.repair"):
        print(repaired, end="", file=sys.stderr)
    log = checkout.folder.parent / "log"
    with log.open("wb") as file:
        environment = checkout.environment | {"PYTHONUNBUFFERED": "1"}  # a killed dvc has said where it was
        words = {"cwd": checkout.folder, "env": environment, "stdout": file, "stderr": subprocess.STDOUT}
        dvc = psutil.Popen(["dvc", "repro"], **words)
        start, hit = time.monotonic(), False
        try:
            while dvc.poll() is None:
                time.sleep(0.01)
                if target and not hit and time.monotonic() - start > seconds and (victim := find(dvc, target)):
                    with suppress(psutil.NoSuchProcess):  # it ended just now
                        victim.send_signal(signal.SIGKILL)
                        hit = True
                assert time.monotonic() - start < LONGEST, f"dvc repro has not ended for {LONGEST} s"
        finally:
            if dvc.poll() is None:
                dvc.kill()
    said = log.read_text(errors="replace")
    stage = ["before the first", *re.findall(r"Running stage '([^']+)'", said)][-1] if hit else ""
    assert "Traceback" not in said, said
    assert hit or dvc.returncode == 0, f"without a kill, dvc repro ended with {dvc.returncode}:\n{said}"
    return dvc.returncode == 0, stage


def find(dvc: psutil.Process, target: str) -> psutil.Process | None:
    """A process to kill, if there is one at this moment."""
    try:
        if target == "dvc":
            return dvc
        stages = [process for process in dvc.children(recursive=True) if "stages." in " ".join(process.cmdline())]
        found = stages if target == "stage" or not stages else workers(stages[0])
        return found[0] if found else None
    except psutil.Error:  # it has ended meanwhile
        return None


def workers(stage: psutil.Process) -> list[psutil.Process]:
    """The processes that a stage has started for its trials."""
    found: list[psutil.Process] = stage.children()
    return found


def main() -> None:
    """Run an undisturbed study, then the chaos, and print what was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        checkout = Checkout(Path(folder) / "study", PHASEGATE_WORKERS="2", PHASEGATE_SNAPSHOT="0")
        start = time.monotonic()
        checkout.repro()
        expected = results(checkout.folder)
        print(f"undisturbed: {time.monotonic() - start:.0f} s, {len(expected)} files", flush=True)
        checkout.command("git", "clean", "-fdxq")
        start = time.monotonic()
        done = chaos(checkout, expected, arguments.kills, arguments.seed)
        print(f"{done}: all studies ended with the same bits, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
