"""Searches over configurations: every candidate over several seeds, chosen on the gate split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from phasegate import checkpoint
from phasegate.failure import read_failure
from phasegate.files import write_atomic
from phasegate.model import Cost, ModelSpec
from phasegate.pretraining import pretraining
from phasegate.pretraining_params import BASE, Search, Training
from phasegate.references import ReferenceSpec
from phasegate.sections import Scalar, SectionT, override
from phasegate.trials import run_trials, seconds

COLUMNS = ["candidate", "seed", "accuracy", *Cost._fields, "train_seconds", "settings", "failure"]


def variants(base: SectionT, search: Search, where: str) -> dict[str, SectionT]:
    """The base configuration and each candidate's, by name."""
    changed = {name: override(base, changes, f"{where}.{name}") for name, changes in search.candidates.items()}
    return {BASE: base, **changed}


def run_search(
    phase: str,
    candidates: Mapping[str, tuple[ModelSpec | ReferenceSpec, Training]],
    settings: Mapping[str, Mapping[str, Scalar]],
    n_seeds: int,
    prepared: Path,
    folder: Path,
) -> pd.DataFrame:
    """Train every candidate with every seed below `folder`; write, as `folder`.csv, and return a row per trial.

    Columns: candidate, seed, accuracy (gate split, percent), the costs of `model.Cost`, train_seconds, settings, and
    failure: why the trial did not finish, blank if it did. What a failed one did not measure is blank.
    """
    trials = [
        pretraining(prepared, phase, name, seed, spec, training)
        for name, (spec, training) in candidates.items()
        for seed in range(n_seeds)
    ]
    run_trials(trials, folder, phase)
    rows = []
    for trial in trials:
        name, seed = trial.arguments["arm"], trial.arguments["seed"]
        changes = ", ".join(f"{key}={value}" for key, value in settings.get(name, {}).items())
        row = {"candidate": name, "seed": seed, "settings": changes or BASE}
        rows.append(row | _result(folder / trial.name))
    table = pd.DataFrame(rows, columns=COLUMNS)
    write_atomic(folder.with_suffix(".csv"), table.to_csv(index=False))
    return table


def _result(folder: Path) -> dict[str, Any]:
    """What came of one trial."""
    if failure := read_failure(folder):
        return {"failure": str(failure)}
    _, accuracy, cost = checkpoint.summary(folder)
    return {"accuracy": accuracy, **cost._asdict(), "train_seconds": seconds(folder)}
