"""Build the MoE layers of other libraries that are installed: `pip install -e '.[bench]'`.

A gated expert (SwiGLU) has three matrices and ours has two, so its hidden width is two thirds of ours: a token costs
the same.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from bench.layer import Size


class First(nn.Module):
    """Run a layer for (1, N, D), which returns its output alone or first, on tokens (N, D)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(x[None])
        output: Tensor = result if isinstance(result, Tensor) else result[0]
        return output.squeeze(0)


def layers(size: "Size") -> dict[str, Callable[[], nn.Module]]:
    """Return what builds every peer's layer of a size, by name."""
    found: dict[str, Callable[[], nn.Module]] = {}
    if find_spec("transformers"):
        for kind in ("eager", "grouped_mm"):
            found[f"transformers Mixtral, {kind}"] = partial(_mixtral, size, kind)
    if find_spec("st_moe_pytorch"):
        found["st-moe-pytorch"] = partial(_st_moe, size)
    if find_spec("mixture_of_experts"):
        found["mixture-of-experts"] = partial(_mixture_of_experts, size)
    return found


def _mixtral(size: "Size", kind: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=size.width,
        intermediate_size=_gated(size),
        num_local_experts=size.experts,
        num_experts_per_tok=size.top_k,
    )
    config._experts_implementation = kind
    block: nn.Module = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return First(block)


def _st_moe(size: "Size") -> nn.Module:
    from st_moe_pytorch import MoE

    multiple = size.hidden / size.width  # of which the library takes two thirds, its experts being gated
    layer: nn.Module = MoE(size.width, num_experts=size.experts, gating_top_n=size.top_k, expert_hidden_mult=multiple)
    return First(layer)


def _mixture_of_experts(size: "Size") -> nn.Module:
    from mixture_of_experts import MoE

    layer: nn.Module = MoE(size.width, num_experts=size.experts, hidden_dim=size.hidden)
    return First(layer)


def _gated(size: "Size") -> int:
    """Return the hidden width of a gated expert of the same cost, as a multiple of four."""
    return round(size.hidden * 2 / 3 / 4) * 4
