"""Let experts be born into a layer: newborns put out nothing at first, and take over during the next steps.

A birth appends families of fresh experts whose output weights are zero, so it changes no bit of what the layer puts
out. While it is under way, each token runs the families that the old router chooses, as before, and those that the
whole router chooses. Either way the weight moves from the first to the second.

Shapes: G gates, N tokens, E experts, F families, K chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from phasegate.model.experts import Hyperplanes, Routed, route
from phasegate.params.phases import BIRTH_STEPS


class Birth(NamedTuple):
    """Describe a birth that is under way."""

    n_old: int  # families before it
    age: int  # steps of training since
    retires: bool  # whether the old experts retire, and newborns alone are left


def overlap(
    x: Tensor, router: Tensor, bias: Tensor, hyperplanes: Hyperplanes, top_k: int, birth: Birth, family_of: Tensor
) -> tuple[Routed, Tensor, Tensor]:
    """Route tokens x (G, N, D) in a layer with a birth under way: the routing to come, then the weights and experts.

    With c from 0 to 1 as the birth ages, newborns *beside* the old: 2 K slots of a token, the old choice with 1 - c of
    its gates, and the new choice with its gates, times c where an expert is old. If the old *retire*: K slots, of which
    the old lose their weight one after the other, the strongest gate last, and as many newborns run instead.
    """
    n_old, age, retires = birth
    weight, offset, root, child = hyperplanes

    def among(first: int, last: int) -> Routed:
        some = slice(first, last)
        return route(x, router[:, some], bias[:, some], (weight, offset, root[some], child), top_k)

    n_families = router.shape[1]
    before = among(0, n_old)
    if not retires:
        after, part = among(0, n_families), age / BIRTH_STEPS
        is_old = (family_of < n_old)[after.experts]
        weights = torch.cat([before.weights * (1 - part), after.weights * torch.where(is_old, part, 1.0)], dim=-1)
        return after, weights, torch.cat([before.experts, after.experts], dim=-1)
    after, passed = among(n_old, n_families), top_k * age / BIRTH_STEPS
    new = top_k * age // BIRTH_STEPS
    old = top_k - new
    fading = (top_k - passed - torch.arange(old, device=x.device, dtype=x.dtype)).clamp(0, 1)
    weights = torch.cat([before.weights[..., :old] * fading, after.weights[..., :new]], dim=-1)
    chosen = torch.cat([before.experts[..., :old], after.experts[..., :new]], dim=-1)
    logits = torch.cat([before.logits, after.logits], dim=-1)
    return after._replace(logits=logits, families=after.families + n_old), weights, chosen
