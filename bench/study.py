"""Measure `dvc repro` with nothing to do, and the whole study.

The limit of the first is a pipeline of as many trivial stages; the limit of the second is training alone.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from bench.timing import Entry, entry, medians
from phasegate.base import settings
from phasegate.records.trial_folder import SECONDS
from phasegate.trials.store import STORE

ROOT = Path(__file__).parent.parent


def no_op(rounds: int) -> Iterator[Entry]:
    """Measure `dvc repro` here, if there is nothing to do, against trivial stages in another repository."""
    stages = yaml.safe_load((ROOT / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    if json.loads(_run(ROOT, "dvc", "status", "--json")):
        print("no-op dvc repro: left out, since there is something to do here", file=sys.stderr)
        return
    with TemporaryDirectory() as folder:
        trivial = Path(folder)
        _run(trivial, "git", "init", "--quiet")
        _run(trivial, "dvc", "init", "--quiet")
        shutil.copy(ROOT / ".dvc/config", trivial / ".dvc/config")  # no analytics, no look for updates, as here
        (trivial / "dvc.yaml").write_text(
            yaml.safe_dump({"stages": dict(map(_stage, range(len(stages))))}), encoding="utf-8"
        )
        cases = {"ours": partial(_run, ROOT, "dvc", "repro"), "limit": partial(_run, trivial, "dvc", "repro")}
        yield entry(f"dvc repro with nothing to do, {len(stages)} stages", 1, medians(cases, rounds, warm_up=1))


def whole() -> Iterator[Entry]:
    """Measure the whole study in a fresh clone; the limit is the seconds of its trials, divided by the workers."""
    with TemporaryDirectory() as folder:
        _run(ROOT, "git", "clone", "--quiet", str(ROOT), folder)
        begun = time.perf_counter()
        subprocess.run(["dvc", "repro", "--force"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        taken = time.perf_counter() - begun
        trained = sum(float(path.read_text(encoding="utf-8")) for path in (Path(folder) / STORE).glob(f"*/{SECONDS}"))
    times = {"ours": 1e3 * taken, "limit": 1e3 * trained / settings.workers()}
    yield entry(f"dvc repro, all of it, {settings.workers()} workers", 1, times)


def _stage(number: int) -> tuple[str, dict[str, object]]:
    chain = {"deps": [f"out{number - 1}"]} if number else {}
    return f"stage{number}", {"cmd": f"echo {number} > out{number}", "outs": [f"out{number}"], **chain}


def _run(folder: Path, *command: str) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, encoding="utf-8").stdout
