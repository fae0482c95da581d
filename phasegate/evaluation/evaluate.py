"""Evaluate checkpoints on the test split, which no other module reads.

Shapes: N test examples, C classes, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from phasegate.base.errors import UserError
from phasegate.evaluation.split_halves import HALVES_COLUMNS, split_halves
from phasegate.model.classifier import Cost, Network, Output
from phasegate.model.moe import routing_entropy
from phasegate.params.names import REFERENCES
from phasegate.records import trial_folder
from phasegate.records.predictions import write_predictions
from phasegate.records.prepared import TEST, Array, load_meta, load_splits
from phasegate.records.tables import read_table, write_table
from phasegate.training import checkpoint
from phasegate.training.batches import Examples, load_examples, on_device
from phasegate.training.device import device
from phasegate.training.predictions import predict

CALIBRATION_BINS = 15
KEY = ["phase", "arm", "seed"]  # the name of a trial in every table
TRIALS = ["accuracy", "balanced_accuracy", "nll", "calibration_error", "routing_entropy", "dead_experts"]
TRIALS += ["mutual_information", "n_routed_start", "n_routed_end", *Cost.model_fields]
TABLES = {  # the tables of a phase, with their further columns
    "trials": TRIALS,
    "routing": ["block", "expert", "class", "tokens"],
    "tasks": ["task", "accuracy", "derived"],
    "split_halves": HALVES_COLUMNS,
    "curves": ["step", "loss", "accuracy", "n_routed", "dead_experts", "routing_entropy", "slots"],
    "surgeries": trial_folder.SURGERY_COLUMNS,
    "loads": trial_folder.LOAD_COLUMNS,
}
FILES = {"curves": trial_folder.CURVE, "surgeries": trial_folder.SURGERIES, "loads": trial_folder.LOADS}
"""The tables that a trial leaves in its folder."""


class Evaluation(NamedTuple):
    """Hold what is measured of one trial on the test split."""

    trial: dict[str, Any]  # a row of trials.csv
    tables: dict[str, pd.DataFrame]  # its part of the other tables, without its key
    predictions: Array  # (N,) predicted classes


def evaluate_phase(models: Path, prepared: Path, output: Path, may_be_empty: bool = False) -> None:
    """Evaluate every checkpoint below `models`, and write the tables of the phase and of its failures into `output`.

    References are evaluated on the published test split, where `test` is another one. `UserError` if a checkpoint does
    not load, or if there is nothing though there has to be.
    """
    gate, meta = load_examples(prepared, device())[2], load_meta(prepared)
    splits = load_splits(prepared / TEST)
    published = splits["published"] if models.name == REFERENCES else None
    test = on_device(published or splits["test"], device())
    names = (checkpoint.RECORD, trial_folder.FAILURE)
    folders, failed = (sorted(path.parent for path in models.glob(f"*/*/{name}")) for name in names)
    if not (folders or failed or may_be_empty):
        raise UserError(f"{models} holds no checkpoints: run `dvc repro` for the stage that writes it")
    predictions, parts = {}, {name: list[pd.DataFrame]() for name in TABLES}
    for folder in folders:
        left = {name: pd.DataFrame(columns=TABLES[name]) for name in FILES}  # empty where a trial leaves none
        there = {name: folder / file for name, file in FILES.items() if (folder / file).exists()}
        left |= {name: read_table(path, TABLES[name]) for name, path in there.items()}
        result = evaluate(checkpoint.load(folder, gate, device()), test, meta.tasks, left["surgeries"])
        routing = result.tables["routing"]
        routing["class"] = routing["class"].map(dict(enumerate(meta.class_names)))
        predictions["{phase}/{arm}/seed-{seed}".format(**result.trial)] = result.predictions
        for name, table in {"trials": pd.DataFrame([result.trial]), **result.tables, **left}.items():
            parts[name].append(table.assign(**{key: result.trial[key] for key in KEY}))
    failures = [astuple(failure) for failure in map(trial_folder.read_failure, failed) if failure]
    write_table(output / "failures.csv", pd.DataFrame(failures, columns=trial_folder.FAILURE_COLUMNS), digits=None)
    for name, columns in TABLES.items():
        table = pd.concat(parts[name]) if folders else pd.DataFrame()
        write_table(output / f"{name}.csv", table.reindex(columns=[*KEY, *columns]), digits=None)
    write_predictions(output, test.y.cpu().numpy(), predictions)


def evaluate(
    trial: checkpoint.Checkpoint, test: Examples, tasks: Mapping[str, Sequence[int]], surgeries: pd.DataFrame
) -> Evaluation:
    """Measure accuracy (percent), negative log-likelihood (nats), calibration error (pp), routing and cost."""
    outputs = predict(trial.model, test.x)
    logits = torch.cat([output.logits[0] for output in outputs])
    y = test.y.cpu().numpy()
    probs = logits.double().softmax(-1).cpu().numpy()
    predicted = probs.argmax(1)
    right = predicted == y
    routing = routing_table(trial.model, outputs, test.y)
    row = {key: getattr(trial.record, key) for key in KEY} | {
        "accuracy": 100 * right.mean(),
        "balanced_accuracy": balanced_accuracy(right, y),
        "nll": -np.log(probs[np.arange(len(y)), y].clip(min=np.finfo(float).tiny)).mean(),
        "calibration_error": calibration_error(probs.max(1), right),
        **_routing_metrics(outputs, routing),
        "n_routed_start": trial.record.n_routed_start,
        "n_routed_end": trial.model.n_routed,
        **trial.cost.model_dump(),
    }
    halves = split_halves(trial.model, surgeries, test)
    further = further_tasks(trial.model, test, predicted, tasks)
    return Evaluation(row, {"routing": routing, "tasks": further, "split_halves": halves}, predicted)


def further_tasks(model: Network, test: Examples, predicted: Array, tasks: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """Measure the accuracy (percent) of each further head, and of the label that follows from the predicted class."""
    rows = []
    if len(model.spec.heads) > 1:
        y, outputs = test.y.cpu().numpy(), predict(model, test.x, len(model.spec.heads))
        for head, (task, label_map) in enumerate(tasks.items(), start=1):
            labels = np.array(label_map)
            answers = torch.cat([output.logits[head] for output in outputs]).argmax(-1).cpu().numpy()
            rows.append((task, *(100 * (found == labels[y]).mean() for found in (answers, labels[predicted]))))
    return pd.DataFrame(rows, columns=TABLES["tasks"])


def balanced_accuracy(right: Array, y: Array) -> float:
    """Return the mean over classes of the accuracy on each, percent; a class without examples doesn't count."""
    counts, hits = np.bincount(y), np.bincount(y, weights=right)
    return float(100 * (hits[counts > 0] / counts[counts > 0]).mean())


def calibration_error(confidence: Array, right: Array, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error, pp: |accuracy - confidence| over equal-width bins, weighted by size.

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=right - confidence, minlength=bins)
    return float(100 * np.abs(gaps).sum() / len(right))


def routing_table(model: Network, outputs: list[Output], y: torch.Tensor) -> pd.DataFrame:
    """Count the test tokens of each class that each expert ran."""
    n_classes, rows = model.spec.heads[0], []
    for block, moe in enumerate(model.layers):
        experts = torch.cat([output.routings[block].experts[0] for output in outputs])  # (N * S, K)
        per_token = y.repeat_interleave(len(experts) // len(y))[:, None].expand_as(experts)
        flat = (experts * n_classes + per_token).flatten()
        counts = torch.bincount(flat, minlength=moe.n_routed * n_classes).view(-1, n_classes).tolist()
        for expert, tokens in zip(moe.expert_id.tolist(), counts, strict=True):
            rows += [(block, expert, label, count) for label, count in enumerate(tokens)]
    return pd.DataFrame(rows, columns=TABLES["routing"])


def mutual_information(counts: Array) -> float:
    """Return the mutual information (nats) of the two axes of a table of counts."""
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())


def _routing_metrics(outputs: list[Output], routing: pd.DataFrame) -> dict[str, float]:
    """Average entropy and information over blocks; blank for a model without routing."""
    if routing.empty:
        return dict.fromkeys(("routing_entropy", "dead_experts", "mutual_information"), float("nan"))
    entropies = [routing_entropy(layer.probs[0]) for output in outputs for layer in output.routings]
    classes = routing["class"].nunique()
    tables = [rows.to_numpy().reshape(-1, classes) for _, rows in routing.groupby("block")["tokens"]]  # (E, C) each
    return {
        "routing_entropy": float(torch.cat(entropies).mean()),
        "dead_experts": sum(int((table.sum(1) == 0).sum()) for table in tables),
        "mutual_information": float(np.mean([mutual_information(table) for table in tables])),
    }
