"""The layer is ordinary top-K routing until a family grows, and then each token descends to one leaf."""

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phasegate.model import experts
from phasegate.model.births import Birth
from phasegate.model.moe import MoE
from phasegate.surgery.operations import ExpertManager

seeds = st.integers(0, 10**6)
few, splits = st.integers(1, 3), st.integers(0, 8)


def naive(moe: MoE, x: Tensor) -> Tensor:
    """Top-K softmax routing as it is usually defined, token by token."""
    mixtures = []
    for gate, tokens in enumerate(x):
        for token in tokens:
            scores = moe.router[gate] @ token
            probs, biased = scores.softmax(0), (scores + moe.selection_bias[gate]).tolist()
            chosen = sorted(range(len(biased)), key=lambda e: -biased[e])[: moe.top_k]
            total = probs[chosen].sum() if moe.top_k > 1 else 1.0
            mixture = torch.stack([probs[e] / total * ((token @ moe.w_in[e]).relu() @ moe.w_out[e]) for e in chosen])
            shared = (token @ moe.shared_in).relu() @ moe.shared_out if moe.n_shared else 0
            mixtures.append(mixture.sum(0) + shared)
    return torch.stack(mixtures).view_as(x)


def grown(seed: int, splits: int, top_k: int = 2, gates: int = 1, width: int = 8, hidden: int = 32) -> MoE:
    """A layer whose experts were split at random by random hyperplanes."""
    torch.manual_seed(seed)
    moe = MoE(width, 5, hidden, top_k, n_gates=gates)
    for _ in range(splits):
        ExpertManager(moe).split(int(torch.randint(moe.n_routed, ())), torch.randn(width), float(torch.randn(())))
    return moe


@settings(max_examples=60)
@given(seeds, st.integers(1, 4), st.integers(0, 4), st.integers(0, 2), few, st.sampled_from([4, 5, 8]), st.booleans())
def test_without_siblings_the_layer_is_a_plain_top_k_mixture(
    seed: int, top_k: int, more: int, shared: int, gates: int, width: int, double: bool
) -> None:
    torch.manual_seed(seed)
    moe = MoE(width, top_k + more, 4, top_k, shared, gates)
    moe.selection_bias.normal_(std=0.1)
    x, weight = torch.randn(2, gates, 7, width)
    if double:
        moe, x, weight = moe.double(), x.double(), weight.double()
    rtol, atol = (1e-10, 1e-12) if double else (1e-4, 1e-5)
    outputs = moe(x)[0], naive(moe, x)
    torch.testing.assert_close(*outputs, rtol=rtol, atol=atol)
    weights = [moe.router, moe.w_in, moe.w_out]
    gradients = [torch.autograd.grad((y * weight).sum(), weights) for y in outputs]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=atol)


@settings(max_examples=30)
@given(seeds, splits, st.integers(1, 4), few, st.sampled_from([(4, 8), (5, 7), (40, 33)]), st.integers(0, 70))
def test_the_compiled_layer_and_plain_torch_agree(
    seed: int, splits: int, top_k: int, gates: int, sizes: tuple[int, int], tokens: int
) -> None:
    compiled = grown(seed, splits, top_k, gates, *sizes)
    plain, x = copy.deepcopy(compiled).double(), torch.randn(gates, tokens, sizes[0], requires_grad=True)
    slope, results = torch.randn_like(x), []
    for moe in (compiled, plain):
        given = x.to(moe.router.dtype)
        y, routing = moe(given)
        loss = (y * slope).sum() + routing.logits.square().sum() + routing.gates.square().sum()
        gradients = torch.autograd.grad(loss, [x, *moe.parameters()], allow_unused=True)
        results.append([y, routing.logits, routing.gates, routing.experts, moe.load, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_of_equal_scores_the_lower_index_is_chosen() -> None:
    for moe in (MoE(8, 5, 4, 3), MoE(8, 5, 4, 3).double()):
        moe.router.data[:] = torch.randn(8)
        moe.selection_bias[0, 1] = -1.0
        routing = moe(torch.randn(1, 9, 8, dtype=moe.router.dtype))[1]
        assert (routing.families == torch.tensor([0, 2, 3])).all()
        assert torch.equal(routing.gates, torch.full((1, 9, 3), 1 / 3, dtype=moe.router.dtype))


@given(seeds, st.integers(0, 12), st.integers(1, 4))
def test_every_token_runs_exactly_k_experts_of_k_families(seed: int, splits: int, top_k: int) -> None:
    moe = grown(seed, splits, top_k)
    routing = moe(torch.randn(1, 50, 8))[1]
    assert routing.experts.shape == (1, 50, top_k)
    assert all(len(set(chosen)) == top_k for chosen in routing.experts[0].tolist())
    assert torch.equal(moe.family_of[routing.experts], routing.families)
    sums = routing.gates.sum(-1)
    assert (sums < 1).all() if top_k == 1 else torch.allclose(sums, torch.ones(()))


@given(seeds, st.integers(1, 15))
def test_descent_reaches_the_leaf_with_the_largest_smallest_signed_margin(seed: int, splits: int) -> None:
    moe = grown(seed, splits)
    x = torch.randn(1, 60, 8)
    margins = x[0] @ moe.node_weight.T + moe.node_offset  # (N, L)
    signed = torch.where(moe.path != 0, moe.path * margins[:, None], torch.inf)  # (N, E, L)
    score = signed.amin(-1)  # (N, E)
    routing = moe(x)[1]
    inside = moe.family_of == routing.families[0, :, :, None]  # (N, K, E)
    assert torch.equal(routing.experts[0], torch.where(inside, score[:, None], -torch.inf).argmax(-1))


@given(seeds, st.integers(1, 8))
def test_trained_hyperplanes_learn_from_tokens_that_pass_and_change_no_value(seed: int, splits: int) -> None:
    moe = grown(seed, splits)
    x = torch.randn(1, 40, 8)
    y, routing = moe(x)
    (y * torch.randn_like(y)).sum().backward()
    passed = (moe.path[routing.experts.unique()] != 0).any(0)
    assert moe.node_offset.grad is not None and moe.node_weight.grad is not None
    assert torch.equal(moe.node_offset.grad != 0, passed)
    assert torch.equal((moe.node_weight.grad != 0).any(1), passed)
    for hyperplane in (moe.node_weight, moe.node_offset):
        hyperplane.requires_grad_(False)
    assert torch.equal(moe(x)[0], y)


@given(seeds, splits, st.integers(1, 4), few)
def test_the_load_counts_the_tokens_each_expert_ran_in_training(seed: int, splits: int, top_k: int, gates: int) -> None:
    moe = grown(seed, splits, top_k, gates)
    expected = [0] * moe.n_routed
    for training in (True, False, True):
        moe.train(training)
        chosen = moe(torch.randn(gates, 30, 8))[1].experts.flatten().tolist()
        for e in chosen * training:
            expected[e] += 1
        assert moe.load.tolist() == expected
    assert sum(expected) == 2 * gates * 30 * top_k


@given(seeds, splits)
def test_a_token_gets_the_gated_sum_of_what_its_experts_run(seed: int, splits: int) -> None:
    moe = grown(seed, splits)
    x = torch.randn(1, 20, 8)
    y, routing = moe(x)
    for token, output, gates, chosen in zip(x[0], y[0], routing.gates[0], routing.experts[0].tolist(), strict=True):
        parts = [gate * moe.run(e, token[None])[0] for gate, e in zip(gates, chosen, strict=True)]
        torch.testing.assert_close(torch.stack(parts).sum(0), output)


@given(seeds, splits, few)
def test_margins_are_signed_distances_for_unit_normals(seed: int, splits: int, gates: int) -> None:
    moe = grown(seed, splits, gates=gates)
    with torch.no_grad():
        moe.node_weight.div_(moe.node_weight.norm(dim=1, keepdim=True))
    x = torch.randn(gates, 10, 8)
    margins = moe.margins(x)
    assert margins.shape == (gates, 10, splits)
    for node, normal in enumerate(moe.node_weight):
        foot = x - margins[..., node, None] * normal
        torch.testing.assert_close(foot @ normal, (-moe.node_offset[node]).expand(gates, 10), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [-1, 0, 5])
def test_a_top_k_out_of_range_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k is {top_k}: it must lie between 1 and n_routed = 4"):
        MoE(8, 4, 8, top_k)


@pytest.mark.parametrize("width", [7, 9])
def test_tokens_of_another_width_are_refused_before_a_kernel_reads_them(width: int) -> None:
    moe, x = MoE(8, 4, 8, 2), torch.randn(1, 3, width)
    for use in (moe, moe.margins, lambda x: moe.run(0, x[0]), lambda x: moe.outputs(x, torch.zeros(1, 3, 1).long())):
        with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
            use(x)


@pytest.mark.parametrize("shape", [(3, 8), (1, 1, 3, 8), (3, 3, 8), (8,), (1, 3, 0)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    for moe in (MoE(8, 4, 8, 2, n_gates=2), MoE(8, 4, 8, 2, n_gates=2).double()):
        with pytest.raises(ValueError, match=r"^tokens have shape \(.*\): it must be \(\d, N, 8\) for these routers$"):
            moe(torch.randn(shape, dtype=moe.router.dtype))


@pytest.mark.parametrize("top_k", [0, -1, 5, 5_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_families_than_there_are_cannot_be_chosen(top_k: int, dtype: torch.dtype) -> None:
    moe = MoE(8, 4, 8, 2).to(dtype)
    moe.top_k = top_k
    with pytest.raises(ValueError, match=f"^top_k is {top_k}: it must lie between 1 and the 4 families that may be"):
        moe(torch.randn(1, 300, 8, dtype=dtype))
    moe.top_k = 2
    moe.set_birth(Birth(2, 10, True))
    moe.top_k = 3
    with pytest.raises(ValueError, match=r"^top_k is 3: it must lie between 1 and the 2 families"):
        moe(torch.randn(1, 300, 8, dtype=dtype))


@pytest.mark.parametrize("name", ["router", "w_in", "w_out", "node_weight", "node_offset", "selection_bias"])
def test_a_kernel_reads_no_weights_of_another_type_shape_or_layout(name: str) -> None:
    whole, x = grown(0, 3), torch.randn(1, 30, 8)
    wanted = whole(x)[0]

    def changed(change: Callable[[Tensor], Tensor]) -> Tensor:
        moe = copy.deepcopy(whole)
        parameter, new = isinstance(getattr(moe, name), nn.Parameter), change(getattr(moe, name).detach())
        setattr(moe, name, nn.Parameter(new) if parameter else new)
        y: Tensor = moe(x)[0]
        y.sum().backward()  # type: ignore[no-untyped-call]
        return y

    assert torch.equal(changed(lambda old: old.movedim(-1, 0).contiguous().movedim(0, -1)), wanted)
    torch.testing.assert_close(changed(lambda old: torch._neg_view(-old)), wanted)
    for bad in (lambda old: old[..., :-1].clone(), lambda old: old[..., None], lambda old: old.to("meta")):
        with pytest.raises((IndexError, NotImplementedError, RuntimeError, UserWarning, ValueError)):
            changed(bad)
    with suppress(RuntimeError):  # or what torch promotes
        torch.testing.assert_close(changed(lambda old: old.double()), wanted, check_dtype=False)


def test_a_kernel_reads_no_tables_of_another_type_or_shape() -> None:
    moe, x = grown(0, 3), torch.randn(1, 30, 8)
    wanted, root, child = moe(x)[0], moe._root, moe._child
    for moe._root, moe._child in ((root[:, None], child), (root, child.flatten()), (root, child.T.contiguous().T)):
        torch.testing.assert_close(moe(x)[0], wanted)
    for moe._root, moe._child in ((root.int(), child.int()), (root, child[:2]), (root, child.to("meta"))):
        with pytest.raises((IndexError, NotImplementedError, RuntimeError)):
            moe(x)


def test_a_layer_that_takes_another_state_routes_as_that() -> None:
    (moe, other), x = (grown(seed, 3) for seed in (0, 1)), torch.randn(1, 30, 8)
    other.set_birth(Birth(2, 10, True))
    moe.load_state_dict(other.state_dict())
    assert moe.under_way == Birth(2, 10, True) and torch.equal(moe._child, other._child)
    assert torch.equal(moe(x)[0], other(x)[0])
    with pytest.raises(ValueError, match=r"^path: node 0 does not join two trees"):
        moe.load_state_dict({**other.state_dict(), "path": torch.ones_like(other.path)})


@pytest.mark.parametrize("tokens", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_layer_of_any_type_takes_tokens_of_its_own_alone(dtype: torch.dtype, tokens: torch.dtype) -> None:
    moe, x = grown(0, 3).to(dtype), torch.ones(1, 5, 8, dtype=tokens)
    if tokens == dtype:
        assert moe(x)[0].dtype == dtype
    else:
        with pytest.raises(RuntimeError, match="type"):
            moe(x)


def test_experts_that_are_not_there_are_refused_and_indices_have_any_type() -> None:
    moe, x, weights = MoE(8, 4, 8, 2), torch.randn(1, 9, 8), torch.rand(1, 9, 3)
    chosen = torch.randint(4, (1, 9, 3))
    wanted = moe.outputs(x, chosen)
    torch.testing.assert_close(moe.outputs(x, chosen.int()), wanted)
    views = (x.transpose(1, 2).contiguous().transpose(1, 2), chosen.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(moe.outputs(*views), wanted)
    assert moe.outputs(x, chosen[..., :0]).shape == (1, 9, 0, 8)
    for wrong in (4, -1, 2**40):
        chosen[0, 8, 2] = wrong
        for use in (moe.outputs, lambda x, chosen: experts.mix(x, weights, chosen, moe.w_in, moe.w_out)):
            with pytest.raises(IndexError, match=r"^1 index of experts out of range: there are 4 experts$"):
                use(x, chosen)
    with pytest.raises(RuntimeError):
        experts.mix(x, weights, chosen[:, :5].clamp(0, 3), moe.w_in, moe.w_out)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_tokens_that_are_not_numbers_reach_no_other_memory(top_k: int) -> None:
    moe = grown(0, 5, top_k)
    for bad in (float("nan"), float("inf"), -float("inf")):
        y, routing = moe(torch.where(torch.rand(1, 40, 8) < 0.1, bad, torch.randn(1, 40, 8, requires_grad=True)))
        assert routing.families.min() >= 0 and routing.families.max() < moe.n_families
        assert torch.equal(moe.family_of[routing.experts], routing.families)
        y.sum().backward()


def test_the_whole_layer_moves_to_another_device() -> None:
    moe = grown(0, 3).to("meta")
    assert {value.device.type for value in vars(moe).values() if isinstance(value, Tensor)} <= {"meta"}


def chain(n: int) -> MoE:
    """A layer with one family, whose experts leave its tree one after the other."""
    moe = MoE(8, n, 1, 1)
    moe.family_of, moe.path = torch.zeros(n, dtype=torch.int64), (torch.eye(n)[:, :-1] * -2).to(torch.int8)
    moe.path += torch.ones(n, n - 1, dtype=torch.int8).tril()
    moe.router, moe.selection_bias = nn.Parameter(torch.randn(1, 1, 8)), torch.zeros(1, 1)
    moe.node_weight, moe.node_offset = nn.Parameter(torch.randn(n - 1, 8)), nn.Parameter(torch.zeros(n - 1))
    return moe


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [("path", (4, 3), v) for v in (0, -1, 2, -128)] + [("path", (0, 1), 1), ("path", (slice(None), 2), 0)]
    + [("family_of", 2, v) for v in (1, -1, 2**40)],
)  # fmt: skip
def test_paths_and_families_that_make_no_tree_are_refused(name: str, place: Any, value: int) -> None:
    moe = chain(5)
    moe.refresh()
    getattr(moe, name)[place] = value
    with pytest.raises(ValueError, match=rf"^{name}: (node \d does not join|a family is not the experts of one tree)"):
        moe.refresh()


def test_families_do_not_share_a_tree() -> None:
    moe = MoE(8, 4, 4, 2)
    moe.path = torch.tensor([[-1], [1], [-1], [1]], dtype=torch.int8)
    moe.family_of = torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"^path: node 0 does not join two trees of experts$"):
        moe.refresh()
