"""Snapshots of a training: a killed trial goes on from its last, and one that diverges goes back to it.

A snapshot holds the model with its optimizer, and the state of all else that changes from step to step. What is random
is drawn by step (`randomness`), so nothing else is needed for a resumed trial to give the bits of an undisturbed one.
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

from phasegate import checkpoint, execution
from phasegate.checkpoint import below
from phasegate.errors import Diverged
from phasegate.failure import LAST_GOOD
from phasegate.files import write_atomic
from phasegate.model import Model
from phasegate.references import Reference

SNAPSHOT = "snapshot.safetensors"
DIGEST = hashlib.sha256().digest_size  # bytes at the end of the file


class Stateful(Protocol):
    """Something that changes as training goes on."""

    def state_dict(self) -> dict[str, Any]:
        """Its state: tensors, and values that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """Go on from such a state."""


class Snapshots:
    """Snapshots of one trial; every few seconds one goes to disk, as `folder`/snapshot.safetensors.

    Args:
        parts: whatever changes from step to step besides model and optimizer.
    """

    def __init__(
        self, folder: Path, model: Model | Reference, optimizer: Optimizer, parts: dict[str, Stateful]
    ) -> None:
        self.folder, self.model, self.optimizer, self.parts = folder, model, optimizer, parts
        self._last: tuple[dict[str, Tensor], str] | None = None
        self._written = time.monotonic()
        self._begun = time.perf_counter()

    def begin(self, first: Callable[[], object]) -> int:
        """Go on from the snapshot on disk; if there is none that is whole, do what comes `first`. Returns the step."""
        self._last = _read(self.folder / SNAPSHOT)
        if self._last is None:
            first()
            self.take(0)
            return 0
        state = self._load(*self._last)
        self._begun -= state["seconds"]
        return int(state["step"])

    def take(self, step: int) -> None:
        """Remember everything as it is after a step; on disk too if the last time is long ago."""
        tensors = {f"model.{name}": tensor.clone() for name, tensor in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value.clone() for key, value in moments.items()}
        values: dict[str, Any] = {"step": step, "seconds": time.perf_counter() - self._begun}
        for name, part in self.parts.items():
            for key, value in part.state_dict().items():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{key}"] = value.clone()
                else:
                    values[f"{name}.{key}"] = value
        self._last = tensors, json.dumps(values)
        if time.monotonic() - self._written >= execution.snapshot_seconds():
            content = safetensors.torch.save(tensors, {"values": self._last[1]})
            write_atomic(self.folder / SNAPSHOT, content + hashlib.sha256(content).digest())
            self._written = time.monotonic()

    @contextmanager
    def last_good(self, save: Callable[[Path], None]) -> Iterator[None]:
        """If the training within diverges, go back to the last snapshot, and `save` that into `last_good/`."""
        try:
            yield
        except Diverged:
            if self._last:
                self._load(*self._last)
                save(self.folder / LAST_GOOD)
            raise

    def _load(self, tensors: dict[str, Tensor], values: str) -> dict[str, Any]:
        """Put everything back as it was; returns what the snapshot holds."""
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
    """How long a trial had trained before its snapshot on disk; 0 if there is none."""
    found = _read(folder / SNAPSHOT)
    return float(json.loads(found[1])["seconds"]) if found else 0.0


def _read(path: Path) -> tuple[dict[str, Tensor], str] | None:
    """A snapshot file's tensors and other values; None unless it is there and whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    content, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return safetensors.torch.load(content), header["__metadata__"]["values"]
