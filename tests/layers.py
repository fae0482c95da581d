"""Layers in training for the tests of surgery: random sizes, random plans, and every number that a layer holds."""

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import AdamW

from phasegate.model.moe import AXES, MoE
from phasegate.surgery.hyperplanes import halve, principal_direction
from phasegate.surgery.operations import ExpertManager, Surgery, SurgeryRefused
from tests.models import seeds

WIDTH = 8
RATE = 0.01
EXPERT = ("w_in", "w_out")
picks = st.integers(0, 99)
_steps = st.tuples(st.sampled_from(["split", "merge", "remove", "clone", "reinit"]), picks)
plans = st.integers(0, 20).flatmap(lambda length: st.lists(_steps, min_size=length, max_size=length))


def trained(seed: int, n_routed: int = 5, top_k: int = 2, n_shared: int = 0, steps: int = 3, **kind: bool) -> Any:
    """A layer after some steps of the pipeline's optimizer, and its manager; `kind`: double, hyperplanes (trained)."""
    torch.manual_seed(seed)
    moe = MoE(WIDTH, n_routed, 8, top_k, n_shared).to(torch.float64 if kind.get("double") else torch.float32)
    for hyperplane in (moe.node_weight, moe.node_offset):
        hyperplane.requires_grad_(kind.get("hyperplanes", True))
    manager = ExpertManager(moe, AdamW(moe.parameters(), lr=RATE, fused=True))
    for _ in range(steps):
        train(manager)
    return moe, manager


@st.composite
def managers(draw: st.DrawFn, planned: bool = True, steps: int = 3) -> Any:
    """The manager of a layer of random sizes after some training, and after a plan of operations if it is `planned`."""
    n_routed = draw(st.integers(2, 32))
    sizes = {"top_k": st.integers(1, min(n_routed, 4)), "n_shared": st.integers(0, 2), "seed": seeds}
    kinds = {"double": st.booleans(), "hyperplanes": st.booleans()}
    drawn: dict[str, Any] = {name: draw(values) for name, values in (sizes | kinds).items()}
    manager = trained(n_routed=n_routed, steps=steps, **drawn)[1]
    for operation, pick in draw(plans) if planned else ():
        with suppress(SurgeryRefused):
            operate(manager, operation, pick)
            train(manager)
    return manager


def train(manager: ExpertManager) -> None:
    """One step under a gradient that is noise, so that its size is the same at every step."""
    x, gradient = torch.randn(2, 1, 64, WIDTH, dtype=manager.moe.w_in.dtype)
    _step(manager, (manager.moe(x)[0] * gradient).sum())


def classify(manager: ExpertManager) -> None:
    """One step towards telling overlapping classes apart: the layer's outputs are the logits."""
    means = torch.randn(2 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    y = torch.randint(len(means), (128,))  # each class has two means
    x = means[y] + 0.8 * torch.randn(len(y), WIDTH)
    _step(manager, F.cross_entropy(manager.moe(x[None])[0][0], y % WIDTH))


def _step(manager: ExpertManager, loss: Tensor) -> None:
    assert manager.optimizer is not None
    manager.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    manager.optimizer.step()


def operate(manager: ExpertManager, operation: str, pick: int) -> Surgery:
    """One operation on the pick-th expert that may suit; a split halves the tokens that the expert gets."""
    moe = manager.moe
    index = pick % moe.n_routed
    expert = int(moe.expert_id[index])
    if operation == "split":
        x = torch.randn(1, 100, WIDTH, dtype=moe.w_in.dtype)
        tokens = x[0][(moe(x)[1].experts[0] == index).any(-1)]
        return manager.split(expert, *halve(tokens, principal_direction(tokens)))
    if operation == "merge":
        pairs = [(e, s) for e in moe.expert_id.tolist() if (s := manager.sibling(e)) is not None]
        one, other = pairs[pick % len(pairs)] if pairs else (expert, expert)
        return manager.merge(one, other, share=pick / 99)
    if operation == "reinit":
        return manager.reinit(torch.Generator().manual_seed(pick))
    return manager.remove(expert) if operation == "remove" else manager.clone(expert)


def state(manager: ExpertManager) -> dict[str, Tensor]:
    """Every number of the layer and of its optimizer, by name."""
    assert manager.optimizer is not None
    named = dict(manager.moe.state_dict())
    for name, parameter in manager.moe.named_parameters():
        kept = manager.optimizer.state.get(parameter, {})
        named |= {f"{name}.{key}": value for key, value in kept.items()}
    return {name: value.clone() for name, value in named.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_id(manager: ExpertManager) -> dict[int, dict[str, Tensor]]:
    """Weights and moments of every expert, and its router row."""
    now, experts = {name: value for name, value in state(manager).items() if value.dim()}, {}
    for e, expert in enumerate(now["expert_id"].tolist()):
        family = now["family_of"][e]
        router = {name: rows[:, family] for name, rows in now.items() if name.startswith("router")}
        experts[expert] = {name: rows[e] for name, rows in now.items() if name.startswith(EXPERT)} | router
    return experts


def check_sizes(manager: ExpertManager) -> None:
    """Everything that counts the same thing agrees, and every trained parameter has moments of its own shape."""
    moe, sizes = manager.moe, dict[str | None, int]()
    for name, axes in AXES.items():
        for axis, size in zip(axes, getattr(moe, name).shape, strict=True):
            assert axis is None or sizes.setdefault(axis, size) == size, f"{name} has {size} rows of axis {axis}"
    assert moe.n_routed == sizes["expert"] and moe.n_families == sizes["family"]
    assert manager.optimizer is not None
    owned = [parameter for group in manager.optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in moe.parameters()}
    for name, parameter in moe.named_parameters():
        state = manager.optimizer.state.get(parameter)
        assert (state is not None) == (parameter.requires_grad and len(parameter) > 0), f"moments of {name}"
        if state is not None:
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape, f"moments of {name}"
    assert {id(p) for p in manager.optimizer.state} <= {id(p) for p in owned}
