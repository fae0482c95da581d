"""What `make bench` says is what it measured."""

import time
from functools import partial

import pytest
import torch

from bench import layer, step
from bench.timing import Entry, entry, medians


def test_cases_take_turns_and_the_warm_up_does_not_count() -> None:
    turns: list[str] = []

    def run(name: str, seconds: float) -> None:
        turns.append(name)
        time.sleep(seconds if turns.count(name) > 1 else 0.2)

    times = medians({"slow": partial(run, "slow", 0.02), "fast": partial(run, "fast", 0.001)}, rounds=3, warm_up=1)
    assert turns == ["slow", "fast"] * 4
    assert 1 <= times["fast"] < 20 <= times["slow"] < 200


def test_a_line_compares_with_the_limit_and_the_fastest_peer() -> None:
    line = entry("case", 2, {"ours": 4.0, "limit": 3.0, "one": 9.0, "other": 6.0})
    assert line == Entry("case", 2, 4.0, 3.0, 0.75, "other", 6.0, 1.5)
    assert entry("case", 1, {"ours": 4.0}) == Entry("case", 1, 4.0)


@pytest.mark.parametrize("split", [0, 2])
def test_a_layer_and_its_limit_cost_a_token_the_same_and_keep_no_gradient(split: int) -> None:
    size = layer.Size(8, 8, 16, 4, 2)
    ours, limit = layer.Ours(size, split), layer.dense(size)
    assert ours.moe.n_routed == 4 + split
    active = size.top_k * (ours.moe.w_in[0].numel() + ours.moe.w_out[0].numel())
    assert active == sum(parameter.numel() for parameter in limit.parameters())
    times = medians({name: layer.forward_backward(each, size) for name, each in (("ours", ours), ("limit", limit))}, 1)
    assert all(taken > 0 for taken in times.values())
    assert all(parameter.grad is None for parameter in (*ours.parameters(), *limit.parameters()))


@pytest.mark.parametrize("dense", [False, True])
def test_a_step_that_is_timed_trains(dense: bool) -> None:
    torch.manual_seed(0)
    step.training_case(2, dense)()
