"""Write and read what the trials of a phase predict, beside the labels of the split that they are evaluated on."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.numpy
from safetensors import SafetensorError

from phasegate.base.errors import UserError
from phasegate.base.files import refuse_special, write_atomic
from phasegate.records.prepared import Array

FILE, LABELS = "predictions.safetensors", "labels"


def write_predictions(folder: Path, labels: Array, predictions: Mapping[str, Array]) -> None:
    """Write labels (N,) and the predicted classes (N,) of each trial, named as in `p7b2/split/seed-3`."""
    write_atomic(folder / FILE, safetensors.numpy.save({LABELS: labels, **predictions}))


def read_predictions(folder: Path) -> tuple[Array, dict[str, Array]]:
    """Return labels (N,) and the predicted classes (N,) by trial; `UserError` if they are missing or damaged."""
    refuse_special(path := folder / FILE)
    try:
        predictions = safetensors.numpy.load_file(path)
        labels = predictions.pop(LABELS)
        if {array.shape for array in predictions.values()} - {labels.shape}:
            raise ValueError("not a prediction for each label")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): `dvc repro` makes it again") from None
    return labels, predictions
