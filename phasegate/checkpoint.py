"""Checkpoints: a folder with `weights.safetensors` and `checkpoint.json`, rebuilt from themselves alone.

The JSON file is written last and atomically, so a folder without it is no checkpoint. Loading verifies: the model
must get exactly the recorded number of gate examples right, and the weights must have the recorded hash.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import AdamW

from phasegate.errors import UserError
from phasegate.files import sha256, write_atomic
from phasegate.model import Cost, Model, ModelSpec, cost
from phasegate.moe import AXES
from phasegate.params import Architecture, Training, parse
from phasegate.references import Reference, ReferenceSpec
from phasegate.training import Examples, correct, make_optimizer

FORMAT = 2
WEIGHTS, RECORD = "weights.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of its trial, besides the weights."""

    phase: str
    arm: str
    seed: int
    training: Training  # the 7a configuration
    n_routed_start: int  # routed experts when the trial began


@dataclass(frozen=True)
class Checkpoint:
    """A verified model, its optimizer if that was kept, and the record."""

    model: Model | Reference
    optimizer: AdamW | None
    record: Record


def save(folder: Path, model: Model | Reference, optimizer: AdamW | None, record: Record, gate: Examples) -> None:
    """Write a checkpoint; with the optimizer if training is to go on from it."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    kind = "moe" if isinstance(model, Model) else "reference"
    content = {
        "format": FORMAT,
        "model": {"kind": kind, **_to_json(model.spec)},
        "trial": {**asdict(record), "training": record.training.model_dump()},
        "gate": {"correct": correct(model, gate), "total": len(gate)},
        "cost": cost(model, model.spec.input_shape)._asdict(),
        "weights": {"sha256": sha256(weights), "optimizer": optimizer is not None},
    }
    write_atomic(folder / WEIGHTS, weights)
    write_atomic(folder / RECORD, json.dumps(content, indent=2) + "\n")


def summary(folder: Path) -> tuple[Record, float, Cost]:
    """What a checkpoint says of itself, without loading its weights: record, gate accuracy (percent), cost."""
    content = _read_record(folder / RECORD)
    try:
        gate = content["gate"]
        return _parse_record(content, folder), 100 * gate["correct"] / gate["total"], Cost(**content["cost"])
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{folder / RECORD} does not describe a checkpoint: {error}") from None


def load(folder: Path, gate: Examples, device: torch.device | str = "cpu") -> Checkpoint:
    """Rebuild a checkpoint from its own files and verify it on the gate split.

    Raises:
        UserError: if a file is missing or damaged, or if the accuracy is not the recorded one, to the example.
    """
    content = _read_record(folder / RECORD)
    tensors = _read_weights(folder / WEIGHTS)
    try:
        record = _parse_record(content, folder)
        expected, total = content["gate"]["correct"], content["gate"]["total"]
        digest, with_optimizer = content["weights"]["sha256"], content["weights"]["optimizer"]
        model = _build(content["model"])
        _fill(model, tensors, folder / WEIGHTS)
        model.to(device)
        got = correct(model, gate)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, RuntimeError) as error:
        raise UserError(f"{folder} does not describe a model that runs on this data: {error}") from None
    if (got, len(gate)) != (expected, total):
        raise UserError(
            f"{folder} does not hold the model that was saved: expected {expected:,} of {total:,} correct, "
            f"got {got:,} of {len(gate):,}"
        )
    if sha256(folder / WEIGHTS) != digest:
        raise UserError(f"{folder / WEIGHTS} was altered: its sha256 is not the recorded {digest}")
    return Checkpoint(model, _restore(model, record.training, tensors) if with_optimizer else None, record)


def _parse_record(content: dict[str, Any], folder: Path) -> Record:
    values = content["trial"]
    training = parse(Training, values["training"], f"{folder / RECORD}: training")
    return Record(**{**values, "training": training})


def _to_json(spec: ModelSpec | ReferenceSpec) -> dict[str, Any]:
    values = asdict(spec)
    if isinstance(spec, ModelSpec):
        values["architecture"] = spec.architecture.model_dump()
    return values


def _build(values: dict[str, Any]) -> Model | Reference:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if fields.pop("kind") == "reference":
        return Reference(ReferenceSpec(**fields))
    architecture = parse(Architecture, fields.pop("architecture"), "architecture")
    return Model(ModelSpec(architecture=architecture, **fields))


def _fill(model: Model | Reference, tensors: dict[str, Tensor], path: Path) -> None:
    """Load the weights. What surgery resizes, and nothing else, takes its size from them."""
    state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    layers = model.layers if isinstance(model, Model) else []
    for block, moe in enumerate(layers):
        sizes = _axis_sizes(state, f"blocks.{block}.moe.")
        for name, axes in AXES.items():
            old = getattr(moe, name)
            shape = [sizes.get(axis or "", size) for axis, size in zip(axes, old.shape, strict=True)]
            new = old.new_empty(shape)
            setattr(moe, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        shapes = [tuple(part[name].shape) if name in part else None for part in (wanted, state)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path}: {name} should have shape {shapes[0]}, and has {shapes[1]}")
    model.load_state_dict(state)
    for moe in layers:
        moe.refresh()


def _axis_sizes(state: dict[str, Tensor], prefix: str) -> dict[str, int]:
    """The size of each axis that surgery resizes, as the first stored tensor with that axis has it."""
    sizes: dict[str, int] = {}
    for name, axes in AXES.items():
        stored = state.get(prefix + name)
        if stored is not None and stored.dim() == len(axes):
            for axis, size in zip(axes, stored.shape, strict=True):
                sizes.setdefault(axis or "", size)
    sizes.pop("", None)
    return sizes


def _restore(model: nn.Module, training: Training, tensors: dict[str, Tensor]) -> AdamW:
    optimizer = make_optimizer(model.parameters(), training)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {
            key.removeprefix(prefix): value.to(parameter.device)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        if state:
            optimizer.state[parameter] = state
    return optimizer


def _read_record(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the stage that writes it has not ended") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of format {FORMAT}")
    return content


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the stage that writes it has not ended") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
