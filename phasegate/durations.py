"""What the trials of each stage took on this machine: written after every run, read by `phasegate.plan` alone."""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from phasegate.errors import UserError
from phasegate.files import read_json, write_atomic
from phasegate.params import Params, load_params
from phasegate.sections import parse

RECORD = "durations.json"  # in .phasegate/


class Taken(NamedTuple):
    """The seconds of all trials of a stage together, kept ones included, and the parameters of that run."""

    seconds: float
    params: Params


def record(folder: Path, label: str, seconds: float) -> None:
    """Note in `folder` what the trials of a stage took; a record that can't be written is not missed."""
    with contextlib.suppress(UserError, OSError):
        params = load_params()
        noted = _read(folder)
        taken = {"seconds": round(seconds, 3), "params": params.model_dump(mode="json")}
        noted.setdefault(params.data.name, {})[label] = taken
        write_atomic(folder / RECORD, json.dumps(noted) + "\n")


def recorded(folder: Path, data: str) -> dict[str, Taken]:
    """What the stages took on a data set, by the label of their trials; what can't be read is left out."""
    found = {}
    for label, taken in _read(folder).get(data, {}).items():
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            found[label] = Taken(float(taken["seconds"]), parse(Params, taken["params"]))
    return found


def _read(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The record, by data set and label; empty if there is none, or none that can be read."""
    try:
        content = read_json(folder / RECORD)
    except UserError:
        return {}
    sound = isinstance(content, dict) and all(isinstance(stages, dict) for stages in content.values())
    return content if sound else {}
