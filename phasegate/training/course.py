"""Prepare what every trial that continues from a 7a checkpoint shares, whatever its arm."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch.optim import Optimizer

from phasegate.base.errors import UserError
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
    begun: int = 0  # steps of it that the model was trained for before

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


def start_files(prepared: Path, baseline: Path) -> tuple[Path, ...]:
    """Return the files that `load_start` reads and whose content decides a result."""
    return prepared / FIT, baseline / checkpoint.WEIGHTS, baseline / checkpoint.RECORD


def load_start(prepared: Path, baseline: Path, seed: int, schedule: Schedule) -> tuple[Model, Optimizer, Course]:
    """Load a 7a checkpoint with its optimizer, and the course that begins at it; `UserError` if it is damaged.

    Hyperplanes of splits will learn only if the schedule says so.
    """
    train, signal, gate = load_examples(prepared, device())
    model, optimizer, training = load_baseline(baseline, gate)
    set_hyperplanes(model, schedule)
    return model, optimizer, Course(train, signal, gate, training, schedule, seed)


def set_hyperplanes(model: Model, schedule: Schedule) -> None:
    """Let the hyperplanes of splits learn only if the schedule says so."""
    for moe in model.layers:
        for hyperplane in (moe.node_weight, moe.node_offset):
            hyperplane.requires_grad_(schedule.hyperplanes != "fixed")


def load_baseline(folder: Path, gate: Examples) -> tuple[Model, Optimizer, Training]:
    """Load a checkpoint to train on from, with optimizer and configuration; `UserError` if it is none, or damaged."""
    loaded = checkpoint.load(folder, gate, gate.x.device)
    if not isinstance(loaded.model, Model) or loaded.optimizer is None:
        raise UserError(f"{folder} holds no mixture of experts with its optimizer: `dvc repro` makes it again")
    return loaded.model, loaded.optimizer, loaded.record.training
