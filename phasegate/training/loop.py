"""Train a model: the optimizer, the learning rates, and the loop.

Everything random comes from `randomness.generator`, so a step depends on the seed and its number alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phasegate.base.errors import Diverged
from phasegate.model.kernels.functions import all_finite, suit
from phasegate.params.pretraining import Training
from phasegate.training.adamw import AdamW
from phasegate.training.batches import Batches
from phasegate.training.losses import Objective
from phasegate.training.randomness import derived_seed, seed_default_generators


def make_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> Optimizer:
    """Build AdamW, with weight decay on matrices only. Frozen hyperplanes get no gradient, and so no update."""
    matrices, others = list[nn.Parameter](), list[nn.Parameter]()
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else others).append(parameter)
    decay, none = {"weight_decay": training.weight_decay}, {"weight_decay": 0.0}
    groups = [{"params": matrices, **decay}, {"params": others, **none}]
    if all(map(suit, matrices + others)):
        return AdamW(groups, training.lr)
    return torch.optim.AdamW(groups, lr=training.lr, fused=True)


def cosine(peak: float, steps: int, warmup: int = 0) -> list[float]:
    """Return the learning rates of all steps: linear warm-up, then half a cosine to zero."""
    rising = [peak * (step + 1) / warmup for step in range(warmup)]
    falling = steps - warmup
    return rising + [peak * 0.5 * (1 + math.cos(math.pi * step / falling)) for step in range(falling)]


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    objective: Objective,
    rates: Sequence[float],
    after_step: Callable[[int, Tensor], None],
    done: int = 0,
) -> None:
    """Train the model: one step per learning rate, after the first `done` steps, which an earlier run did.

    A parameter group may have an "lr_factor". `after_step` gets the step (from one) and its loss, and may change the
    model. Raises `Diverged` at the first step whose loss, gradients or parameters are not finite.
    """
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    for step, rate in enumerate(rates[done:], start=done + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        if drops:
            seed_default_generators(derived_seed(batches.seed, "dropout", step))
        if not model.training:
            model.train()
        loss = objective(*batches(step), step)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:  # as in `zero_grad`, without its bookkeeping
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not (math.isfinite(value := loss.item()) and all_finite(trained)):  # else the gradients were finite, too
            raise Diverged(_find_not_finite(model, trained, value), step)
        after_step(step, loss.detach())


def _find_not_finite(model: nn.Module, trained: list[nn.Parameter], loss: float) -> str:
    """Name what is not finite after a step: the loss, else the first gradient, else the first parameter."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    bad = [parameter for parameter in trained if parameter.grad is not None and not parameter.grad.isfinite().all()]
    what, victim = ("gradient", bad[0]) if bad else ("value", next(p for p in trained if not p.isfinite().all()))
    return f"the {what} of {names.get(id(victim), 'a control head')} is not finite"
