"""A parameter that can't be right is refused with its key, its value and what would be right."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from phasegate.errors import UserError
from phasegate.params import Params, load_params, parse

PATH = Path(__file__).parents[1] / "params.yaml"


def refused(**changes: Any) -> str:
    """The sentence with which params.yaml is refused under changes, keyed by dotted path with __ for the dot."""
    values = yaml.safe_load(PATH.read_text())
    for key, value in changes.items():
        *path, name = key.split("__")
        section = values
        for part in path:
            section = section[part]
        section[name] = value
    with pytest.raises(UserError) as error:
        parse(Params, values)
    return str(error.value)


def test_the_committed_parameters_are_right() -> None:
    assert load_params(PATH).seeds >= 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": 0}, "seeds is 0: input should be greater than or equal to 1"),
        ({"seeds": 1}, "seeds is 1: 7b.4's control head learns from the other seeds, so it must be at least 2"),
        ({"seeds": True}, "seeds is True: input should be a valid integer"),
        ({"training__lr": float("nan")}, "training.lr is nan"),
        ({"training__warmup": 3000}, "warmup is 3000: it must be less than steps = 3000"),
        ({"model__top_k": 13}, "top_k is 13: it must be at most n_routed = 12"),
        ({"p7a__n_routed": 13}, "p7a.n_routed is 13, but no candidate of q2 has that many experts"),
        ({"p7b__settle": 600}, "act_every + settle is 640: it must be at most steps = 600"),
        ({"p7b__split_direction": "best"}, "p7b.split_direction is 'best'"),
        ({"p7b__hyperplanes": "free"}, "p7b.hyperplanes is 'free'"),
        ({"p7b__sibling_balance": -1}, "p7b.sibling_balance is -1"),
        ({"p7b__min_experts": 13}, "p7b.min_experts is 13: p7a.n_routed = 12 is below it"),
        ({"p7b__cooldown": 200}, "p7b.cooldown is 200: it must be at most 160"),
        ({"surgery__operations": 3}, "surgery.operations is 3: input should be a multiple of 2"),
        ({"surgery__operations": 12}, "surgery.operations is 12, but p7b has time for 11"),
        ({"p7b__max_experts": 19}, "added to p7a.n_routed = 12 it must be at most p7b.max_experts = 19"),
        ({"p7b1__grow": 0.9}, "grow + prune is 1.1: it must be at most 1"),
        ({"p7b2__labels__grow_below": 2}, "grow_below is 2.0: it must be at most prune_above = 1.03"),
        ({"p7b4__recovery_steps": 161}, "p7b4.recovery_steps is 161: it must be at most p7b.settle = 160"),
        ({"p7b4__surveys": 4}, "the last of p7b4.surveys = 4, one every survey_every = 440, is at step 1320"),
        ({"p7b4__repeats": 1}, "p7b4.repeats is 1: input should be greater than or equal to 2"),
        ({"p7b4__usage__grow_above": 0.5}, "prune_below is 0.7: it must be at most grow_above = 0.5"),
        ({"decisions__phases__p7b2__primary": "splt"}, "the primary arm of p7b2 is 'splt': it must be one of split,"),
        ({"p7b__act_evry": 3}, "p7b.act_evry is not a parameter; did you mean act_every?"),
    ],
)
def test_what_can_not_be_right_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    found = refused(**changes)
    assert sentence in found and "\n" not in found
