"""Curves while trials train, in DVCLive's layout: `dvc plots show`, `dvc exp show` and the VS Code extension see them.

    live/dvc.yaml                                       tells DVC of the rest
    live/metrics.json                                   the stage that trains, its trials and how many are done
    live/plots/metrics/<phase>/<arm>/accuracy.tsv       of seed 0: gate accuracy (percent) by step
    live/plots/metrics/<phase>/<arm>/loss.tsv           and training loss (nats)

The folder is there while a stage trains and goes with it: then the tables of `reports/` hold the curves of all seeds.
Nothing reads it but people, and it can't change a result.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

FOLDER = Path("live")
CURVES = FOLDER / "plots/metrics"
SHOWN = ("accuracy", "loss")
DEFINITIONS = {"metrics": ["metrics.json"], "plots": [{"plots/metrics": {"x": "step"}}]}

_followed: Path | None = None  # where the trial of this process shows its curve


@contextmanager
def stage(label: str, trials: int) -> Iterator[None]:
    """The folder, for as long as a stage trains."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        with suppress(OSError):
            FOLDER.mkdir()
        _replace(FOLDER / "dvc.yaml", yaml.safe_dump(DEFINITIONS))
        tell(label, trials, 0)
        yield
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


def tell(label: str, trials: int, done: int) -> None:
    """How far a stage is."""
    _replace(FOLDER / "metrics.json", json.dumps({"stage": label, "trials": trials, "done": done}, indent=2) + "\n")


def follow(label: str, trial: str) -> None:
    """Show the curve of the trial that this process begins, if it is one of seed 0, as `split/seed-0`."""
    global _followed
    arm, _, seed = trial.rpartition("/")
    _followed = CURVES / label / arm if seed == "seed-0" and FOLDER.exists() else None


def show(points: Sequence[Mapping[str, float]]) -> None:
    """The curve so far of the trial that is followed; nothing otherwise."""
    if _followed is None:
        return
    for name in SHOWN:
        rows = [f"{point['step']}\t{point[name]}\n" for point in points if math.isfinite(point[name])]
        _replace(_followed / f"{name}.tsv", "".join([f"step\t{name}\n", *rows]))


def _replace(path: Path, text: str) -> None:
    """Write a file that others may be reading. It need not outlive a power cut, and no trial fails for its sake."""
    temporary = path.with_suffix(".tmp")
    with suppress(OSError):
        if FOLDER.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(path)
