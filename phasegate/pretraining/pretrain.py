"""Train a model from scratch: the searches, the references and the baseline of phase 7a all run this trial."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from phasegate.model.references import Spec, build
from phasegate.params.pretraining import Training
from phasegate.records.prepared import FIT, META
from phasegate.records.tables import write_table
from phasegate.records.trial_folder import CURVE
from phasegate.training import checkpoint, loop
from phasegate.training.batches import Batches, load_examples
from phasegate.training.curves import Curve
from phasegate.training.device import device
from phasegate.training.killed_trials import Snapshots
from phasegate.training.losses import plain_objective
from phasegate.training.randomness import derived_seed
from phasegate.trials.trial import Trial

CURVE_POINTS = 20


def pretraining(
    prepared: Path, phase: str, arm: str, seed: int, spec: Spec, training: Training, keep_optimizer: bool = False
) -> Trial:
    """Return the trial that runs `pretrain` with these arguments."""
    arguments = {"prepared": prepared, "phase": phase, "arm": arm, "seed": seed, "spec": spec, "training": training}
    arguments["keep_optimizer"] = keep_optimizer
    return Trial(phase, arm, seed, pretrain, arguments, (prepared / FIT,), (prepared / META,))


def pretrain(
    folder: Path,
    *,
    prepared: Path,
    phase: str,
    arm: str,
    seed: int,
    spec: Spec,
    training: Training,
    keep_optimizer: bool = False,
) -> None:
    """Train from scratch and leave a verified checkpoint and a learning curve in `folder`."""
    train, _, gate = load_examples(prepared, device())
    torch.manual_seed(derived_seed(seed, "initial weights"))
    model = build(spec).to(train.x.device)
    optimizer = loop.make_optimizer(model.parameters(), training)
    curve = Curve(model, gate)
    snapshots = Snapshots(folder, model, optimizer, {"curve": curve})
    every = max(1, training.steps // CURVE_POINTS)

    def after_step(step: int, loss: Tensor) -> None:
        curve.add_loss(loss)
        if step % every == 0 or step == training.steps:
            curve.measure(step)
            snapshots.take(step)

    batches, objective = (
        Batches(train, training.batch, seed, training),
        plain_objective(model, training.label_smoothing),
    )
    rates = loop.cosine(training.lr, training.steps, training.warmup)
    record = checkpoint.Record(phase=phase, arm=arm, seed=seed, training=training, n_routed_start=model.n_routed)
    kept = optimizer if keep_optimizer else None
    save = partial(checkpoint.save, model=model, optimizer=kept, record=record, gate=gate)
    done = snapshots.begin(lambda: curve.measure(0))
    with snapshots.last_good(save):
        loop.fit(model, optimizer, batches, objective, rates, after_step, done)
    save(folder)
    write_table(folder / CURVE, curve.tables()[0], digits=None)
