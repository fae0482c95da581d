"""Save and load checkpoints: folders with `weights.safetensors` and `checkpoint.json`, which need nothing else.

The JSON file is written last and atomically, so a folder without it is no checkpoint. Loading verifies: the weights
must have the recorded hash, and the model's logits on the gate split too. Where rounding may differ, on a GPU, with
another torch, or on a processor without AVX2, the model must get the recorded number of gate examples right, give or
take those that are nearly a tie. A model that is used without data is verified by its hash and its structure alone.
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
from torch.optim import Optimizer

import phasegate
from phasegate.base.errors import UserError, one_line
from phasegate.base.files import read_json, refuse_special, sha256, write_atomic
from phasegate.base.memory import memory
from phasegate.model.classifier import Cost, ModelSpec, Network, cost
from phasegate.model.references import ReferenceSpec, Spec, build
from phasegate.params.fields import Count, Index, Section, parse
from phasegate.params.pretraining import Architecture, Training
from phasegate.training.batches import Examples
from phasegate.training.loop import make_optimizer
from phasegate.training.predictions import first_task_logits

FORMAT = 3
WEIGHTS, RECORD = "weights.safetensors", "checkpoint.json"
NEAR = 1e-3  # logits that differ by less may trade places where rounding differs
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
NONSENSE = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, StopIteration)
"""Besides TypeError and ValueError, what building a model raises for values that make no sense together."""
T = TypeVar("T")


class Record(Section):
    """Describe the trial that a checkpoint comes from."""

    phase: Annotated[str, Field(max_length=100)]
    arm: Annotated[str, Field(max_length=100)]
    seed: Index
    training: Training  # the 7a configuration
    n_routed_start: Index  # routed experts when the trial began


@dataclass(frozen=True)
class Checkpoint:
    """Hold a verified model, its optimizer if that was kept, the record, and the model's cost when it was saved."""

    model: Network
    optimizer: Optimizer | None
    record: Record
    cost: Cost


class _Gate(Section):
    correct: Index
    total: Count
    logits: Hash  # the sha256 of the first task's logits (N, C)
    rounding: Annotated[str, Field(max_length=100)]  # what decides it; blank where nothing is promised


class _Weights(Section):
    sha256: Hash
    optimizer: bool


class _Content(Section):
    """Define the content of `checkpoint.json`."""

    format: Literal[3]
    model: dict[str, Any]  # a specification, and its kind
    trial: Record
    gate: _Gate
    cost: Cost
    weights: _Weights


def save(folder: Path, model: Network, optimizer: Optimizer | None, record: Record, gate: Examples) -> None:
    """Write a checkpoint, with the optimizer if training is to continue from it."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {}) if optimizer else {}
        tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    spec = asdict(model.spec)
    if model.architecture:
        spec["architecture"] = model.architecture.model_dump()
    content = {
        "format": FORMAT,
        "model": {"kind": "moe" if model.architecture else "reference"} | spec,
        "trial": record.model_dump(),
        "gate": _judge(first_task_logits(model, gate.x), gate).model_dump(),
        "cost": cost(model).model_dump(),
        "weights": {"sha256": sha256(weights), "optimizer": optimizer is not None},
    }
    write_atomic(folder / WEIGHTS, weights)
    write_atomic(folder / RECORD, json.dumps(content, indent=2) + "\n")


def summary(folder: Path) -> tuple[Record, float, Cost]:
    """Return a checkpoint's record, gate accuracy (percent) and cost without loading its weights, or `UserError`."""
    content = _read_record(folder / RECORD)
    return content.trial, 100 * content.gate.correct / content.gate.total, content.cost


def load(folder: Path, gate: Examples | None, device: torch.device | str = "cpu") -> Checkpoint:
    """Rebuild a checkpoint from its files and verify it on the gate split, or without one on an example of zeros.

    A file that is missing or damaged raises `UserError`, and so do logits that differ in a single bit.
    """
    content, tensors = _read_record(folder / RECORD), _read_weights(folder / WEIGHTS)
    try:
        model = _build(content.model, parts_at_most=len(tensors))
        if gate is not None and model.spec.input_shape != gate.x.shape[1:]:
            raise ValueError(f"its examples have shape {model.spec.input_shape}, not {tuple(gate.x.shape[1:])}")
        fill(model, below(tensors, "model."), str(folder / WEIGHTS))
        model.to(device)
        logits = first_task_logits(model, (_zeros(model, device) if gate is None else gate).x)
    except UserError:
        raise
    except (TypeError, ValueError, *NONSENSE) as error:
        runs = "runs" if gate is None else "runs on this data"
        raise UserError(f"{folder} does not describe a model that {runs}: {one_line(error)}") from None
    if gate is not None:
        _verify(folder, content.gate, logits, gate)
    if sha256(folder / WEIGHTS) != content.weights.sha256:
        raise UserError(f"{folder / WEIGHTS} was altered: its sha256 is not the recorded {content.weights.sha256}")
    optimizer = None
    if content.weights.optimizer:
        state = below(tensors, "optimizer.")
        optimizer = _restore(model, content.trial.training, state, f"{folder / WEIGHTS}, optimizer")
    return Checkpoint(model, optimizer, content.trial, content.cost)


def fill(model: Network, state: dict[str, Tensor], source: str, optimizer: Optimizer | None = None) -> None:
    """Copy weights and buffers into a model, and replace its parameters in an optimizer.

    Only what surgery resizes takes its size from them. Raises `UserError` naming the first tensor that does not fit.
    """
    before = list(model.parameters())
    device = before[0].device
    parts, modules = _by_owner(state), dict(model.named_modules())
    for block, moe in enumerate(model.layers):
        moe.resize_like(parts.get(f"blocks.{block}.moe", {}))
    _check_fit(model.state_dict(), state, source)
    there = device if device.type != "meta" else torch.device("cpu")
    for owner, tensors in parts.items():  # of a whole model it would look at every tensor for every module
        copies = {name: tensor.to(there, copy=True) for name, tensor in tensors.items()}
        modules[owner].load_state_dict(copies, strict=False, assign=True)
    replaced = dict(zip(map(id, before), model.parameters(), strict=True))
    for group in optimizer.param_groups if optimizer else ():
        group["params"] = [replaced.get(id(parameter), parameter) for parameter in group["params"]]


def below(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return what stands under a prefix in a flat mapping, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _by_owner(state: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Group a flat mapping by what stands before the last dot of its names."""
    groups: dict[str, dict[str, T]] = {}
    for name, value in state.items():
        owner, _, own = name.rpartition(".")
        groups.setdefault(owner, {})[own] = value
    return groups


def _judge(logits: Tensor, gate: Examples) -> _Gate:
    """Return what a checkpoint records of the logits (N, C) on the gate split."""
    promised = phasegate.PROMISED and not phasegate.UNPINNED and logits.device.type == "cpu"
    return _Gate(
        correct=int((logits.argmax(-1) == gate.y).sum()),
        total=len(gate),
        logits=sha256(logits.cpu().contiguous().numpy().data),
        rounding=f"x86-64 with AVX2, torch {torch.__version__.partition('+')[0]}" if promised else "",
    )


def _verify(folder: Path, expected: _Gate, logits: Tensor, gate: Examples) -> None:
    """Raise `UserError` if the logits (N, C) on the gate split are not those that a checkpoint recorded."""
    got = _judge(logits, gate)
    if got.rounding and got.rounding == expected.rounding:
        same = got == expected
    else:
        ties = int(((logits >= logits.amax(-1, keepdim=True) - NEAR).sum(-1) > 1).sum())
        same = got.total == expected.total and abs(got.correct - expected.correct) <= ties
    if not same:
        other = ", by other logits" if got.correct == expected.correct else ""
        raise UserError(
            f"{folder} does not hold the model that was saved: expected {expected.correct:,} of {expected.total:,} "
            f"correct, got {got.correct:,} of {got.total:,}{other}"
        )


def _build(values: dict[str, Any], parts_at_most: int) -> Network:
    """Build the model that a checkpoint describes, without memory for its weights."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    spec: Spec
    if fields.pop("kind") == "reference":
        spec = ReferenceSpec(**fields)
        parts = max(len(spec.hidden or ()), len(spec.channels or ()))
    else:
        spec = ModelSpec(architecture=parse(Architecture, fields.pop("architecture"), "architecture"), **fields)
        parts = max(spec.architecture.blocks, len(spec.heads))
    if parts > parts_at_most:
        raise ValueError(f"its {parts:,} layers or heads have only {parts_at_most:,} tensors")
    with torch.device("meta"):
        return build(spec)


def _zeros(model: Network, device: torch.device | str) -> Examples:
    """Return one example of zeros of the shape that a model claims, or raise ValueError for one beyond memory."""
    width = model.architecture.width if model.architecture else 1
    if 64 * width * prod(model.spec.input_shape) > memory():  # 4 bytes a number, with room for the layers' results
        raise ValueError(f"its examples claim shape {model.spec.input_shape}, too large for this machine's memory")
    shape = (1, *model.spec.input_shape)
    return Examples(torch.zeros(shape, device=device), torch.zeros(1, dtype=torch.int64, device=device))


def _restore(model: nn.Module, training: Training, state: dict[str, Tensor], source: str) -> Optimizer:
    """Rebuild the optimizer of a checkpoint."""
    optimizer, wanted, parts = make_optimizer(model.parameters(), training), dict[str, Tensor](), _by_owner(state)
    for name, parameter in model.named_parameters():
        if moments := parts.get(name):
            wanted |= {f"{name}.step": torch.zeros(()), f"{name}.exp_avg": parameter, f"{name}.exp_avg_sq": parameter}
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
    _check_fit(wanted, state, source)
    return optimizer


def _check_fit(wanted: dict[str, Tensor], found: dict[str, Tensor], source: str) -> None:
    """Raise `UserError` naming the first tensor of `source` that is missing, too many, or of another shape or type."""
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [tuple(part[name].shape) if name in part else None for part in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{source}: {name} should have shape {shapes[0]}, and has {shapes[1]}")
        if wanted[name].dtype != found[name].dtype:
            raise UserError(f"{source}: {name} should be {wanted[name].dtype}, and is {found[name].dtype}")


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
