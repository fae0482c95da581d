"""Check params.yaml before anything runs, for the stage `check` and, as a program, for the git hook."""

import math
import os
from itertools import pairwise
from math import prod

from phasegate.base.errors import UserError, report_user_errors
from phasegate.base.memory import memory
from phasegate.params.phases import SURGERIES
from phasegate.params.plugins import Plugin
from phasegate.params.pretraining import Architecture, Reference
from phasegate.params.study import Params, load_params

COPIES = 4  # of every weight: itself, its gradient, and Adam's two moments
DRAWN = 40  # batches that are drawn in advance or kept
GIB = 1 << 30


def check(params: Params) -> None:
    """Raise `UserError` for a model that this machine cannot hold, or a file in `plugins/` that cannot be used."""
    refuse_too_large(params)
    for name, arm in params.plugins.arms.items():
        for key in ("signal", *SURGERIES):
            if isinstance(plugin := arm.find(key), Plugin):
                plugin.check(f"plugins.arms.{name}.{key}", SURGERIES.get(key, ()))


def refuse_too_large(params: Params, input_shape: tuple[int, ...] = (1, 1), classes: int = 2, train: int = 0) -> None:
    """Raise `UserError` if one trial of a model cannot fit into this machine's memory, if it runs here.

    The stage `check` knows no data, so it counts the smallest that there could be, and no batches; `prepare` knows
    shape, classes, and the number of `train` examples.
    """
    if os.environ.get("PHASEGATE_BACKEND") == "ray":
        return
    data = params.data.name if params.data.name in params.references else "default"
    weights = {
        f"references.{data}.{name}": reference_weights(model, input_shape, classes)
        for name, model in params.references[data].items()
    }
    for key, architecture in params.architectures().items():
        experts = {f"{key}.n_routed": architecture.n_routed}
        if architecture.n_routed == params.p7a.n_routed:  # it may become the baseline, which grows
            experts["p7b.max_experts"] = params.p7b.max_experts
            most = architecture.n_routed + params.surgery.in_a_row
            name = f"p7a.n_routed + surgery.in_a_row = {most}, {key}"
            weights[name] = model_weights(architecture, most, input_shape, classes) // COPIES  # it is not trained
        for name, count in experts.items():
            weights[f"{name} = {count}, {key}"] = model_weights(architecture, count, input_shape, classes)
    most = params.p7c.small + params.p7c.large  # as a handover has for a while
    model = params.growing_model(most)
    weights[f"p7c.small + p7c.large = {most}"] = model_weights(model, most, input_shape, classes)
    for key, count in weights.items():
        _check(f"{key}: a single trial of this model", COPIES * count, "weights, gradients and moments")
    held = max(activations(model, input_shape) for model in params.architectures().values())
    for key, training in params.trainings().items():
        values = min(training.batch, train) * (DRAWN * prod(input_shape) + held)
        _check(f"{key}.batch is {training.batch}: a trial", values, "batches and activations")


def _check(what: str, values: int, purpose: str) -> None:
    """Raise `UserError` if values of float32 do not fit into this machine's memory."""
    if (needed := 4 * values / GIB) > (most := memory() / GIB):
        raise UserError(f"{what} needs {needed:,.1f} GiB for {purpose}, and this machine has {most:,.1f} GiB")


def activations(model: Architecture, input_shape: tuple[int, ...]) -> int:
    """Count, roughly, what a step keeps of each example for the gradient: the results of the stem and of each block."""
    halves, quarters = (prod(math.ceil(axis / part) for axis in input_shape[1:]) for part in (2, 4))
    stem, tokens = (model.width * (halves + quarters), quarters) if model.stem == "conv" else (model.width, 1)
    per_token = 3 * model.width + (model.top_k + model.n_shared) * (model.width + model.expert_width)
    return stem + model.blocks * tokens * per_token


def model_weights(model: Architecture, experts: int, input_shape: tuple[int, ...], classes: int) -> int:
    """Count the weights of a mixture of experts without biases: its stem, blocks with `experts` each, and heads."""
    stem, axes = prod(input_shape), len(input_shape) - 1
    if model.stem == "conv":
        stem = 5**axes * input_shape[0] + 3**axes * model.width
    per_block = 2 * (experts + model.n_shared) * model.expert_width + experts  # and its router
    return model.width * (stem + model.blocks * per_block + 2 * classes)  # a head, and those of further tasks


def reference_weights(model: Reference, input_shape: tuple[int, ...], classes: int) -> int:
    """Count the weights of a reference model, without biases; each of its convolutions halves every axis."""
    axes, channels = input_shape[1:], model.channels
    if channels is None:
        return sum(fan_in * width for fan_in, width in pairwise((prod(input_shape), *(model.hidden or ()), classes)))
    kernels = 5 ** len(axes) * input_shape[0] * channels[0]
    kernels += sum(3 ** len(axes) * fan_in * width for fan_in, width in pairwise(channels))
    positions = prod(math.ceil(axis / (1 << len(channels))) for axis in axes)
    return int(kernels + channels[-1] * positions * classes)


if __name__ == "__main__":
    with report_user_errors("check"):
        check(load_params())
