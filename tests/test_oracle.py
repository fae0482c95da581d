"""The oracle's losses are those of models from which experts have really been removed."""

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasegate.signals.oracle import choice_of_set, losses_of_all_sets, losses_without, losses_without_each
from phasegate.surgery.probe import Probe
from tests.models import losses_after_removal, random_model, seeds, split, stems, unchanged

sizes = st.tuples(st.integers(1, 4), st.integers(0, 3)).map(lambda pair: {"top_k": pair[0], "n_routed": sum(pair)})


@settings(max_examples=30)
@given(seeds, sizes, st.integers(0, 1), st.integers(0, 1))
def test_the_loss_of_every_set_is_the_models(seed: int, size: dict[str, int], shared: int, block: int) -> None:
    model, examples = random_model(seed, n_shared=shared, **size)
    probe, n = Probe(model, block, examples), size["n_routed"]
    for index, loss in enumerate(losses_of_all_sets(probe)):
        gone = [e for e in range(n) if not index >> e & 1]
        if n - len(gone) < size["top_k"]:
            assert loss == float("inf")
        else:
            torch.testing.assert_close(loss, losses_after_removal(probe, gone).mean(), rtol=1e-9, atol=1e-12)


@settings(max_examples=20)
@given(seeds, st.lists(st.integers(0, 9), max_size=4), stems)
def test_the_loss_without_each_expert_is_the_models(seed: int, splits: list[int], stem: str) -> None:
    model, examples = random_model(seed, stem=stem)
    moe = model.layers[0]
    for pick in splits:
        split(moe, int(moe.expert_id[pick % moe.n_routed]))
    probe = Probe(model, 0, examples)
    with unchanged(model):
        losses = losses_without_each(probe)
    for e in range(moe.n_routed):
        torch.testing.assert_close(losses[e], losses_after_removal(probe, [e]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(losses_without(probe, [e]), losses[e])


@given(st.integers(1, 6), st.integers(1, 4))
def test_of_a_set_of_ranks_the_best_are_chosen(n: int, k: int) -> None:
    choices = list(combinations(range(n), k))
    for ranks, choice in enumerate(choice_of_set(n, k).tolist()):
        best = [rank for rank in range(n) if ranks >> rank & 1][:k]
        assert (choice == len(choices)) == (len(best) < k)
        assert choice == len(choices) or list(choices[choice]) == best


@pytest.mark.parametrize("changes", [{"stem": "conv"}, {"n_routed": 17}, {}])
def test_what_the_oracle_can_not_try_is_refused(changes: dict[str, Any]) -> None:
    model, examples = random_model(0, **changes)
    if not changes:
        losses_of_all_sets(Probe(model, 0, examples))
        split(model.layers[0], 0)
    with pytest.raises(ValueError, match="at most 16 experts without siblings, and one token per example"):
        losses_of_all_sets(Probe(model, 0, examples))
