"""Kill the small study again and again, end it, and compare it with one that was left alone.

    python -m tests.chaos --kills 200 --seed 0

A worker, a stage and dvc itself are killed in turn (SIGKILL), after random times. When a study ends, its models and
tables must have the bits of the undisturbed one, and the next study begins, until all kills are done.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.small_study import Checkout, content

TARGETS = ("worker", "stage", "dvc")
SECONDS = (0.3, 6.0)  # from the start of a run, or from the moment at which there is something to kill
LONGEST = 900  # seconds of any one run
COMPARED = ("models", "data", "reports")


def results(folder: Path) -> dict[str, str]:
    """All models, prepared data and tables that a study leaves, by name, recorded times apart."""
    found = {f"{name}/{path}": text for name in COMPARED for path, text in content(folder / name).items()}
    return {name: text for name, text in found.items() if not name.startswith("reports/") or name.endswith(".csv")}


def chaos(checkout: Checkout, expected: dict[str, str], kills: int, seed: int) -> dict[str, int]:
    """Kill studies in `checkout`, which begins with none, until so many kills are done; returns what was done.

    Raises:
        AssertionError: if a study ends with other bits, or does not end.
    """
    draws = random.Random(seed)
    done = dict.fromkeys((*TARGETS, "studies", "runs"), 0)
    while sum(done[target] for target in TARGETS) < kills or not done["studies"]:
        left = kills - sum(done[target] for target in TARGETS)
        target = TARGETS[(kills - left) % len(TARGETS)] if left else None
        done["runs"] += 1
        ended, killed = run_and_kill(checkout, target, draws.uniform(*SECONDS))
        if killed and target:
            done[target] += 1
        if ended:
            found = results(checkout.folder)
            differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            assert not differ, f"after {done}: {len(differ)} files differ, as {differ[:5]}"
            done["studies"] += 1
            forget(checkout.folder)
        here = sys.stderr.isatty()
        print(f"\r{done}" if here else done, end="" if here else "\n", file=sys.stderr, flush=True)
    return done


def run_and_kill(checkout: Checkout, target: str | None, seconds: float) -> tuple[bool, bool]:
    """One `dvc repro`, whose worker, stage or own process is killed after so many seconds: did it end, was it hit?"""
    with (checkout.folder.parent / "log").open("wb") as log:
        dvc = psutil.Popen(
            ["dvc", "repro"], cwd=checkout.folder, env=checkout.environment, stdout=log, stderr=subprocess.STDOUT
        )
        start, hit = time.monotonic(), False
        while dvc.poll() is None:
            time.sleep(0.01)
            victim = find(dvc, target) if target and not hit and time.monotonic() - start > seconds else None
            if victim:
                victim.send_signal(signal.SIGKILL)
                hit = True
            assert time.monotonic() - start < LONGEST, f"dvc repro has not ended for {LONGEST} s"
    said = (checkout.folder.parent / "log").read_text(errors="replace")
    assert "Traceback" not in said, said
    if "RWLock-file" in said and "corrupted" in said:  # dvc was killed while it wrote this file, and says so
        (checkout.folder / ".dvc/tmp/rwlock").unlink()
        return False, hit
    assert hit or dvc.returncode == 0, f"without a kill, dvc repro ended with {dvc.returncode}:\n{said}"
    return dvc.returncode == 0, hit


def find(dvc: psutil.Process, target: str) -> psutil.Process | None:
    """A process to kill, if there is one at this moment."""
    try:
        if target == "dvc":
            return dvc
        stages = [process for process in dvc.children(recursive=True) if "stages." in " ".join(process.cmdline())]
        if target == "stage" or not stages:
            return stages[0] if stages else None
        workers = [process for process in stages[0].children() if "popen_loky" in " ".join(process.cmdline())]
        return workers[0] if workers else None
    except psutil.Error:  # it has ended meanwhile
        return None


def forget(folder: Path) -> None:
    """Back to the beginning: no results, no kept trials, no cache."""
    for name in ("models", "reports", ".phasegate", ".dvc/cache", "data/prepared", "data/evaluated"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("dvc.lock", "metrics.json", "data/params.schema.json"):
        (folder / name).unlink(missing_ok=True)


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
        forget(checkout.folder)
        start = time.monotonic()
        done = chaos(checkout, expected, arguments.kills, arguments.seed)
        print(f"\n{done}: all studies ended with the same bits, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
