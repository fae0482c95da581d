"""Search over configurations: train every candidate with several seeds and measure it on the gate split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from phasegate.model.classifier import Cost
from phasegate.model.references import Spec
from phasegate.params.fields import Scalar, SectionT, override
from phasegate.params.pretraining import BASE, Search, Training
from phasegate.pretraining.pretrain import pretraining
from phasegate.records.tables import write_table
from phasegate.records.trial_folder import read_failure
from phasegate.training import checkpoint
from phasegate.trials.run import run_trials

COLUMNS = ["candidate", "seed", "accuracy", *Cost.model_fields, "settings", "failure"]


def variants(base: SectionT, search: Search, where: str) -> dict[str, SectionT]:
    """Return the base configuration and each candidate's configuration, by name."""
    changed = {name: override(base, changes, f"{where}.{name}") for name, changes in search.candidates.items()}
    return {BASE: base, **changed}


def run_search(
    phase: str,
    candidates: Mapping[str, tuple[Spec, Training]],
    settings: Mapping[str, Mapping[str, Scalar]],
    seeds: range,
    prepared: Path,
    folder: Path,
) -> pd.DataFrame:
    """Train every candidate with every seed below `folder`; write, as `folder`.csv, and return a row per trial.

    Columns: candidate, seed, accuracy (gate split, percent), the fields of `Cost`, settings, and failure:
    why the trial did not finish. Failed trials leave the measured columns blank, finished trials leave
    `failure` blank.
    """
    trials = [
        pretraining(prepared, phase, name, seed, spec, training)
        for name, (spec, training) in candidates.items()
        for seed in seeds
    ]
    run_trials(trials, folder)
    rows = []
    for trial in trials:
        changes = ", ".join(f"{key}={value}" for key, value in settings.get(trial.arm, {}).items())
        row = {"candidate": trial.arm, "seed": trial.seed, "settings": changes or BASE}
        rows.append(row | _read_result(folder / trial.name))
    table = pd.DataFrame(rows, columns=COLUMNS)
    write_table(folder.with_suffix(".csv"), table, digits=None)
    return table


def _read_result(folder: Path) -> dict[str, Any]:
    if failure := read_failure(folder):
        return {"failure": str(failure)}
    _, accuracy, cost = checkpoint.summary(folder)
    return {"accuracy": accuracy, **cost.model_dump()}
