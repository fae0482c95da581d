"""Score the experts of a layer by the signals of the literature: how much it needs each, and where growth would help.

A signal is a function of a probe that gives two scores per expert, so that all signals can be judged alike. The order
of a score is what counts, not its scale. A dagger (†) marks a definition that could not be read in the work's own text.

Shapes: N tokens, D model width, E experts, K chosen.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from phasegate.base.errors import UserError, printable
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
    saliency = _mean_over_tokens(probe, probe.contributions.norm(dim=-1))
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


def mean_norm(probe: Probe, draws: torch.Generator) -> Scores:
    """Average the norm of the output, without its gate, over the expert's tokens: MAN† (arXiv 2606.15716)."""
    norm = _mean_over_tokens(probe, probe.outputs.norm(dim=-1))
    return Scores(norm, norm)


def mean_squared_norm(probe: Probe, draws: torch.Generator) -> Scores:
    """Average the squared norm of the output, without its gate, over the expert's tokens: MSAN† (arXiv 2606.15716)."""
    square = _mean_over_tokens(probe, probe.outputs.square().sum(-1))
    return Scores(square, square)


def aimer(probe: Probe, draws: torch.Generator) -> Scores:
    """Return minus mean |w| / root mean square of the expert's weights: AIMER removes the evenest (arXiv 2603.18492).

    Only their shape counts, not their size. Weights of zero have no shape; as in the authors' code their ratio is zero,
    which keeps the expert longest.
    """
    layer = probe.layer
    weights = torch.cat([layer.w_in.detach().flatten(1), layer.w_out.detach().flatten(1)], dim=1)
    size = root(weights.square().mean(1)).clamp(min=torch.finfo(weights.dtype).tiny)
    evenness = weights.abs().mean(1) / size
    return Scores(-evenness, -evenness)


def gradient_squared(probe: Probe, draws: torch.Generator) -> Scores:
    """Sum the squared gradient of the mean loss over the expert's weights; Expert Upcycling copies the highest.

    Source: arXiv 2604.19835, and its code, which averages the two matrices of an expert, or takes one.
    """
    layer, tokens, slopes = probe.layer, probe.routing.tokens, probe.slopes
    with torch.enable_grad():
        gradients = torch.autograd.grad(layer(tokens)[0], (layer.w_in, layer.w_out), slopes[None])
    square = torch.stack([gradient.square().sum((1, 2)) for gradient in gradients]).sum(0)
    return Scores(square, square)


def frequency_times_spread(probe: Probe, draws: torch.Generator) -> Scores:
    """Multiply usage by the root of the output's variance over the expert's tokens, summed over D: MoNE† (2507.00390).

    The variance is of outputs without gates, and unbiased. The authors' code weighs usage by the gates, too.
    """
    chosen = (probe.outputs[probe.routing.experts[0] == e] for e in range(probe.layer.n_routed))  # (M, D) each
    variances = [(mine - mine.mean(0)).square().sum() / max(len(mine) - 1, 1) for mine in chosen]
    product = probe.signals.load * root(torch.stack(variances))
    return Scores(product, product)


def _mean_over_tokens(probe: Probe, values: Tensor) -> Tensor:
    """Average values of token slots (N, K) over the tokens of each expert (E,); zero for an expert without tokens."""
    return probe.per_expert(values) / (probe.visits > 0).sum(0).clamp(min=1)


PUBLISHED: dict[str, Signal] = {name: globals()[name] for name in SIGNALS}
"""The functions above by name; the first is the control."""


def plugin_signal(plugin: Plugin) -> Signal:
    """Return the signal of a plugin, which raises `UserError` if it does not give one finite number per expert."""
    signal = plugin.function()

    def scores(probe: Probe, draws: torch.Generator) -> Scores:
        given, experts = signal(probe, draws), probe.layer.n_routed
        if not isinstance(given, Scores) or (given.prune is None and given.grow is None):
            raise UserError(f"{plugin.path}: signal must return Scores, not {printable(f'{given!r:.80}')}")
        for kind, values in given._asdict().items():
            plain = isinstance(values, Tensor) and values.layout is torch.strided and not values.is_complex()
            fits = plain and tuple(values.shape) == (experts,) and bool(values.isfinite().all())
            if values is not None and not fits:
                given_shape = f" of shape {tuple(values.shape)}" if plain else ""
                found = f"{type(values).__name__}{given_shape}: {printable(f'{values!r:.80}')}"
                raise UserError(f"{plugin.path}: {kind} must be a tensor of {experts} finite numbers, not {found}")
        return given

    return scores
