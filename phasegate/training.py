"""The training loop and its parts: batches, augmentation, losses, predictions.

Everything random is drawn from `randomness.generator`, so a step depends on the seed and its number alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import AdamW, Optimizer

from phasegate import data
from phasegate.errors import Diverged
from phasegate.model import Model, Output
from phasegate.moe import Routing
from phasegate.phase_params import Schedule
from phasegate.pretraining_params import Architecture, Training
from phasegate.randomness import derived_seed, generator, seed_default_generators

EVALUATION_BATCH = 2048
AT_ONCE = 20  # batches drawn at a time
PROBE = 256  # signal examples on which the change of the output by surgery is measured


@dataclass(frozen=True, eq=False)
class Examples:
    """A split in memory: inputs x (N, channels, ...) float32, labels y (N,) int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@lru_cache(maxsize=1)
def load_examples(prepared: Path, device: torch.device) -> tuple[Examples, Examples, Examples]:
    """The train, signal and gate splits on a device; loaded and verified once per process."""
    fit = data.load_fit(prepared)
    return on_device(fit.train, device), on_device(fit.signal, device), on_device(fit.gate, device)


def on_device(split: data.Split, device: torch.device) -> Examples:
    """A split's arrays as tensors on a device."""
    return Examples(torch.from_numpy(split.x).to(device), torch.from_numpy(split.y).to(device))


Objective = Callable[[Tensor, Tensor, int], Tensor]
"""Inputs x (B, ...), labels y (B,), step -> loss."""


def make_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> AdamW:
    """AdamW, with weight decay on matrices only. Frozen hyperplanes get no gradient, and so no update."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.dim() > 1].append(parameter)
    return AdamW(
        [
            {"params": groups[True], "weight_decay": training.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=training.lr,
        fused=True,
    )


def cosine(peak: float, steps: int, warmup: int = 0) -> list[float]:
    """Learning rates of all steps: linear warm-up, then half a cosine to zero."""
    rising = [peak * (step + 1) / warmup for step in range(warmup)]
    falling = steps - warmup
    return rising + [peak * 0.5 * (1 + math.cos(math.pi * step / falling)) for step in range(falling)]


@dataclass(frozen=True, eq=False)
class Course:
    """What every 7b trial of a seed goes through, whatever its arm."""

    train: Examples
    signal: Examples
    gate: Examples
    training: Training  # the configuration of 7a
    schedule: Schedule
    seed: int

    @cached_property
    def rates(self) -> list[float]:
        """Learning rates of all steps."""
        return cosine(self.schedule.lr_scale * self.training.lr, self.schedule.steps)

    @cached_property
    def batches(self) -> "Batches":
        """The batches of the phase, the same for all arms."""
        return Batches(self.train, self.training.batch, derived_seed(self.seed, "7b"), self.training)


class Batches:
    """Shuffled batches without replacement: batch of step s is the same for every trial with this seed.

    They are drawn and augmented `AT_ONCE` at a time. The last two such draws are kept, so that the paired forks of
    a model, which all see the same few batches, do not draw them again.
    """

    def __init__(self, examples: Examples, size: int, seed: int, training: Training) -> None:
        self.examples, self.seed, self.training = examples, seed, training
        self.size = min(size, len(examples))
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The augmented batch of a step (from one)."""
        number, place = divmod(step - 1, AT_ONCE)
        if number not in self._kept:
            self._kept = dict([*self._kept.items()][-1:])
            self._kept[number] = self._draw(number)
        return self._kept[number][place]

    def _draw(self, number: int) -> list[tuple[Tensor, Tensor]]:
        per_epoch = len(self.examples) // self.size
        batches = range(number * AT_ONCE, (number + 1) * AT_ONCE)
        orders = {epoch: self._order(epoch) for epoch in {batch // per_epoch for batch in batches}}
        places = ((orders[batch // per_epoch], batch % per_epoch * self.size) for batch in batches)
        rows = torch.cat([order[start : start + self.size] for order, start in places]).to(self.examples.y.device)
        draws = generator(self.seed, "augmentation", number)
        x = augment(self.examples.x[rows], self.training.shift, self.training.noise, draws)
        return list(zip(torch.split(x, self.size), torch.split(self.examples.y[rows], self.size), strict=True))

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.examples), generator=generator(self.seed, "batches", epoch))


def augment(x: Tensor, shift: int, noise: float, draws: torch.Generator) -> Tensor:
    """Shift each example (B, channels, ...) circularly by up to `shift` per axis, then add Gaussian noise."""
    for axis in range(2, x.dim()):
        if shift:
            size = x.shape[axis]
            by = torch.randint(-shift, shift + 1, (len(x), 1), generator=draws)
            index = (torch.arange(size) + by) % size  # (B, size)
            shape = [len(x), *(size if dim == axis else 1 for dim in range(1, x.dim()))]
            x = x.gather(axis, index.view(shape).expand_as(x).to(x.device))
    if noise:
        x = x + noise * torch.randn(x.shape, generator=draws).to(x.device)
    return x


def load_balance(routing: Routing) -> Tensor:
    """Switch's auxiliary loss: F * sum over families of (share of slots) * (mean probability); one if even."""
    families, tokens = routing.logits.shape[-1], routing.logits.shape[1]
    return (routing.probs @ shares(routing).unsqueeze(-1)).sum() * (families / tokens / len(routing.logits))


def router_z(routing: Routing) -> Tensor:
    """ST-MoE's z-loss: mean squared log-partition of the router's scores (arXiv 2202.08906)."""
    return routing.logits.logsumexp(-1).square().mean()


def shares(routing: Routing) -> Tensor:
    """Share of the token slots that each family got, (G, F)."""
    chosen = routing.families.flatten(1)
    slots = torch.zeros(len(chosen), routing.logits.shape[-1], device=chosen.device)
    return slots.scatter_add(1, chosen, torch.ones_like(chosen, dtype=slots.dtype)) / chosen.shape[1]


def routing_penalty(routings: Iterable[Routing], arch: Architecture) -> Tensor | float:
    """The balancing terms of the loss, over all blocks."""
    penalty: Tensor | float = 0.0
    for routing in routings:
        if arch.balance_loss:
            penalty = penalty + arch.balance_loss * load_balance(routing)
        if arch.z_loss:
            penalty = penalty + arch.z_loss * router_z(routing)
    return penalty


@torch.no_grad()
def nudge_selection(model: nn.Module, output: Output) -> None:
    """Loss-free balancing: raise the selection bias of families below an even share, lower that of others.

    Source: arXiv 2408.15664.
    """
    if isinstance(model, Model) and model.spec.architecture.balance_bias:
        for moe, routing in zip(model.layers, output.routings, strict=True):
            share = shares(routing)
            excess = share - 1 / share.shape[-1]
            moe.selection_bias[: len(share)] -= model.spec.architecture.balance_bias * excess.sign()


def main_loss(model: nn.Module, output: Output, y: Tensor, label_smoothing: float) -> Tensor:
    """The first task's cross-entropy (nats) and, for a mixture of experts, the balancing of its load."""
    loss = F.cross_entropy(output.logits[0], y, label_smoothing=label_smoothing)
    if not isinstance(model, Model):
        return loss
    return loss + routing_penalty(output.routings, model.spec.architecture)


def plain_objective(model: nn.Module, label_smoothing: float) -> Objective:
    """The loss of training without anything added, with loss-free balancing where that is asked for."""

    def objective(x: Tensor, y: Tensor, step: int) -> Tensor:
        output = model(x)
        nudge_selection(model, output)
        return main_loss(model, output, y, label_smoothing)

    return objective


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    objective: Objective,
    rates: Sequence[float],
    after_step: Callable[[int, Tensor], None],
    done: int = 0,
) -> None:
    """The training loop: one step per learning rate; `after_step` gets the step (from one) and its loss.

    A parameter group may carry an "lr_factor" of its own. The model may change in `after_step`. The first `done`
    steps are those of an earlier run, which this one goes on from.

    Raises:
        Diverged: when the loss, a gradient or a parameter stops being finite, at the step where it does.
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
        for parameter in trained:  # as `zero_grad` does it, but for its bookkeeping
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():  # a gradient that is not finite leaves parameters that are not
            total = parameters_to_vector(trained).sum() + loss
        if not math.isfinite(total.item()):
            raise Diverged(_not_finite(model, trained, loss.item()), step)
        after_step(step, loss.detach())


def _not_finite(model: nn.Module, trained: list[nn.Parameter], loss: float) -> str:
    """What is not finite after a step: the loss, or else the first gradient, or else the first parameter."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for what in ("gradient", "value"):
        for parameter in trained:
            numbers = parameter.grad if what == "gradient" else parameter
            if numbers is not None and not numbers.isfinite().all():
                return f"the {what} of {names.get(id(parameter), 'a control head')} is not finite"
    return "the sum of all parameters is not finite"


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, n_tasks: int = 1) -> list[Output]:
    """Outputs in evaluation mode for all of x, in large batches."""
    model.eval()
    return [model(rows, n_tasks) for rows in torch.split(x, EVALUATION_BATCH)]


def correct(model: nn.Module, examples: Examples) -> int:
    """How many examples the first task's head gets right."""
    logits = torch.cat([output.logits[0] for output in predict(model, examples.x)])
    return int((logits.argmax(-1) == examples.y).sum())
