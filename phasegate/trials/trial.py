"""Describe one trial: one arm of one phase with one seed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trial:
    """Describe one call of `run(folder, **arguments)`, and all files that it reads."""

    phase: str
    arm: str  # "" in a phase without arms
    seed: int
    run: Callable[..., None]
    arguments: dict[str, Any]  # values whose repr is their content: numbers, strings, paths, frozen dataclasses
    inputs: tuple[Path, ...] = ()  # files whose content decides the result
    reads: tuple[Path, ...] = ()  # other files that it reads, such as a description of the inputs

    @property
    def name(self) -> str:
        """Return the trial's folder below the output of its stage, such as "split/seed-3"."""
        return f"{self.arm}/seed-{self.seed}" if self.arm else f"seed-{self.seed}"
