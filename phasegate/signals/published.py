"""Score the experts of a layer by the signals of the literature: how much it needs each, and where growth would help.

A signal is a function of a probe that gives two scores per expert, so that all signals can be judged alike. The order
of a score is what counts, not its scale.

Shapes: N tokens, D model width, E experts, K chosen.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from phasegate.base.errors import UserError
from phasegate.params.names import SIGNALS
from phasegate.params.plugins import Plugin
from phasegate.signals.roots import root
from phasegate.surgery.probe import Probe


class Scores(NamedTuple):
    """Hold the scores of a layer's experts; None where a signal says nothing of the kind."""

    prune: Tensor | None  # (E,) the higher, the more is lost when the expert goes
    grow: Tensor | None  # (E,) the higher, the more is gained when the expert is split
    recovered: Tensor | None = None  # (E,) as prune, after some training; None where the two are not told apart


Signal = Callable[[Probe, torch.Generator], Scores]


def random_labels(probe: Probe, draws: torch.Generator) -> Scores:
    """Draw noise, the control: a signal is worth something only if it beats this."""
    prune, grow = torch.rand(2, probe.layer.n_routed, generator=draws)
    return Scores(prune, grow)


def routing_entropy(probe: Probe, draws: torch.Generator) -> Scores:
    """Score by certainty (phase 7b.2): an expert that the router is sure of is needed, and overworked."""
    entropy = probe.signals.entropy
    return Scores(-entropy, -entropy)


def usage_frequency(probe: Probe, draws: torch.Generator) -> Scores:
    """Score by the share of token slots."""
    load = probe.signals.load
    return Scores(load, load)


def zero_hits(probe: Probe, draws: torch.Generator) -> Scores:
    """Tell whether any token runs the expert: DynMoE removes experts that none does (arXiv 2405.14297)."""
    return Scores((probe.visits > 0).any(0).float(), None)


def gate_times_norm(probe: Probe, draws: torch.Generator) -> Scores:
    """Average gate times norm of the output over the expert's tokens: REAP (arXiv 2510.13999)."""
    norms = probe.per_expert(probe.contributions.norm(dim=-1))
    saliency = norms / (probe.visits > 0).sum(0).clamp(min=1)
    return Scores(saliency, saliency)


def weight_norm(probe: Probe, draws: torch.Generator) -> Scores:
    """Score by the norm of the expert's weights."""
    layer = probe.layer
    norm = root(layer.w_in.detach().square().sum((1, 2)) + layer.w_out.detach().square().sum((1, 2)))
    return Scores(norm, norm)


def taylor_saliency(probe: Probe, draws: torch.Generator) -> Scores:
    """Average |output times its gradient| over tokens, the first-order change of the loss (arXiv 1905.10650)."""
    change = (probe.contributions * probe.slopes[:, None]).sum(-1).abs()  # (N, K)
    saliency = probe.per_expert(change)
    return Scores(saliency, saliency)


def gradmax(probe: Probe, draws: torch.Generator) -> Scores:
    """Return the largest gradient that one more hidden unit of the expert could get (arXiv 2201.05125).

    It is the largest singular value of a (D, D) matrix: the sum over the expert's tokens of gate * slope x token'.
    """
    tokens, slopes = probe.routing.tokens[0], probe.slopes
    sums = ((slopes * gate[:, None]).T @ tokens for gate in probe.visits.unbind(dim=1))
    return Scores(None, torch.stack([torch.linalg.matrix_norm(matrix, ord=2) for matrix in sums]))


PUBLISHED: dict[str, Signal] = {name: globals()[name] for name in SIGNALS}
"""The functions above by name; the first is the control."""


def plugin_signal(plugin: Plugin) -> Signal:
    """Return the signal of a plugin, which raises `UserError` if it does not give one finite number per expert."""
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
