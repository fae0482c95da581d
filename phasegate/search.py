"""Searches over configurations: every candidate over several seeds, chosen on the gate split."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from phasegate import checkpoint
from phasegate.files import write_atomic
from phasegate.model import ModelSpec
from phasegate.params import BASE, Scalar, Search, SectionT, Training, override
from phasegate.pretraining import pretraining
from phasegate.references import ReferenceSpec
from phasegate.trials import run_trials, seconds


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

    Columns: candidate, seed, accuracy (gate split, percent), the costs of `model.Cost`, train_seconds, settings.
    """
    trials = [
        pretraining(prepared, phase, name, seed, spec, training)
        for name, (spec, training) in candidates.items()
        for seed in range(n_seeds)
    ]
    run_trials(trials, folder, phase)
    rows = []
    for trial in trials:
        record, accuracy, cost = checkpoint.summary(folder / trial.name)
        took = seconds(folder / trial.name)
        changes = ", ".join(f"{key}={value}" for key, value in settings.get(record.arm, {}).items())
        row = {"candidate": record.arm, "seed": record.seed, "accuracy": accuracy, **cost._asdict()}
        rows.append(row | {"train_seconds": took, "settings": changes or BASE})
    table = pd.DataFrame(rows)
    write_atomic(folder.with_suffix(".csv"), table.to_csv(index=False))
    return table
