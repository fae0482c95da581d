"""Evaluation on the test split: the only module that reads it.

Shapes: N test examples, C classes, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import safetensors.numpy
import torch

from phasegate import checkpoint, data, execution
from phasegate.checkpoint import RECORD, Checkpoint
from phasegate.data import Array
from phasegate.errors import UserError
from phasegate.failure import FAILURE, FAILURE_COLUMNS, read_failure
from phasegate.files import write_atomic
from phasegate.halves import HALVES_COLUMNS, halves
from phasegate.lineage import LOAD_COLUMNS, LOADS
from phasegate.logs import CURVE, SURGERIES, SURGERY_COLUMNS
from phasegate.model import Cost, Model, Output
from phasegate.moe import routing_entropy
from phasegate.table_files import read_table
from phasegate.training import Examples, load_examples, on_device, predict
from phasegate.trials import seconds

CALIBRATION_BINS = 15
KEY = ["phase", "arm", "seed"]  # what a trial is called in every table
TABLES = {  # the tables of a phase, with their further columns
    "trials": [
        *("accuracy", "nll", "calibration_error", "routing_entropy", "dead_experts", "mutual_information"),
        *("n_routed_start", "n_routed_end", *Cost._fields, "train_seconds"),
    ],
    "classes": ["class", "accuracy"],
    "routing": ["block", "expert", "class", "tokens"],
    "tasks": ["task", "accuracy", "derived"],
    "halves": HALVES_COLUMNS,
    "curves": ["step", "loss", "accuracy", "n_routed", "dead_experts", "routing_entropy"],
    "surgeries": SURGERY_COLUMNS,
    "loads": LOAD_COLUMNS,
}
LEFT = {"curves": CURVE, "surgeries": SURGERIES, "loads": LOADS}  # those that a trial left in its folder


class Evaluation(NamedTuple):
    """One trial on the test split."""

    trial: dict[str, Any]  # a row of trials.csv
    classes: pd.DataFrame  # accuracy per class
    routing: pd.DataFrame  # tokens per block, expert and class
    tasks: pd.DataFrame  # accuracy of further tasks
    halves: pd.DataFrame  # what became of splits
    predictions: Array  # (N,) predicted classes


def evaluate_phase(models: Path, prepared: Path, output: Path, may_be_empty: bool = False) -> None:
    """Evaluate every checkpoint below `models` and write the tables of the phase, failures too, into `output`.

    Raises:
        UserError: if there is neither a checkpoint nor a failure though there has to be, or if one does not load.
    """
    device = execution.device()
    gate, tasks = load_examples(prepared, device)[2], data.load_meta(prepared).tasks
    test = on_device(data.load_test(prepared), device)
    folders, failed = (sorted(path.parent for path in models.glob(f"*/*/{name}")) for name in (RECORD, FAILURE))
    if not (folders or failed or may_be_empty):
        raise UserError(f"{models} holds no checkpoints: run `dvc repro` for the stage that writes it")
    results = {
        folder: evaluate(checkpoint.load(folder, gate, device), test, tasks, _left(folder, "surgeries"))
        for folder in folders
    }
    output.mkdir(parents=True, exist_ok=True)
    trials = [result.trial | {"train_seconds": seconds(folder)} for folder, result in results.items()]
    tables = {"trials": pd.DataFrame(trials, columns=[*KEY, *TABLES["trials"]])}
    for name in ("classes", "routing", "tasks", "halves"):
        tables[name] = _joined(name, [getattr(result, name) for result in results.values()])
    for name in LEFT:
        tables[name] = _joined(name, [_with(_key(r.trial), _left(folder, name)) for folder, r in results.items()])
    failures = [astuple(failure) for failure in map(read_failure, failed) if failure]
    tables["failures"] = pd.DataFrame(failures, columns=FAILURE_COLUMNS)
    for name, table in tables.items():
        write_atomic(output / f"{name}.csv", table.to_csv(index=False))
    predictions = {f"{r.trial['arm']}/seed-{r.trial['seed']}": r.predictions for r in results.values()}
    write_atomic(output / "predictions.safetensors", safetensors.numpy.save(predictions))


def evaluate(
    trial: Checkpoint, test: Examples, tasks: Mapping[str, Sequence[int]], surgeries: pd.DataFrame
) -> Evaluation:
    """Accuracy (percent), negative log-likelihood (nats), calibration error (pp), routing and cost of one model."""
    outputs = predict(trial.model, test.x)
    logits = torch.cat([output.logits[0] for output in outputs])
    y = test.y.cpu().numpy()
    probs = logits.double().softmax(-1).cpu().numpy()
    predicted = probs.argmax(1)
    right = predicted == y
    record = trial.record
    key = _key(dict(record))
    usage = class_usage(trial.model, outputs, test.y)
    row = key | {
        "accuracy": 100 * right.mean(),
        "nll": -np.log(probs[np.arange(len(y)), y].clip(min=np.finfo(float).tiny)).mean(),
        "calibration_error": calibration_error(probs.max(1), right),
        **_routing_metrics(outputs, usage),
        "n_routed_start": record.n_routed_start,
        "n_routed_end": trial.model.n_routed if isinstance(trial.model, Model) else 0,
        **trial.cost._asdict(),
    }
    classes = pd.DataFrame({"class": (c := np.unique(y)), "accuracy": [100 * right[y == k].mean() for k in c]})
    return Evaluation(
        row,
        classes=_with(key, classes),
        routing=_with(key, _long(usage)),
        tasks=_with(key, further_tasks(trial.model, test, predicted, tasks)),
        halves=_with(key, halves(trial.model, surgeries, test)),
        predictions=predicted,
    )


def further_tasks(
    model: torch.nn.Module, test: Examples, predicted: Array, tasks: Mapping[str, Sequence[int]]
) -> pd.DataFrame:
    """Accuracy (percent) of each further head, beside that of the label derived from the predicted class."""
    rows = []
    if isinstance(model, Model) and len(model.heads) > 1:
        y, outputs = test.y.cpu().numpy(), predict(model, test.x, len(model.heads))
        for head, (task, label_map) in enumerate(tasks.items(), start=1):
            labels = np.array(label_map)
            answers = torch.cat([output.logits[head] for output in outputs]).argmax(-1).cpu().numpy()
            accuracies = [100 * (found == labels[y]).mean() for found in (answers, labels[predicted])]
            rows.append((task, *accuracies))
    return pd.DataFrame(rows, columns=TABLES["tasks"])


def calibration_error(confidence: Array, right: Array, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error, pp: |accuracy - confidence| over equal-width bins, weighted by their size.

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=right - confidence, minlength=bins)
    return float(100 * np.abs(gaps).sum() / len(right))


def class_usage(model: torch.nn.Module, outputs: list[Output], y: torch.Tensor) -> dict[tuple[int, int], Array]:
    """Test tokens of each class that each expert ran: (block, expert id) -> (C,)."""
    if not isinstance(model, Model):
        return {}
    n_classes = model.spec.heads[0]
    usage: dict[tuple[int, int], Array] = {}
    for block, moe in enumerate(model.layers):
        experts = torch.cat([output.routings[block].experts[0] for output in outputs])  # (N * S, K)
        per_token = y.repeat_interleave(len(experts) // len(y))[:, None].expand_as(experts)
        flat = (experts * n_classes + per_token).flatten()
        counts = torch.bincount(flat, minlength=moe.n_routed * n_classes).view(-1, n_classes).cpu().numpy()
        usage |= {(block, expert): counts[e] for e, expert in enumerate(moe.expert_id.tolist())}
    return usage


def mutual_information(counts: Array) -> float:
    """Mutual information (nats) of the two axes of a table of counts."""
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())


def _routing_metrics(outputs: list[Output], usage: dict[tuple[int, int], Array]) -> dict[str, float]:
    """Mean over blocks of entropy and information; blank for a model without routing."""
    blank = float("nan")
    if not usage:
        return {"routing_entropy": blank, "dead_experts": blank, "mutual_information": blank}
    entropies = [routing_entropy(routing.probs[0]) for output in outputs for routing in output.routings]
    blocks = sorted({block for block, _ in usage})
    tables = [np.stack([counts for (b, _), counts in usage.items() if b == block]) for block in blocks]
    return {
        "routing_entropy": float(torch.cat(entropies).mean()),
        "dead_experts": sum(int((table.sum(1) == 0).sum()) for table in tables),
        "mutual_information": float(np.mean([mutual_information(table) for table in tables])),
    }


def _long(usage: dict[tuple[int, int], Array]) -> pd.DataFrame:
    rows = [
        (block, expert, label, int(tokens))
        for (block, expert), counts in usage.items()
        for label, tokens in enumerate(counts)
    ]
    return pd.DataFrame(rows, columns=TABLES["routing"])


def _left(folder: Path, name: str) -> pd.DataFrame:
    """A table that a trial left in its folder; empty for a kind of trial that leaves none."""
    path = folder / LEFT[name]
    return read_table(path, TABLES[name]) if path.exists() else pd.DataFrame(columns=TABLES[name])


def _joined(name: str, parts: list[pd.DataFrame]) -> pd.DataFrame:
    """A table of all trials; empty where not one finished."""
    return pd.concat(parts) if parts else pd.DataFrame(columns=[*KEY, *TABLES[name]])


def _key(trial: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial is called in every table."""
    return {name: trial[name] for name in KEY}


def _with(key: dict[str, Any], table: pd.DataFrame) -> pd.DataFrame:
    for position, (name, value) in enumerate(key.items()):
        table.insert(position, name, value)
    return table
