"""Trained models outside the pipeline: predictions for raw inputs, routing statistics, and a module to export.

Shapes: B examples, C classes of a task, S tokens per example, E experts of a block, K chosen, G gates.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from phasegate import checkpoint, data
from phasegate.checkpoint import Record
from phasegate.data import Meta
from phasegate.errors import UserError, one_line
from phasegate.model import Model, Output
from phasegate.moe import MoE, Routing
from phasegate.references import Reference
from phasegate.signals import expert_signals
from phasegate.stage import PREPARED
from phasegate.training import EVALUATION_BATCH

STUDY = "the data set of the study"  # stands for: found beside the checkpoint


def load(folder: Path | str, dataset: Path | str | None = STUDY, device: torch.device | str = "cpu") -> "Classifier":
    """A trained model from the folder of its checkpoint, in evaluation mode, with frozen parameters.

    Its structure, and the sha256 of its weights, are verified. That it gets exactly the recorded number of gate
    examples right, which the pipeline asks for too, can't be, without the data.

    Args:
        folder: one with `checkpoint.json` and `weights.safetensors`, such as models/p7b2/split/seed-0.
        dataset: `dataset.json`, or its folder: what the model's data were standardised by, so that it takes inputs in
            the units of their source. By default that of the study that `folder` lies in: data/prepared/dataset.json
            in the nearest folder above. None says that inputs are standardised already.
        device: where the model computes.

    Raises:
        UserError: for a checkpoint or a data set that is missing, damaged or of another model, or a device that is
            not there.
    """
    folder, device = Path(folder), _device(device)
    trial, meta = checkpoint.load(folder, None, device), None
    if dataset is not None:
        path = _find(folder) if dataset == STUDY else Path(dataset)
        meta = data.load_meta(path.parent if path == data.meta_file(path.parent) else path)
        _check_fits(trial.model, meta, path)
    return Classifier(trial.model, trial.record, meta).to(device).eval().requires_grad_(False)


class Classifier(nn.Module):
    """A trained model that takes raw inputs.

    Args:
        model: the model as it was trained, on standardised inputs.
        trial: what its checkpoint says of its trial: phase, arm, seed, training.
        meta: what its data set says of channels, classes and tasks; None if inputs are standardised already.

    Attributes:
        class_names: a name for each label of the first task; "0", "1", … where none are known.
        tasks: a name for each head, "class" for the first: those after it are phase 7b.3's further tasks.
        input_shape: shape of one example, (channels, length) or (channels, height, width).
    """

    mean: Tensor  # (channels, 1, ...), float64 like the arithmetic of the stage `prepare`
    std: Tensor

    def __init__(self, model: Model | Reference, trial: Record, meta: Meta | None = None) -> None:
        super().__init__()
        self.model, self.trial = model, trial
        self.input_shape = model.spec.input_shape
        heads = _heads(model)
        self.class_names = meta.class_names if meta else tuple(map(str, range(heads[0])))
        further = list(meta.tasks) if meta else [f"task {number}" for number in range(1, len(heads))]
        self.tasks = ("class", *further[: len(heads) - 1])
        channels = self.input_shape[0]
        per_channel = (-1, *(1 for _ in self.input_shape[1:]))
        for name, values in (
            ("mean", meta.mean if meta else (0.0,) * channels),
            ("std", meta.std if meta else (1.0,) * channels),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64).view(per_channel))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of the first task for examples x (B, channels, ...) in the units of their source.

        Raises:
            UserError: if x has another shape, or values that are no real numbers.
        """
        return self._run(x).logits[0]

    def logits(self, x: Tensor, task: int = 0) -> Tensor:
        """Logits (B, C) of a task, in large batches and without a graph. Raises UserError as `forward` does."""
        self._check_task(task)
        return torch.cat([output.logits[task] for output in self._outputs(x, task)])

    def predict(self, x: Tensor, task: int = 0) -> Tensor:
        """The most probable label of each example (B,), int64; as `logits`."""
        return self.logits(x, task).argmax(-1)

    def predict_proba(self, x: Tensor, task: int = 0) -> Tensor:
        """The probability of each label (B, C); as `logits`."""
        return self.logits(x, task).softmax(-1)

    def routing(self, x: Tensor, task: int = 0) -> pd.DataFrame:
        """How a task's gate routes the tokens of x: one row per block and expert.

        Columns: block; expert, its stable id; family; share, of the B * S * K token slots of the block; gate, the mean
        mixture weight over the expert's tokens; entropy, their mean routing entropy, 0 to 1. The last two are blank
        for an expert without tokens.

        Raises:
            UserError: as `forward` does, or if the model has no experts.
        """
        self._check_task(task)
        if not isinstance(self.model, Model):
            raise UserError(f"a model of {self.trial.phase} has no experts, and so no routing")
        layers, slots = self.model.layers, 0
        sums = [torch.zeros(3, moe.n_routed, dtype=torch.float64, device=self.mean.device) for moe in layers]
        for output in self._outputs(x, task):
            for moe, routing, total in zip(layers, output.routings, sums, strict=True):
                gate = min(task, len(routing.experts) - 1)
                signals = expert_signals(Routing(*(part[gate : gate + 1] for part in routing)), moe.n_routed)
                count = signals.load.double() * routing.experts[gate].numel()
                total += torch.stack([count, count * signals.gate, count * signals.entropy])
            slots += output.routings[0].experts[0].numel()
        tables = [_table(block, layers[block], total, slots) for block, total in enumerate(sums)]
        return pd.concat(tables, ignore_index=True)

    def _run(self, x: Tensor, n_tasks: int = 1) -> Output:
        _check_input(x, self.input_shape)
        standardised = (x.double() - self.mean) / self.std  # as `prepare.standardise`: rounded to float32 once
        output: Output = self.model(standardised.to(next(self.model.parameters()).dtype), n_tasks)
        return output

    @torch.no_grad()
    def _outputs(self, x: Tensor, task: int) -> Iterator[Output]:
        """Outputs up to a task in evaluation mode, batch by batch, wherever x lies."""
        _check_input(x, self.input_shape)
        self.eval()
        for rows in torch.split(x, EVALUATION_BATCH):
            yield self._run(rows.to(self.mean.device), task + 1)

    def _check_task(self, task: int) -> None:
        if task not in range(len(self.tasks)):
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(self.tasks))
            raise UserError(f"task is {task!r}: this model has {known}")


def _check_input(x: Tensor, example: tuple[int, ...]) -> None:
    wanted = f"(B, {', '.join(map(str, example))})"
    if not isinstance(x, Tensor):
        raise UserError(f"x is of type {type(x).__name__}: it must be a torch.Tensor of shape {wanted}")
    if tuple(x.shape[1:]) != example:
        raise UserError(f"x has shape {tuple(x.shape)}: it must be {wanted}, B examples of shape {example}")
    if x.dtype == torch.bool or x.is_complex():
        raise UserError(f"x is {x.dtype}: it must be of real numbers, floating point or integer, and of shape {wanted}")


def _check_fits(model: Model | Reference, meta: Meta, path: Path) -> None:
    """Raises UserError if the data set that `path` describes can't be the one that the model was trained on."""
    known = (meta.classes, *(max(labels) + 1 for labels in meta.tasks.values()))
    heads = _heads(model)
    if meta.input_shape != model.spec.input_shape or known[: len(heads)] != heads:
        raise UserError(
            f"{path} describes examples of shape {meta.input_shape} and {known} labels of its tasks, and the model has "
            f"{model.spec.input_shape} and {heads}: give the data set that it was trained on"
        )


def _heads(model: Model | Reference) -> tuple[int, ...]:
    """Labels of each task."""
    return model.spec.heads if isinstance(model, Model) else (model.spec.classes,)


def _find(folder: Path) -> Path:
    """`dataset.json` of the study that a checkpoint lies in."""
    files = (data.meta_file(above / PREPARED) for above in folder.resolve().parents)
    for file in files:
        if file.is_file():
            return file
    raise UserError(
        f"there is no {data.meta_file(PREPARED)} in a folder above {folder}, to tell the units of inputs: "
        "give its path as dataset, or None if inputs are standardised already"
    )


def _device(name: torch.device | str) -> torch.device:
    """The device, if it can be used: float64, in which inputs are standardised, included."""
    try:
        return torch.empty(0, dtype=torch.float64, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device is {str(name)!r}, which can't be used here: {one_line(error)}") from None


def _table(block: int, moe: MoE, sums: Tensor, slots: int) -> pd.DataFrame:
    """The rows of `Classifier.routing` for one block, from sums (3, E) over tokens: their number, gates, entropies."""
    count, gates, entropies = sums.cpu().numpy()
    with np.errstate(invalid="ignore"):  # the mean of no tokens is blank
        means = {"share": count / slots, "gate": gates / count, "entropy": entropies / count}
    ids = {"block": block, "expert": moe.expert_id.tolist(), "family": moe.family_of.tolist()}
    return pd.DataFrame(ids | means)
