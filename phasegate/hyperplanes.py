"""Where a split cuts an expert's tokens, and what keeps the two sides of a cut in balance.

Shapes: M tokens of one expert, D model width, H expert width, G gates, N tokens, K chosen families, L inner nodes.
"""

import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.moe import MoE, Routing

SHRINKAGE = 0.1  # of the tokens' covariance towards the sphere, where a direction is scaled by it


def halve(tokens: Tensor, normal: Tensor) -> tuple[Tensor, float]:
    """The hyperplane (unit normal, offset) along `normal` (D,) that halves tokens (M, D).

    It lies midway between the two tokens in the middle: on it, rounding would choose a token's side anew every time.
    """
    normal, middle = F.normalize(normal, dim=0), len(tokens) // 2
    positions = (tokens @ normal).sort().values
    return normal, -float(positions[max(middle - 1, 0) : middle + 1].mean()) if len(tokens) else 0.0


def random_direction(width: int, generator: torch.Generator) -> Tensor:
    """Uniform on the sphere, (D,)."""
    return F.normalize(torch.randn(width, generator=generator), dim=0)


def principal_direction(tokens: Tensor) -> Tensor:
    """First principal component of tokens (M, D) -> (D,); of fewer than two tokens, the last axis."""
    centred = (tokens - tokens.mean(0)).double()
    return _signed(torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]).to(tokens.dtype)


def loss_direction(tokens: Tensor, kernel: Tensor) -> Tensor:
    """The direction along which the two halves' gradients disagree most -> (D,).

    With s_i = +-1 the side of token i and g_i its gradient, the halves' gradients differ by sum_i s_i g_i, whose
    squared norm is s' K s. Its relaxation, s_i = u . (x_i - mean) of unit variance, is a generalised eigenproblem.

    Args:
        tokens: (M, D).
        kernel: (M, M) inner products of the tokens' gradients, from `gradient_kernel`.
    """
    centred = (tokens - tokens.mean(0)).double().cpu()
    covariance = centred.T @ centred
    variance = covariance.trace().clamp(min=torch.finfo(covariance.dtype).eps) / len(covariance)
    sphere = torch.eye(len(covariance)) * variance
    scale = (1 - SHRINKAGE) * covariance + SHRINKAGE * sphere
    disagreement = centred.T @ kernel.double().cpu() @ centred
    _, vectors = scipy.linalg.eigh(disagreement.numpy(), scale.numpy())
    return F.normalize(_signed(torch.from_numpy(vectors[:, -1])), dim=0).to(tokens)


def gradient_kernel(moe: MoE, e: int, tokens: Tensor, gradients: Tensor) -> Tensor:
    """Inner products (M, M) of the tokens' gradients with respect to all weights of expert index e.

    A token's gradient is a pair of outer products, so that it never has to be written out.

    Args:
        tokens: (M, D) that the expert ran.
        gradients: (M, D) of the loss with respect to the expert's output on each.
    """
    before = tokens @ moe.w_in[e]  # (M, H)
    hidden, back = before.relu(), (gradients @ moe.w_out[e].T) * (before > 0)
    return (hidden @ hidden.T) * (gradients @ gradients.T) + (tokens @ tokens.T) * (back @ back.T)


def sibling_balance(moe: MoE, routing: Routing) -> Tensor:
    """Switch's balancing loss for the two sides of every inner node, summed over the nodes that tokens reached.

    It is their number if all are even.
    """
    side = moe.path[routing.experts].sum(2)  # (G, N, L): a node lies on the path of one chosen expert at most
    visits = side.abs().sum((0, 1))
    seen = visits.clamp(min=1).to(routing.tokens.dtype)
    share = (side > 0).sum((0, 1)) / seen
    probability = (moe.margins(routing.tokens).sigmoid() * side.abs()).sum((0, 1)) / seen
    return 2 * ((share * probability + (1 - share) * (1 - probability)) * (visits > 0)).sum()


def _signed(vector: Tensor) -> Tensor:
    """An eigenvector's sign is arbitrary: make its largest entry positive."""
    return vector * vector[vector.abs().argmax()].sign()
