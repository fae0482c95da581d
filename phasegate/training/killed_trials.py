"""Leave snapshots for killed trials: a killed trial resumes from its last one, and a diverged trial returns to it.

A snapshot holds the model, its optimizer, and the state of everything else that changes from step to step. Random
numbers are drawn by step (`randomness`), so a resumed trial gives the bits of an undisturbed one.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from torch import Tensor
from torch.optim import Optimizer

from phasegate.base import settings, used
from phasegate.base.errors import Diverged
from phasegate.base.files import write_atomic
from phasegate.model.classifier import Network
from phasegate.records.trial_folder import LAST_GOOD
from phasegate.training import checkpoint
from phasegate.training.checkpoint import below

SNAPSHOT = "snapshot.safetensors"
DIGEST = hashlib.sha256().digest_size  # bytes at the end of the file


class Stateful(Protocol):
    """Describe something that changes during training."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, and values that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """Continue from such a state."""


class Snapshots:
    """Take snapshots of model, optimizer and other parts of a trial; write one to its folder every few seconds."""

    def __init__(self, folder: Path, model: Network, optimizer: Optimizer, parts: dict[str, Stateful]) -> None:
        self.folder, self.model, self.optimizer, self.parts = folder, model, optimizer, parts
        self._last: tuple[dict[str, Tensor], str] | None = None
        self._written = time.monotonic()
        self._begun = time.perf_counter()

    def begin(self, first: Callable[[], object], begun: int = 0) -> int:
        """Resume from the snapshot on disk and return its step.

        Without a whole one, call `first` and return how many steps the trial has `begun` with.
        """
        self._last = _read_snapshot(self.folder / SNAPSHOT)
        if self._last is None:
            first()
            self.take(begun)
            return begun
        state = self._restore(*self._last)
        self._begun -= state["seconds"]
        return int(state["step"])

    def take(self, step: int) -> None:
        """Take a snapshot after a step, and write it if the last one was written long ago.

        `UserError` if a file of the trial has changed: the next run would take the snapshot for one of its own.
        """
        state: dict[str, Any] = {"step": step, "seconds": time.perf_counter() - self._begun}
        moments = {f"optimizer.{index}": part for index, part in self.optimizer.state_dict()["state"].items()}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        for name, values in ({"model": self.model.state_dict()} | moments | parts).items():
            state |= {f"{name}.{key}": value for key, value in values.items()}
        tensors = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
        self._last = tensors, json.dumps({key: value for key, value in state.items() if key not in tensors})
        if time.monotonic() - self._written >= settings.snapshot_seconds():
            used.check_trial()
            content = safetensors.torch.save(tensors, {"values": self._last[1]})
            write_atomic(self.folder / SNAPSHOT, content + hashlib.sha256(content).digest())
            self._written = time.monotonic()

    @contextmanager
    def last_good(self, save: Callable[[Path], None]) -> Iterator[None]:
        """If the training within diverges, return to the last snapshot, and `save` that into `last_good/`."""
        try:
            yield
        except Diverged:
            if self._last:
                self._restore(*self._last)
                save(self.folder / LAST_GOOD)
            raise

    def _restore(self, tensors: dict[str, Tensor], values: str) -> dict[str, Any]:
        """Restore everything from a snapshot, and return its content."""
        state: dict[str, Any] = json.loads(values) | tensors
        checkpoint.fill(self.model, below(state, "model."), str(self.folder), self.optimizer)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in below(state, "optimizer.").items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = value.clone()
        self.optimizer.state.clear()  # it knows the parameters that `fill` has replaced
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for name, part in self.parts.items():
            part.load_state_dict(below(state, f"{name}."))
        return state


def seconds(folder: Path) -> float:
    """Return how long a trial had trained before its snapshot on disk; 0 without one."""
    found = _read_snapshot(folder / SNAPSHOT)
    return float(json.loads(found[1])["seconds"]) if found else 0.0


def _read_snapshot(path: Path) -> tuple[dict[str, Tensor], str] | None:
    """Read a snapshot's tensors and its other values; None if the file is missing or not whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    content, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return safetensors.torch.load(content), header["__metadata__"]["values"]
