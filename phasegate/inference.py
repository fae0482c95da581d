"""Use trained models outside the pipeline: predict from raw inputs, count routing, export.

Shapes: B examples, C classes of a task, S tokens per example, E experts of a block, K chosen, G gates.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import phasegate
from phasegate.base.errors import UserError
from phasegate.base.paths import PREPARED
from phasegate.model.classifier import Network, Output
from phasegate.model.moe import Routing
from phasegate.model.routing_statistics import expert_signals
from phasegate.records.prepared import META, Meta, load_meta
from phasegate.training import checkpoint
from phasegate.training.checkpoint import Record
from phasegate.training.device import find_failure
from phasegate.training.predictions import EVALUATION_BATCH

STUDY = "the data set of the study"  # stands for the one that is found beside the checkpoint


def load(folder: Path | str, dataset: Path | str | None = STUDY, device: torch.device | str = "cpu") -> "Classifier":
    """Load a trained model from the folder of its checkpoint, in evaluation mode, with frozen parameters.

    Verify its structure and the sha256 of its weights, or raise `UserError`. The gate accuracy is not verified.

    Args:
        folder: one with `checkpoint.json` and `weights.safetensors`, such as models/p7b2/split/seed-0.
        dataset: `dataset.json`, or its folder, which says how the model's data were standardised; the model then
            takes inputs in the units of their source. By default, data/prepared/dataset.json in the nearest folder
            above `folder`. None if inputs are standardised already.
        device: where the model computes.
    """
    if phasegate.UNPINNED:
        warnings.warn(phasegate.UNPINNED, stacklevel=2)
    if why := find_failure(device):
        raise UserError(f"device is {str(device)!r}, which can't be used here: {why}")
    folder, device = Path(folder), torch.device(device)
    trial, meta = checkpoint.load(folder, None, device), None
    if dataset is not None:
        path = _find_meta(folder) if dataset == STUDY else Path(dataset)
        meta = load_meta(path.parent if path.name == META else path)
        _check_meta(trial.model, meta, path)
    return Classifier(trial.model, trial.record, meta).to(device).eval().requires_grad_(False)


class Classifier(nn.Module):
    """Predict from raw inputs with a trained model.

    Args:
        model: the model as it was trained, on standardised inputs.
        trial: the record of its trial: phase, arm, seed, training.
        meta: the description of its data set: channels, classes and tasks; None if inputs are standardised already.

    Attributes:
        class_names: a name for each label of the first task; "0", "1", … where none are known.
        tasks: a name for each head: "class" for the first, then the further tasks of phase 7b.3.
        input_shape: shape of one example, (channels, length) or (channels, height, width).
    """

    mean: Tensor  # (channels, 1, ...), float64 like the arithmetic of the stage `prepare`
    std: Tensor

    def __init__(self, model: Network, trial: Record, meta: Meta | None = None) -> None:
        super().__init__()
        self.model, self.trial = model, trial
        self.input_shape: tuple[int, ...] = model.spec.input_shape
        heads = model.spec.heads
        self.class_names = meta.class_names if meta else tuple(map(str, range(heads[0])))
        further = list(meta.tasks) if meta else [f"task {number}" for number in range(1, len(heads))]
        self.tasks = ("class", *further[: len(heads) - 1])
        channels = self.input_shape[0]
        moments = (meta.mean, meta.std) if meta else ((0.0,) * channels, (1.0,) * channels)
        for name, values in zip(("mean", "std"), moments, strict=True):
            moment = torch.tensor(values, dtype=torch.float64)
            self.register_buffer(name, moment.view(channels, *(1 for _ in self.input_shape[1:])))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C) of the first task for x (B, channels, ...) in source units; `UserError` if x is bad."""
        return self._run(x).logits[0]

    def logits(self, x: Tensor, task: int = 0) -> Tensor:
        """Return logits (B, C) of a task, in large batches and without a graph; `UserError` if x or they are bad."""
        self._check_task(task)
        if not (logits := torch.cat([output.logits[task] for output in self._run_batches(x, task)])).isfinite().all():
            raise UserError("logits are not finite: x, weights or dataset.json have NaN, or numbers far from the data")
        return logits

    def predict(self, x: Tensor, task: int = 0) -> Tensor:
        """Return the most probable label of each example (B,), int64; see `logits`."""
        return self.logits(x, task).argmax(-1)

    def predict_proba(self, x: Tensor, task: int = 0) -> Tensor:
        """Return the probability of each label (B, C); see `logits`."""
        return self.logits(x, task).softmax(-1)

    def routing(self, x: Tensor, task: int = 0) -> pd.DataFrame:
        """Return how a task's gate routes the tokens of x: one row per block and expert.

        Columns: block; expert, its stable id; family; share, of the B * S * K token slots of the block; gate, the mean
        mixture weight over the expert's tokens; entropy, their mean routing entropy, 0 to 1. The last two are blank
        for an expert without tokens. Raises `UserError` as `forward` does, or if the model has no experts.
        """
        self._check_task(task)
        layers, slots = self.model.layers, 0
        if not layers:
            raise UserError(f"a model of {self.trial.phase} has no experts, and so no routing")
        sums = [torch.zeros(3, moe.n_routed, dtype=torch.float64, device=self.mean.device) for moe in layers]
        for output in self._run_batches(x, task):
            for moe, routing, total in zip(layers, output.routings, sums, strict=True):
                gate = min(task, len(routing.experts) - 1)
                signals = expert_signals(Routing(*(part[gate : gate + 1] for part in routing)), moe.n_routed)
                count = signals.load.double() * routing.experts[gate].numel()
                total += torch.stack([count, count * signals.gate, count * signals.entropy])
            slots += output.routings[0].experts[0].numel()
        tables = []
        for block, (moe, (count, gates, entropies)) in enumerate(zip(layers, sums, strict=True)):
            ids = {"block": block, "expert": moe.expert_id.tolist(), "family": moe.family_of.tolist()}
            means = {"share": count / slots, "gate": gates / count, "entropy": entropies / count}  # NaN without tokens
            tables.append(pd.DataFrame(ids | {name: values.tolist() for name, values in means.items()}))
        return pd.concat(tables, ignore_index=True)

    def _run(self, x: Tensor, n_tasks: int = 1) -> Output:
        self._check_input(x)
        standardised = (x.double() - self.mean) / self.std  # as `prepare.standardise`: rounded to float32 once
        output: Output = self.model(standardised.to(next(self.model.parameters()).dtype), n_tasks)
        return output

    @torch.no_grad()
    def _run_batches(self, x: Tensor, task: int) -> Iterator[Output]:
        """Yield outputs up to a task in evaluation mode, batch by batch, wherever x lies."""
        self._check_input(x)
        self.eval()
        for rows in torch.split(x, EVALUATION_BATCH):
            yield self._run(rows.to(self.mean.device), task + 1)

    def _check_task(self, task: int) -> None:
        if task not in range(len(self.tasks)):
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(self.tasks))
            raise UserError(f"task is {task!r}: this model has {known}")

    def _check_input(self, x: Tensor) -> None:
        wanted = f"(B, {', '.join(map(str, self.input_shape))})"
        if not isinstance(x, Tensor):
            raise UserError(f"x is of type {type(x).__name__}: it must be a torch.Tensor of shape {wanted}")
        if tuple(x.shape[1:]) != self.input_shape:
            raise UserError(f"x has shape {tuple(x.shape)}: it must be {wanted}, with B examples")
        if x.dtype == torch.bool or x.is_complex():
            raise UserError(f"x is {x.dtype}: it must be of real numbers, floating point or integer, in shape {wanted}")


def _check_meta(model: Network, meta: Meta, path: Path) -> None:
    """Raise `UserError` if the model cannot have been trained on the data set that `path` describes."""
    known, heads = (meta.classes, *(max(labels) + 1 for labels in meta.tasks.values())), model.spec.heads
    if meta.input_shape != model.spec.input_shape or known[: len(heads)] != heads:
        raise UserError(
            f"{path} describes examples of shape {meta.input_shape} and {known} labels of its tasks, and the model has "
            f"{model.spec.input_shape} and {heads}: give the data set that it was trained on"
        )


def _find_meta(folder: Path) -> Path:
    """Return `dataset.json` of the study that a checkpoint lies in."""
    for above in folder.resolve().parents:
        if (file := above / PREPARED / META).is_file():
            return file
    raise UserError(
        f"there is no {PREPARED / META} in a folder above {folder}, which would say the units of inputs: "
        "give its path as dataset, or None if inputs are standardised already"
    )
