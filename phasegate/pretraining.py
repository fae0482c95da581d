"""Trials of phase 7a: train a model from scratch. The searches, the references and the baseline all run this."""

import time
from pathlib import Path

import torch
from torch import Tensor

from phasegate import checkpoint, execution
from phasegate.checkpoint import Record
from phasegate.curve import Curve
from phasegate.data import fit_file
from phasegate.model import Model, ModelSpec
from phasegate.params import Training
from phasegate.randomness import derived_seed
from phasegate.references import Reference, ReferenceSpec
from phasegate.training import Batches, cosine, fit, load_examples, main_loss, make_optimizer
from phasegate.trials import Trial

CURVE = "curve.csv"
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
    arguments = dict(locals())
    return Trial(f"{arm}/seed-{seed}", pretrain, arguments, (fit_file(prepared),))


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
    curve.measure(0)
    every = max(1, training.steps // CURVE_POINTS)

    def after_step(step: int, loss: Tensor) -> None:
        curve.add_loss(loss)
        if step % every == 0 or step == training.steps:
            curve.measure(step)

    def objective(x: Tensor, y: Tensor, step: int) -> Tensor:
        return main_loss(model, model(x), y, training.label_smoothing)

    batches = Batches(train, training.batch, seed, training)
    rates = cosine(training.lr, training.steps, training.warmup)
    start = time.perf_counter()
    fit(model, optimizer, batches, objective, rates, after_step)
    seconds = time.perf_counter() - start
    n_routed = model.n_routed if isinstance(model, Model) else 0
    record = Record(phase, arm, seed, training, n_routed, seconds)
    checkpoint.save(folder, model, optimizer if keep_optimizer else None, record, gate)
    curve.table().to_csv(folder / CURVE, index=False)
