"""Run AdamW (arXiv 1711.05101) over all parameters in one compiled call."""

from array import array
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from phasegate.model.kernels.compiled import kernels


class AdamW(Optimizer):
    """Update float32 parameters on the CPU as `torch.optim.AdamW` does, with the same state and groups.

    Methods that torch decorates are taken without the decorator, which imports torch's compiler (1.7 s per process).
    """

    add_param_group: Any = Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    state_dict: Any = Optimizer.state_dict.__wrapped__  # type: ignore[attr-defined]
    load_state_dict: Any = Optimizer.load_state_dict.__wrapped__  # type: ignore[attr-defined]
    zero_grad: Any = Optimizer.zero_grad.__wrapped__  # type: ignore[attr-defined]

    def __init__(self, groups: Iterable[dict[str, Any]] | Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        addresses, rates, gradients = array("q"), array("d"), []
        for group in self.param_groups:
            numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.dtype is not torch.float32 or not parameter.is_cpu:  # as when the optimizer was made
                    raise TypeError(f"a parameter is now {parameter.dtype} on {parameter.device}: make a new optimizer")
                state = self.state[parameter]
                if not state:
                    blank = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    state |= {"step": parameter.new_zeros(()), **blank}
                gradients.append(slope := parameter.grad.contiguous())
                first, second, size = state["exp_avg"], state["exp_avg_sq"], parameter.numel()
                if not slope.numel() == first.numel() == second.numel() == size:
                    had = tuple((first if slope.numel() == size else slope).shape)
                    raise TypeError(f"a parameter of shape {had} is now {tuple(parameter.shape)}: make a new optimizer")
                tensors = (parameter, slope, first, second, state["step"])
                addresses.extend([*[tensor.data_ptr() for tensor in tensors], size])
                rates.extend(numbers)
        kernels().adamw(addresses.buffer_info()[0], rates.buffer_info()[0], len(gradients))
