"""About how long a stage takes: from the last run here, else from committed results, else by rough constants.

Seconds of trials are scaled by their number and by their steps where these have changed. It is an estimate: what else
the machine does, and trials that are kept, change it.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from phasegate.durations import Taken, recorded
from phasegate.errors import UserError, one_line
from phasegate.files import read_bounded
from phasegate.params import Params
from phasegate.sections import parse
from phasegate.stage import REPORTS
from phasegate.study import ARMS, OWN
from phasegate.table_files import read_table

HERE, COMMITTED, ROUGH, UNKNOWN = "here", "committed", "rough", "unknown"
LABELS = {"pretrain": "p7a", "control_heads": "heads"}
"""What the trials of a stage are called, where not as the stage."""
TRIAL_STAGES = (
    *("references", "q1", "q2", "pretrain", "continue", "p7b1", "p7b2", "p7b3", "survey", "control_heads", "p7b4"),
    *("signals", "surgery", OWN),
)
START = 5.0  # seconds until a stage has imported what it needs, and its workers too
PER_SEED = {"survey": 24.0, "heads": 2.0, "signals": 1.6}
"""Seconds of a trial that no committed table tells, as two slow cores took with the committed parameters."""
FIXED = {"check": 1.0, "prepare": 9.0, "decide": 4.0, "report": 27.0, "headline": 2.0}
EVALUATED_TRIAL, REPEATED_SEED = 0.4, 2.0  # seconds of evaluate for a trial, and of repeat_surgery for a seed
"""Of stages without trials, on the same machine."""


class Estimate(NamedTuple):
    """Seconds of a stage, and where they come from: `here`, `committed`, `rough` or `unknown` (None)."""

    seconds: float | None
    source: str


class Estimator:
    """Estimates for one machine and the parameters as they are now.

    Args:
        root: the folder of the project: `.phasegate/`, `dvc.lock` and `reports/` are looked for there.
        workers: trials that run at once.
    """

    def __init__(self, root: Path, params: Params, workers: int) -> None:
        self.params, self.workers = params, workers
        self.here = recorded(root / ".phasegate", params.data.name)
        self.committed = committed(root, params)

    def estimate(self, stage: str) -> Estimate:
        """How long a stage of dvc.yaml takes if it runs, with all its trials."""
        name, _, phase = stage.partition("@")
        label = LABELS.get(name, name)
        if name in TRIAL_STAGES:
            return self._trials(label)
        if name == "evaluate":
            return Estimate(START + EVALUATED_TRIAL * size(phase, self.params)[0], ROUGH)
        if name == "repeat_surgery":
            return Estimate(START + REPEATED_SEED * self.params.seeds, ROUGH)
        return Estimate(FIXED[name], ROUGH) if name in FIXED else Estimate(None, UNKNOWN)

    def _trials(self, label: str) -> Estimate:
        like = "continue" if label == OWN else label  # one's own arms may never have run
        trials, steps = size(label, self.params)
        for source, taken in ((HERE, self.here.get(like)), (COMMITTED, self.committed.get(like))):
            if taken:
                then, steps_then = size(like, taken.params)
                each = taken.seconds / then * steps / steps_then
                told = ROUGH if source == COMMITTED and label in PER_SEED else source
                return Estimate(START + each * math.ceil(trials / self.workers), told)
        return Estimate(None, UNKNOWN)


def size(label: str, params: Params) -> tuple[int, float]:
    """How many trials a stage has, and what one is worth: its steps, or what else its time grows with."""
    searched = {"q1": params.q1, "q2": params.q2}
    if label == "references":
        models = params.references_of(params.data.name).values()
        return params.seeds * len(models), sum(model.steps for model in models) / len(models)
    if label in searched:
        candidates = [{}, *searched[label].candidates.values()]
        steps = [float(changes.get("steps", params.training.steps)) for changes in candidates]
        return searched[label].seeds * len(candidates), sum(steps) / len(steps)
    if label == "p7a":
        return params.seeds, params.training.steps
    if label == "survey":
        truth, kinds = params.p7b4, 2
        forks = kinds * (params.p7a.n_routed + truth.surveyed * (truth.surveys - 1)) * truth.repeats
        return params.seeds, params.p7b.steps + forks * truth.recovery_steps
    if label == "heads":
        return params.seeds, max(1, params.seeds - 1)  # each learns from the surveys of the other seeds
    if label == "signals":
        return params.seeds, 1
    arms = len(params.own.arms) if label == OWN else len(ARMS.get(label, ("continue",)))
    return params.seeds * arms, params.p7b.steps


def committed(root: Path, params: Params) -> dict[str, Taken]:
    """What the trials took that the tables of `reports/`, or of a folder in it, tell of; by label.

    The parameters are those that made the tables, as the lock file beside them says. Nothing if there are no results
    for this data set.
    """
    for tables, lock in studies_below(root):
        try:
            then = made_by(lock, params)
            if then.data.name == params.data.name:
                return {label: Taken(seconds, then) for label, seconds in _told(tables, then).items()}
        except (UserError, KeyError):
            continue
    return {}


def studies_below(root: Path) -> list[tuple[Path, Path]]:
    """The folders of the project that hold a study's tables, each with its lock file; the workspace's own first."""
    others = sorted((root / REPORTS).glob("*/dvc.lock"))
    return [(root / REPORTS, root / "dvc.lock"), *((lock.parent, lock) for lock in others)]


def made_by(lock: Path, params: Params) -> Params:
    """The parameters of the run that a lock file tells of; what it doesn't know is as in `params`.

    Raises:
        UserError: if the file is missing or damaged.
    """
    return parse(Params, params.model_dump(mode="json") | locked(lock).get("report", {}), str(lock))


def locked(lock: Path) -> dict[str, dict[str, Any]]:
    """The parameters with which every stage of a lock file last ran, by stage and section.

    Raises:
        UserError: if the file is missing or is no lock file.
    """
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where there is one: a lock file is long
        content = loader(read_bounded(lock)).get_single_data()
        return {name: stage.get("params", {}).get("params.yaml", {}) for name, stage in content["stages"].items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{lock} is damaged ({one_line(error)}): `git checkout {lock}` brings it back") from None


def _told(folder: Path, then: Params) -> dict[str, float]:
    """Seconds of all trials by label, from the tables in a folder."""
    trials = read_table(folder / "trials.csv")
    phases = trials["phase"].where(trials["arm"] != "continue", "continue")
    found = {str(phase): float(seconds) for phase, seconds in trials["train_seconds"].groupby(phases).sum().items()}
    for search in ("q1", "q2"):
        board = read_table(folder / f"leaderboard_{search}.csv")
        found[search] = _searched(board[board["kind"] == "search"])
    return found | {label: seconds * then.seeds for label, seconds in PER_SEED.items()}


def _searched(board: pd.DataFrame) -> float:
    """Seconds of all trials of a search; those that failed count as the others of their candidate."""
    return float((board["train_seconds"] * (board["n_seeds"] + board["n_failed"])).sum())
