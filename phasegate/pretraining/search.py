"""Search over configurations: train candidates with some seeds and measure them on the gate split."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from phasegate.model.classifier import Cost
from phasegate.model.references import Spec
from phasegate.params.fields import Scalar
from phasegate.params.pretraining import BASE, Search, Training
from phasegate.pretraining.pretrain import pretraining
from phasegate.pretraining.ranking import Scores, n_failed
from phasegate.records.tables import write_table
from phasegate.records.trial_folder import read_failure
from phasegate.training import checkpoint
from phasegate.trials.run import run_trials

COLUMNS = ["candidate", "seed", "accuracy", *Cost.model_fields, "settings", "failure"]


def trainer(
    phase: str,
    candidates: Mapping[str, tuple[Spec, Training]],
    search: Search,
    prepared: Path,
    folder: Path,
    known: pd.DataFrame | None = None,
) -> Callable[[Mapping[str, int]], Scores]:
    """Return the function that `race` needs: each call is `run_search` with the first seeds of each candidate."""

    def measure(counts: Mapping[str, int]) -> Scores:
        seeds = {name: search.seeds.all[:count] for name, count in counts.items()}
        table = run_search(phase, candidates, search.candidates, seeds, prepared, folder, known)
        runs = {str(name): rows for name, rows in table.groupby("candidate")}
        return {name: rows["accuracy"].tolist() for name, rows in runs.items() if not n_failed(rows)}

    return measure


def run_search(
    phase: str,
    candidates: Mapping[str, tuple[Spec, Training]],
    settings: Mapping[str, Mapping[str, Scalar]],
    seeds: Mapping[str, Iterable[int]],
    prepared: Path,
    folder: Path,
    known: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Train candidates with their `seeds` below `folder`; write, as `folder`.csv, and return a row per trial.

    Rows that are `known` from another search need no training. Columns: candidate, seed, accuracy (gate split,
    percent), the fields of `Cost`, settings, and failure: why the trial did not finish. Failed trials leave the
    measured columns blank, finished trials leave `failure` blank.
    """
    there = {} if known is None else {(row["candidate"], row["seed"]): row for row in known.to_dict("records")}
    keys = [(name, seed) for name in seeds for seed in seeds[name]]
    trials = {key: pretraining(prepared, phase, *key, *candidates[key[0]]) for key in keys if key not in there}
    run_trials([*trials.values()], folder, all_may_fail=bool(there))
    rows = []
    for name, seed in keys:
        changes = ", ".join(f"{key}={value}" for key, value in settings.get(name, {}).items())
        row = {"candidate": name, "seed": seed, "settings": changes or BASE}
        trial = trials.get((name, seed))
        rows.append((_read_result(folder / trial.name) if trial else there[name, seed]) | row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    write_table(folder.with_suffix(".csv"), table, digits=None)
    return table


def _read_result(folder: Path) -> dict[str, Any]:
    if failure := read_failure(folder):
        return {"failure": str(failure)}
    _, accuracy, cost = checkpoint.summary(folder)
    return {"accuracy": accuracy, **cost.model_dump()}
