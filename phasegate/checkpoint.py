"""Checkpoints: a folder with `weights.safetensors` and `checkpoint.json`, rebuilt from themselves alone.

The JSON file is written last and atomically, so a folder without it is no checkpoint. Loading verifies: the model
must get exactly the recorded number of gate examples right, and the weights must have the recorded hash. Without data,
which a trained model is used without, the hash and the structure are all that can be verified.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import AdamW

from phasegate.errors import UserError, one_line
from phasegate.files import read_json, refuse_special, sha256, write_atomic
from phasegate.memory import memory
from phasegate.model import Cost, Model, ModelSpec, cost
from phasegate.moe import AXES
from phasegate.pretraining_params import Architecture, Training
from phasegate.references import Reference, ReferenceSpec
from phasegate.sections import Count, Index, Section, parse
from phasegate.training import Examples, correct, make_optimizer

FORMAT = 2
WEIGHTS, RECORD = "weights.safetensors", "checkpoint.json"
T = TypeVar("T")
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_MEANINGLESS = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration),
    *(RuntimeError, OverflowError, ZeroDivisionError, MemoryError, AssertionError),
)
"""What building a model raises for values that make no sense together."""


class Record(Section):
    """What a checkpoint says of its trial, besides the weights."""

    phase: Annotated[str, Field(max_length=100)]
    arm: Annotated[str, Field(max_length=100)]
    seed: Index
    training: Training  # the 7a configuration
    n_routed_start: Index  # routed experts when the trial began


@dataclass(frozen=True)
class Checkpoint:
    """A verified model, its optimizer if that was kept, the record, and what the model cost when it was saved."""

    model: Model | Reference
    optimizer: AdamW | None
    record: Record
    cost: Cost


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
        "trial": record.model_dump(),
        "gate": {"correct": correct(model, gate), "total": len(gate)},
        "cost": cost(model, model.spec.input_shape)._asdict(),
        "weights": {"sha256": sha256(weights), "optimizer": optimizer is not None},
    }
    write_atomic(folder / WEIGHTS, weights)
    write_atomic(folder / RECORD, json.dumps(content, indent=2) + "\n")


def summary(folder: Path) -> tuple[Record, float, Cost]:
    """What a checkpoint says of itself, without loading its weights: record, gate accuracy (percent), cost.

    Raises:
        UserError: if the file is missing or does not describe a checkpoint.
    """
    content = _read_record(folder / RECORD)
    return content.trial, 100 * content.gate.correct / content.gate.total, Cost(**content.cost.model_dump())


def load(folder: Path, gate: Examples | None, device: torch.device | str = "cpu") -> Checkpoint:
    """Rebuild a checkpoint from its own files and verify it on the gate split.

    Without one (None), the model must run on an example of zeros instead, and nothing is counted.

    Raises:
        UserError: if a file is missing or damaged, or if the accuracy is not the recorded one, to the example.
    """
    content, tensors = _read_record(folder / RECORD), _read_weights(folder / WEIGHTS)
    try:
        model = _build(content.model, parts_at_most=len(tensors))
        if gate is not None and model.spec.input_shape != gate.x.shape[1:]:
            raise ValueError(f"its examples have shape {model.spec.input_shape}, not {tuple(gate.x.shape[1:])}")
        fill(model, below(tensors, "model."), str(folder / WEIGHTS))
        model.to(device)
        got = correct(model, _zeros(model, device) if gate is None else gate)
    except UserError:
        raise
    except _MEANINGLESS as error:
        runs = "runs" if gate is None else "runs on this data"
        raise UserError(f"{folder} does not describe a model that {runs}: {one_line(error)}") from None
    if gate is not None and (got, len(gate)) != (content.gate.correct, content.gate.total):
        raise UserError(
            f"{folder} does not hold the model that was saved: expected {content.gate.correct:,} of "
            f"{content.gate.total:,} correct, got {got:,} of {len(gate):,}"
        )
    if sha256(folder / WEIGHTS) != content.weights.sha256:
        raise UserError(f"{folder / WEIGHTS} was altered: its sha256 is not the recorded {content.weights.sha256}")
    kept = content.weights.optimizer
    optimizer = _restore(model, content.trial.training, tensors, folder / WEIGHTS) if kept else None
    return Checkpoint(model, optimizer, content.trial, Cost(**content.cost.model_dump()))


def _zeros(model: Model | Reference, device: torch.device | str) -> Examples:
    """One example of zeros, of the shape that a model claims to take; ValueError for one beyond memory."""
    width = model.spec.architecture.width if isinstance(model, Model) else 1
    if 64 * width * prod(model.spec.input_shape) > memory():  # 4 bytes a number, with room for what layers make of it
        raise ValueError(f"its examples claim shape {model.spec.input_shape}, too large for this machine's memory")
    shape = (1, *model.spec.input_shape)
    return Examples(torch.zeros(shape, device=device), torch.zeros(1, dtype=torch.int64, device=device))


class _Gate(Section):
    correct: Index
    total: Count


class _Cost(Section):
    params_total: Annotated[int, Field(ge=0, strict=True)]
    params_active: Annotated[int, Field(ge=0, strict=True)]
    flops_per_example: Annotated[int, Field(ge=0, strict=True)]


class _Weights(Section):
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    optimizer: bool


class _Content(Section):
    """A checkpoint's JSON file."""

    format: Literal[2]
    model: dict[str, Any]  # a specification, and its kind
    trial: Record
    gate: _Gate
    cost: _Cost
    weights: _Weights


def _to_json(spec: ModelSpec | ReferenceSpec) -> dict[str, Any]:
    values = asdict(spec)
    if isinstance(spec, ModelSpec):
        values["architecture"] = spec.architecture.model_dump()
    return values


def _build(values: dict[str, Any], parts_at_most: int) -> Model | Reference:
    """The model that a checkpoint describes, without memory: whether its weights are as large, `fill` will see."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    with torch.device("meta"):
        spec: ModelSpec | ReferenceSpec
        if fields.pop("kind") == "reference":
            spec = ReferenceSpec(**fields)
            parts = max(len(spec.hidden or ()), len(spec.channels or ()))
        else:
            spec = ModelSpec(architecture=parse(Architecture, fields.pop("architecture"), "architecture"), **fields)
            parts = max(spec.architecture.blocks, len(spec.heads))
        if parts > parts_at_most:
            raise ValueError(f"its {parts:,} layers or heads have only {parts_at_most:,} tensors")
        return Model(spec) if isinstance(spec, ModelSpec) else Reference(spec)


def fill(
    model: Model | Reference, state: dict[str, Tensor], source: str, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Give a model these weights and buffers, copied; an optimizer that holds the model's parameters keeps doing so.

    What surgery resizes, and nothing else, takes its size from them.

    Raises:
        UserError: naming a tensor of `source` that is missing, too many, or of another shape or type.
    """
    before = list(model.parameters())
    device = next(iter(before)).device
    layers = model.layers if isinstance(model, Model) else []
    for block, moe in enumerate(layers):
        sizes = _axis_sizes(state, f"blocks.{block}.moe.")
        for name, axes in AXES.items():
            old = getattr(moe, name)
            shape = [sizes.get(axis or "", size) for axis, size in zip(axes, old.shape, strict=True)]
            new = torch.empty(shape, dtype=old.dtype, device="meta")
            setattr(moe, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        shapes = [tuple(part[name].shape) if name in part else None for part in (wanted, state)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{source}: {name} should have shape {shapes[0]}, and has {shapes[1]}")
        if wanted[name].dtype != state[name].dtype:
            raise UserError(f"{source}: {name} should be {wanted[name].dtype}, and is {state[name].dtype}")
    there = device if device.type != "meta" else torch.device("cpu")
    model.load_state_dict({name: tensor.to(there, copy=True) for name, tensor in state.items()}, assign=True)
    for moe in layers:
        moe.refresh()
    if optimizer is not None:
        replaced = dict(zip(map(id, before), model.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(parameter), parameter) for parameter in group["params"]]


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


def _restore(model: nn.Module, training: Training, tensors: dict[str, Tensor], path: Path) -> AdamW:
    optimizer = make_optimizer(model.parameters(), training)
    for name, parameter in model.named_parameters():
        state = below(tensors, f"optimizer.{name}.")
        if not state:
            continue
        if set(state) != MOMENTS:
            raise UserError(f"{path}: the optimizer has {', '.join(sorted(state))} of {name}, not its Adam moments")
        for key, value in state.items():
            shape = () if key == "step" else tuple(parameter.shape)
            if tuple(value.shape) != shape or value.dtype != torch.float32:
                raise UserError(
                    f"{path}: {key} of {name} should be torch.float32 of shape {shape}, and is {value.dtype} of "
                    f"{tuple(value.shape)}"
                )
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    return optimizer


def below(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What stands under a prefix in a flat mapping, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _read_record(path: Path) -> _Content:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of format {FORMAT}")
    return parse(_Content, content, str(path))


def _read_weights(path: Path) -> dict[str, Tensor]:
    refuse_special(path)
    try:
        if (size := path.stat().st_size) > memory():
            raise ValueError(f"it claims {size:,} bytes, more than this machine's memory")
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `dvc repro` runs the stage that writes it") from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): `dvc repro` makes it again") from None
