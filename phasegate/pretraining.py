"""Trials of phase 7a: train a model from scratch. The searches, the references and the baseline all run this."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from phasegate import checkpoint, execution
from phasegate.checkpoint import Record
from phasegate.data import fit_file, meta_file
from phasegate.logs import CURVE, Curve
from phasegate.model import Model, ModelSpec
from phasegate.pretraining_params import Training
from phasegate.randomness import derived_seed
from phasegate.references import Reference, ReferenceSpec
from phasegate.snapshots import Snapshots
from phasegate.training import Batches, cosine, fit, load_examples, make_optimizer, plain_objective
from phasegate.trials import Trial

CURVE_POINTS = 20


def pretraining(
    prepared: Path,
    phase: str,
    arm: str,
    seed: int,
    spec: ModelSpec | ReferenceSpec,
    training: Training,
    keep_optimizer: bool = False,
) -> Trial:
    """The trial of `pretrain` with these arguments."""
    arguments = {
        "prepared": prepared,
        "phase": phase,
        "arm": arm,
        "seed": seed,
        "spec": spec,
        "training": training,
        "keep_optimizer": keep_optimizer,
    }
    return Trial(f"{arm}/seed-{seed}", pretrain, arguments, (fit_file(prepared),), (meta_file(prepared),))


def pretrain(
    folder: Path,
    *,
    prepared: Path,
    phase: str,
    arm: str,
    seed: int,
    spec: ModelSpec | ReferenceSpec,
    training: Training,
    keep_optimizer: bool,
) -> None:
    """Train from scratch and leave a verified checkpoint and a learning curve in `folder`."""
    train, _, gate = load_examples(prepared, execution.device())
    torch.manual_seed(derived_seed(seed, "initial weights"))
    model: Model | Reference = Model(spec) if isinstance(spec, ModelSpec) else Reference(spec)
    model.to(train.x.device)
    optimizer = make_optimizer(model.parameters(), training)
    curve = Curve(model, gate)
    snapshots = Snapshots(folder, model, optimizer, {"curve": curve})
    every = max(1, training.steps // CURVE_POINTS)

    def after_step(step: int, loss: Tensor) -> None:
        curve.add_loss(loss)
        if step % every == 0 or step == training.steps:
            curve.measure(step)
            snapshots.take(step)

    batches = Batches(train, training.batch, seed, training)
    rates = cosine(training.lr, training.steps, training.warmup)
    n_routed = model.n_routed if isinstance(model, Model) else 0
    record = Record(phase=phase, arm=arm, seed=seed, training=training, n_routed_start=n_routed)
    kept = optimizer if keep_optimizer else None
    save = partial(checkpoint.save, model=model, optimizer=kept, record=record, gate=gate)
    done = snapshots.begin(lambda: curve.measure(0))
    with snapshots.last_good(save):
        fit(model, optimizer, batches, plain_objective(model, training.label_smoothing), rates, after_step, done)
    save(folder)
    curve.table().to_csv(folder / CURVE, index=False)
