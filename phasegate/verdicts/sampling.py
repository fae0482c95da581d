"""Estimate what another draw of test examples would change: the part that the scatter over seeds does not show.

Shapes: S seeds, N test examples.
"""

from collections.abc import Mapping
from math import nan
from pathlib import Path

import numpy as np
import pandas as pd

from phasegate.params.names import EVALUATED, REFERENCES
from phasegate.params.phases import Claim
from phasegate.records.predictions import read_predictions
from phasegate.records.prepared import Array
from phasegate.verdicts.decisions import control_of, key_of

COLUMNS = ["phase", "arm", "accuracy_se", "delta_se"]


def sampling(evaluated: Path, claims: Mapping[str, Claim]) -> pd.DataFrame:
    """Return a row per phase and arm below the folder `evaluated`, with standard errors in percentage points.

    accuracy_se is that of the mean accuracy, delta_se that of the mean difference from its control, over the seeds that
    both finished. References, which may have other test examples, are compared with nothing: delta_se is blank, and
    all their seeds count. The squares of these standard errors and of those over seeds add up.
    """
    right: dict[tuple[str, str], dict[str, Array]] = {}
    for folder in EVALUATED:
        labels, predictions = read_predictions(evaluated / folder)
        for name, predicted in predictions.items():
            phase, arm, seed = name.split("/")
            right.setdefault((phase, arm), {})[seed] = 100.0 * (predicted == labels)
    rows = []
    for (phase, arm), found in right.items():
        others = right.get(key_of(control_of(claims, phase, arm)), {}) if phase != REFERENCES else {}
        both = [seed for seed in found if seed in others]
        delta = examples_error(np.stack([found[seed] - others[seed] for seed in both])) if both else nan
        rows.append((phase, arm, examples_error(np.stack([found[seed] for seed in both or found])), delta))
    return pd.DataFrame(rows, columns=COLUMNS)


def examples_error(values: Array) -> float:
    """Return the standard error of the mean of `values` (S, N) that comes from the examples alone.

    In a table of seeds by examples, each effect is drawn at random. The variance between the examples' means also holds
    a part of the rest, which is in the variance between seeds already, and is subtracted here. One seed shows no rest.
    """
    seeds, examples = values.shape
    variance = values.mean(0).var(ddof=1)
    if seeds > 1:
        rest = (values - values.mean(1, keepdims=True)).var(0, ddof=1).sum() / (examples - 1)
        variance -= rest / seeds
    return float(np.sqrt(max(variance, 0.0) / examples))
