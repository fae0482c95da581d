"""Choose where a split cuts an expert's tokens, and keep the two sides of a cut in balance.

Shapes: M tokens of one expert, D model width, H expert width, G gates, N tokens, K chosen families, L inner nodes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.model.moe import MoE, Routing
from phasegate.surgery.probe import Probe
from phasegate.training.predictions import EVALUATION_BATCH

Direction = Literal["random", "principal", "loss"]
SHRINKAGE = 0.1  # of the tokens' covariance towards the sphere, where a direction is scaled by it


def cut(probe: Probe, e: int, direction: Direction, draws: torch.Generator) -> tuple[Tensor, float, float]:
    """Return the hyperplane (unit normal, offset) that halves the probed tokens of expert index e, and its upper share.

    The share is that of the tokens above it, as if there were one token more on either side: so neither side is empty.
    """
    tokens = probe.tokens_of(e)
    match direction:
        case "random":
            along = random_direction(tokens.shape[1], draws).to(tokens)
        case "principal":
            along = principal_direction(tokens)
        case "loss":
            slopes = (probe.visits[:, e, None] * probe.slopes)[(probe.routing.experts[0] == e).any(-1)]
            every = -(-len(tokens) // EVALUATION_BATCH) or 1  # an image may be many tokens, and the kernel is square
            kernel = gradient_kernel(probe.layer, e, tokens[::every], slopes[::every])
            along = loss_direction(tokens[::every], kernel)
    normal, offset = halve(tokens, along)
    above = int((tokens @ normal + offset > 0).sum())
    return normal, offset, (above + 1) / (len(tokens) + 2)


def halve(tokens: Tensor, normal: Tensor) -> tuple[Tensor, float]:
    """Return the hyperplane (unit normal, offset) along `normal` (D,) that halves tokens (M, D).

    It lies midway between the two tokens in the middle. A token that lay on it would fall on either side by rounding,
    so it passes through zero if there are fewer than two.
    """
    normal, middle = F.normalize(normal, dim=0), len(tokens) // 2
    positions = (tokens @ normal).sort().values
    return normal, -float(positions[max(middle - 1, 0) : middle + 1].mean()) if len(tokens) > 1 else 0.0


def random_direction(width: int, generator: torch.Generator) -> Tensor:
    """Draw a direction (D,) uniformly on the sphere."""
    return F.normalize(torch.randn(width, generator=generator), dim=0)


def principal_direction(tokens: Tensor) -> Tensor:
    """Return the first principal component (D,) of tokens (M, D); of fewer than two tokens, the last axis."""
    centred = (tokens - tokens.mean(0)).double()
    return _fix_sign(torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]).to(tokens.dtype)


def loss_direction(tokens: Tensor, kernel: Tensor) -> Tensor:
    """Return the direction (D,) along which the gradients of the two halves disagree most.

    With s_i = +-1 the side of token i and g_i its gradient, the gradients of the halves differ by sum_i s_i g_i, whose
    squared norm is s' K s, with K from `gradient_kernel` (M, M). Its relaxation, s_i = u . (x_i - mean) of unit
    variance, is a generalised eigenproblem.
    """
    from scipy.linalg import eigh  # which few trials need, and which takes a quarter of a second

    centred = (tokens - tokens.mean(0)).double().cpu()
    covariance = centred.T @ centred
    variance = covariance.trace().clamp(min=torch.finfo(covariance.dtype).eps) / len(covariance)
    scale = (1 - SHRINKAGE) * covariance + SHRINKAGE * (torch.eye(len(covariance)) * variance)
    disagreement = centred.T @ kernel.double().cpu() @ centred
    _, vectors = eigh(disagreement.numpy(), scale.numpy())
    return F.normalize(_fix_sign(torch.from_numpy(vectors[:, -1])), dim=0).to(tokens)


def gradient_kernel(moe: MoE, e: int, tokens: Tensor, gradients: Tensor) -> Tensor:
    """Return the inner products (M, M) of the tokens' gradients with respect to all weights of expert index e.

    A token's gradient is a pair of outer products, so it never has to be written out. `gradients` (M, D) are those of
    the loss with respect to the expert's output on each token.
    """
    before = tokens @ moe.w_in[e]  # (M, H)
    hidden, back = before.relu(), (gradients @ moe.w_out[e].T) * (before > 0)
    return (hidden @ hidden.T) * (gradients @ gradients.T) + (tokens @ tokens.T) * (back @ back.T)


def sibling_balance(moe: MoE, routing: Routing) -> Tensor:
    """Return Switch's balancing loss for the two sides of every inner node, summed over the nodes that tokens reached.

    It equals the number of these nodes if all are even.
    """
    side = moe.path[routing.experts].sum(2)  # (G, N, L): a node lies on the path of one chosen expert at most
    visits = side.abs().sum((0, 1))
    seen = visits.clamp(min=1).to(routing.tokens.dtype)
    share = (side > 0).sum((0, 1)) / seen
    probability = (moe.margins(routing.tokens).sigmoid() * side.abs()).sum((0, 1)) / seen
    return 2 * ((share * probability + (1 - share) * (1 - probability)) * (visits > 0)).sum()


def _fix_sign(vector: Tensor) -> Tensor:
    """Make the largest entry of an eigenvector positive, since its sign is arbitrary."""
    return vector * vector[vector.abs().argmax()].sign()
