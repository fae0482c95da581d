"""Train a model: the optimizer, the learning rates, and the loop.

Everything random comes from `randomness.generator`, so a step depends on the seed and its number alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import AdamW, Optimizer

from phasegate.base.errors import Diverged
from phasegate.params.pretraining import Training
from phasegate.training.batches import Batches
from phasegate.training.losses import Objective
from phasegate.training.randomness import derived_seed, seed_default_generators


def make_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> AdamW:
    """Build AdamW, with weight decay on matrices only. Frozen hyperplanes get no gradient, and so no update."""
    matrices, others = list[nn.Parameter](), list[nn.Parameter]()
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else others).append(parameter)
    decay, none = {"weight_decay": training.weight_decay}, {"weight_decay": 0.0}
    return AdamW([{"params": matrices, **decay}, {"params": others, **none}], lr=training.lr, fused=True)


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
        with torch.no_grad():  # a gradient that is not finite leaves parameters that are not finite
            total = parameters_to_vector(trained).sum() + loss
        if not math.isfinite(total.item()):
            raise Diverged(_find_not_finite(model, trained, loss.item()), step)
        after_step(step, loss.detach())


def _find_not_finite(model: nn.Module, trained: list[nn.Parameter], loss: float) -> str:
    """Name what is not finite after a step: the loss, else the first gradient, else the first parameter."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for what in ("gradient", "value"):
        for parameter in trained:
            numbers = parameter.grad if what == "gradient" else parameter
            if numbers is not None and not numbers.isfinite().all():
                return f"the {what} of {names.get(id(parameter), 'a control head')} is not finite"
    return "the sum of all parameters is not finite"
