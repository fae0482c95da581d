"""Check params.yaml before anything runs, for the stage `check` and, as a program, for the git hook."""

import os

from phasegate.base.errors import UserError, report_user_errors
from phasegate.base.memory import memory
from phasegate.params.phases import SURGERIES
from phasegate.params.plugins import Plugin
from phasegate.params.pretraining import Architecture
from phasegate.params.study import Params, load_params

COPIES = 4  # of every weight: itself, its gradient, and Adam's two moments
GIB = 1 << 30


def check(params: Params) -> None:
    """Raise `UserError` for a model that this machine cannot hold, or a file in `plugins/` that cannot be used."""
    refuse_too_large(params)
    for name, arm in params.plugins.arms.items():
        for key in ("signal", *SURGERIES):
            if isinstance(plugin := arm.find(key), Plugin):
                plugin.check(f"plugins.arms.{name}.{key}", SURGERIES.get(key, ()))


def refuse_too_large(params: Params) -> None:
    """Raise `UserError` if one trial of an architecture cannot fit into this machine's memory, if it runs here."""
    if os.environ.get("PHASEGATE_BACKEND") == "ray":
        return
    available = memory()
    for key, architecture in params.architectures().items():
        sizes = {f"{key}.n_routed": architecture.n_routed}
        if architecture.n_routed == params.p7a.n_routed:  # it may become the baseline, which grows
            sizes["p7b.max_experts"] = params.p7b.max_experts
        for name, experts in sizes.items():
            if (needed := training_bytes(architecture, experts)) > available:
                raise UserError(
                    f"{name} is {experts}: with the widths of {key}, a single trial needs {needed / GIB:,.1f} GiB for "
                    f"weights, gradients and moments, and this machine has {available / GIB:,.1f} GiB"
                )


def training_bytes(architecture: Architecture, experts: int) -> int:
    """Return the bytes that the weights of all blocks, with `experts` each, take in training (float32)."""
    per_expert = 2 * architecture.width * architecture.expert_width
    return 4 * COPIES * architecture.blocks * (experts + architecture.n_shared) * per_expert


if __name__ == "__main__":
    with report_user_errors("check"):
        check(load_params())
