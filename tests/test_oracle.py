"""The oracle's losses are those of models from which experts have really been removed."""

import copy
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phasegate.expert_manager import ExpertManager
from phasegate.model import Model, ModelSpec
from phasegate.oracle import choice_of_set, example_losses, losses_of_all_sets, losses_without_each
from phasegate.pretraining_params import Architecture
from phasegate.probe import Probe
from phasegate.sections import override
from phasegate.training import Examples

sizes = st.tuples(st.integers(1, 4), st.integers(0, 3)).map(lambda pair: {"top_k": pair[0], "n_routed": sum(pair)})


def study(architecture: Architecture, seed: int, **changes: int | str) -> tuple[Model, Examples]:
    """A random model of two blocks in float64, its selection biased, and random examples."""
    torch.manual_seed(seed)
    model = Model(ModelSpec(override(architecture, changes, ""), (1, 8), (4,))).double().eval()
    for moe in model.layers:
        moe.selection_bias.normal_()
    return model, Examples(torch.randn(30, 1, 8).double(), torch.randint(0, 4, (30,)))


def loss_of(model: Model, block: int, alive: set[int], examples: Examples) -> Tensor:
    """The mean loss once every other expert of the layer has been removed."""
    model = copy.deepcopy(model)
    manager = ExpertManager(model.layers[block])
    for expert in set(manager.moe.expert_id.tolist()) - alive:
        manager.remove(expert)
    return example_losses(model, examples).mean()


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), size=sizes, shared=st.integers(0, 1), block=st.integers(0, 1))
def test_the_loss_of_every_set_is_that_of_the_model_with_the_others_removed(
    architecture: Architecture, seed: int, size: dict[str, int], shared: int, block: int
) -> None:
    model, examples = study(architecture, seed, n_shared=shared, **size)
    losses = losses_of_all_sets(Probe(model, block, examples))
    n, k = size["n_routed"], size["top_k"]
    for index, loss in enumerate(losses):
        alive = {e for e in range(n) if index >> e & 1}
        if len(alive) < k:
            assert loss == float("inf")
        else:
            torch.testing.assert_close(loss, loss_of(model, block, alive, examples), rtol=1e-9, atol=1e-12)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6), splits=st.lists(st.integers(0, 9), max_size=4), stem=st.sampled_from(["mlp", "conv"])
)
def test_the_loss_without_each_expert_is_that_of_the_model_with_it_removed(
    architecture: Architecture, seed: int, splits: list[int], stem: str
) -> None:
    model, examples = study(architecture, seed, stem=stem)
    for pick in splits:
        moe = model.layers[0]
        ExpertManager(moe).split(int(moe.expert_id[pick % moe.n_routed]), torch.randn(16).double(), 0.0)
        moe.w_out.data += 0.1 * torch.randn_like(moe.w_out)
    before = copy.deepcopy(model.state_dict())
    losses = losses_without_each(Probe(model, 0, examples)).mean(1)
    ids = set(model.layers[0].expert_id.tolist())
    for loss, expert in zip(losses, model.layers[0].expert_id.tolist(), strict=True):
        torch.testing.assert_close(loss, loss_of(model, 0, ids - {expert}, examples), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_expert_that_top_k_needs_can_not_be_done_without(architecture: Architecture) -> None:
    model, examples = study(architecture, 0, n_routed=2)
    assert losses_without_each(Probe(model, 0, examples)).isinf().all()


@given(st.integers(1, 6), st.integers(1, 4))
def test_of_a_set_of_ranks_the_best_are_chosen(n: int, k: int) -> None:
    choices = list(combinations(range(n), k))
    for ranks, choice in enumerate(choice_of_set(n, k).tolist()):
        best = [rank for rank in range(n) if ranks >> rank & 1][:k]
        assert (choice == len(choices)) == (len(best) < k)
        assert choice == len(choices) or list(choices[choice]) == best


def test_what_the_oracle_can_not_try_is_refused(architecture: Architecture) -> None:
    model, examples = study(architecture, 0, stem="conv")
    with pytest.raises(ValueError, match="one token per example"):
        losses_of_all_sets(Probe(model, 0, examples))
    model, examples = study(architecture, 0)
    ExpertManager(model.layers[0]).split(0, torch.ones(16).double(), 0.0)
    with pytest.raises(ValueError, match="at most 16 experts without siblings"):
        losses_of_all_sets(Probe(model, 0, examples))
    model, examples = study(architecture, 0, n_routed=17)
    with pytest.raises(ValueError, match="at most 16 experts"):
        losses_of_all_sets(Probe(model, 0, examples))
