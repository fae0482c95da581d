"""What the literature's signals say of each expert of a layer: how much it is needed, and where growth would help.

Every signal is a function of a probe and gives two scores per expert, so that all can be judged alike. The order of
a score is what counts, not its scale.

Shapes: N tokens, D model width, E experts, K chosen.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from phasegate.errors import UserError
from phasegate.plugins import Plugin
from phasegate.probe import Probe
from phasegate.signals import expert_signals
from phasegate.study import SIGNALS


class Scores(NamedTuple):
    """What a signal says; None where it says nothing of the kind."""

    prune: Tensor | None  # (E,) the higher, the more is lost when the expert goes
    grow: Tensor | None  # (E,) the higher, the more is gained when the expert is split


Signal = Callable[[Probe, torch.Generator], Scores]


def random_labels(probe: Probe, draws: torch.Generator) -> Scores:
    """Noise, the control: no signal is worth more than this unless it beats it."""
    prune, grow = torch.rand(2, probe.layer.n_routed, generator=draws)
    return Scores(prune, grow)


def routing_entropy(probe: Probe, draws: torch.Generator) -> Scores:
    """Where the router is sure of an expert, no other can take its tokens: needed, and overworked (phase 7b.2)."""
    entropy = expert_signals(probe.routing, probe.layer.n_routed).entropy
    return Scores(-entropy, -entropy)


def usage_frequency(probe: Probe, draws: torch.Generator) -> Scores:
    """The share of token slots."""
    load = expert_signals(probe.routing, probe.layer.n_routed).load
    return Scores(load, load)


def zero_hits(probe: Probe, draws: torch.Generator) -> Scores:
    """Whether any token runs the expert: DynMoE removes those that none does (arXiv 2405.14297)."""
    return Scores((probe.visits > 0).any(0).float(), None)


def gate_times_norm(probe: Probe, draws: torch.Generator) -> Scores:
    """Mean over the expert's tokens of gate times norm of the output: REAP (arXiv 2510.13999)."""
    norms = probe.per_expert(probe.contributions.norm(dim=-1))
    saliency = norms / (probe.visits > 0).sum(0).clamp(min=1)
    return Scores(saliency, saliency)


def weight_norm(probe: Probe, draws: torch.Generator) -> Scores:
    """The norm of the expert's weights."""
    layer = probe.layer
    norm = (layer.w_in.detach().square().sum((1, 2)) + layer.w_out.detach().square().sum((1, 2))).sqrt()
    return Scores(norm, norm)


def taylor_saliency(probe: Probe, draws: torch.Generator) -> Scores:
    """Mean over tokens of |output times its gradient|, the first-order change of the loss (arXiv 1905.10650)."""
    change = (probe.contributions * probe.slopes[:, None]).sum(-1).abs()  # (N, K)
    saliency = probe.per_expert(change)
    return Scores(saliency, saliency)


def gradmax(probe: Probe, draws: torch.Generator) -> Scores:
    """The largest gradient that one more hidden unit of the expert could get (arXiv 2201.05125).

    That is the largest singular value of the sum over its tokens of gate * slope x token', a (D, D) matrix.
    """
    tokens, slopes = probe.routing.tokens[0], probe.slopes
    norms = [
        torch.linalg.matrix_norm((slopes * gate[:, None]).T @ tokens, ord=2) for gate in probe.visits.unbind(dim=1)
    ]
    return Scores(None, torch.stack(norms))


PUBLISHED: dict[str, Signal] = dict(
    zip(
        SIGNALS,
        (
            *(random_labels, routing_entropy, usage_frequency, zero_hits),
            *(gate_times_norm, weight_norm, taylor_saliency, gradmax),
        ),
        strict=True,
    )
)
"""The signals of the literature, by name."""


def own_signal(plugin: Plugin) -> Signal:
    """A signal of one's own, whose answers are looked at.

    Raises, when it is called:
        UserError: if it does not give `Scores` of one finite number per expert.
    """
    signal = plugin.function()

    def scores(probe: Probe, draws: torch.Generator) -> Scores:
        given, experts = signal(probe, draws), probe.layer.n_routed
        if not isinstance(given, Scores) or (given.prune is None and given.grow is None):
            raise UserError(f"{plugin.path}: signal must return Scores, not {given!r:.80}")
        for kind, values in given._asdict().items():
            fits = isinstance(values, Tensor) and tuple(values.shape) == (experts,) and bool(values.isfinite().all())
            if values is not None and not fits:
                raise UserError(
                    f"{plugin.path}: {kind} must be a tensor of {experts} finite numbers, not {values!r:.80}"
                )
        return given

    return scores
