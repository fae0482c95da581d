"""Prepare what every trial that continues from a 7a checkpoint shares, whatever its arm."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch.optim import Optimizer

from phasegate.model.classifier import Model
from phasegate.params.phases import Schedule
from phasegate.params.pretraining import Training
from phasegate.records.prepared import FIT
from phasegate.training import checkpoint
from phasegate.training.batches import Batches, Examples, load_examples
from phasegate.training.device import device
from phasegate.training.loop import cosine
from phasegate.training.randomness import derived_seed


@dataclass(frozen=True, eq=False)
class Course:
    """Hold the data, the configuration and the schedule of all 7b trials of one seed."""

    train: Examples
    signal: Examples
    gate: Examples
    training: Training  # the configuration of 7a
    schedule: Schedule
    seed: int

    @cached_property
    def rates(self) -> list[float]:
        """Return the learning rates of all steps."""
        return cosine(self.schedule.lr_scale * self.training.lr, self.schedule.steps)

    def acts_at(self, step: int) -> bool:
        """Tell whether controllers may act after this step."""
        return step % self.schedule.act_every == 0 and step <= self.schedule.steps - self.schedule.settle

    @cached_property
    def batches(self) -> Batches:
        """Return the batches of the phase, the same for all arms."""
        return Batches(self.train, self.training.batch, derived_seed(self.seed, "7b"), self.training)


@dataclass(frozen=True, eq=False)
class Start:
    """Hold a verified 7a checkpoint: a mixture of experts with its optimizer."""

    model: Model
    optimizer: Optimizer


def start_files(prepared: Path, baseline: Path) -> tuple[Path, ...]:
    """Return the files that `load_start` reads and whose content decides a result."""
    return prepared / FIT, baseline / checkpoint.WEIGHTS, baseline / checkpoint.RECORD


def load_start(prepared: Path, baseline: Path, seed: int, schedule: Schedule) -> tuple[Start, Course]:
    """Load a 7a checkpoint and the course that begins at it, or raise `UserError` if the checkpoint is damaged."""
    train, signal, gate = load_examples(prepared, device())
    loaded = checkpoint.load(baseline, gate, train.x.device)
    assert isinstance(loaded.model, Model) and loaded.optimizer is not None, "not a 7a checkpoint"
    return Start(loaded.model, loaded.optimizer), Course(train, signal, gate, loaded.record.training, schedule, seed)
