"""An arm's loss is the sum of its parts, and each part is the effect that it is named after."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from phasegate.attribution import ACCOUNTS, COLUMNS, CONTINUED, FACTORIAL, WHOLE, attribution
from phasegate.decisions import AVERAGED, decide
from phasegate.errors import UserError
from phasegate.statistics import holm
from phasegate.study import ARMS, START, START_ARMS

CONTRASTS = {
    (name, part): contrast
    for name, account in ACCOUNTS.items()
    for part, contrast in [*account.parts.items(), *([(WHOLE, account.whole)] if account.whole else [])]
}
NEEDED = sorted({arm for contrast in CONTRASTS.values() for arm in contrast})
SEEDS = 4
NOISE = np.random.default_rng(0).normal(80, 3, size=(len(NEEDED), SEEDS))


def trials(accuracy: NDArray[np.float64]) -> pd.DataFrame:
    """Trials of the arms needed, (arms, seeds), the control under the phase that it has before reports."""
    keys = [("continue", "continue") if key == CONTINUED else key.split("/") for key in NEEDED]
    rows = [(*key, seed, value) for key, row in zip(keys, accuracy, strict=True) for seed, value in enumerate(row)]
    return pd.DataFrame(rows, columns=["phase", "arm", "seed", "accuracy"]).assign(**dict.fromkeys(AVERAGED, 1))


@given(arrays(np.float64, (len(NEEDED), SEEDS), elements=st.floats(0, 100)))
@settings(max_examples=20)
def test_the_parts_of_a_chain_add_up_to_its_whole(accuracy: NDArray[np.float64]) -> None:
    table = attribution(trials(accuracy), 0.95)
    for name, rows in table[table["account"] != "factorial"].groupby("account"):
        *parts, whole = rows["effect_pp"]
        assert sum(parts) == pytest.approx(whole, abs=1e-7), name


@pytest.mark.parametrize("key", CONTRASTS, ids=": ".join)
def test_a_contrast_compares_known_arms_and_its_weights_sum_to_zero(key: tuple[str, str]) -> None:
    assert sum(CONTRASTS[key].values()) == pytest.approx(0, abs=1e-12)
    assert set(CONTRASTS[key]) <= {
        f"{phase}/{arm}" for phase, arms in (ARMS | {START: START_ARMS}).items() for arm in arms
    }


@pytest.mark.parametrize(
    ("entropy", "effects"),
    [  # accuracy under random labels is 0, -1, -3 for splits, clones, fresh experts
        ({"split": 2, "clone": 1, "reinit": -1}, [2, -1, -3, 0, 0]),  # entropy adds 2 to each
        ({"split": 2, "clone": 1 + 6, "reinit": -1}, [4, 2, -3, 6, 0]),  # and 6 more to clones: a third, a half
        ({"split": 2, "clone": 1, "reinit": -1 + 6}, [4, -1, 0, 0, 6]),
    ],
)
def test_the_factorial_recovers_planted_effects_and_their_interaction(
    entropy: dict[str, float], effects: list[float]
) -> None:
    planted: dict[str, dict[str, float]] = {"entropy": entropy, "random": {"split": 0, "clone": -1, "reinit": -3}}
    accuracy = dict.fromkeys(NEEDED, 0.0)
    accuracy |= {arm: planted[signal][growth] for signal, arms in FACTORIAL.items() for growth, arm in arms.items()}
    seeds = np.array([[80.1, 81.7, 79.4, 80.6]])  # what a seed does to all arms alike cancels
    table = attribution(trials(np.array([[accuracy[arm]] for arm in NEEDED]) + seeds), 0.95)
    for column in ("effect_pp", "effect_lo", "effect_hi"):
        assert table[table["account"] == "factorial"][column].tolist() == pytest.approx(effects, abs=1e-8)


def test_an_interaction_without_marginal_effects_shows_in_its_own_row_alone() -> None:
    cells = {"split": -1.0, "clone": 2.0, "reinit": -1.0}  # rows and columns of the factorial sum to zero
    accuracy = dict.fromkeys(NEEDED, 80.0)
    accuracy |= {FACTORIAL["entropy"][growth]: 80 + cell for growth, cell in cells.items()}
    accuracy |= {FACTORIAL["random"][growth]: 80 - cell for growth, cell in cells.items()}
    table = attribution(trials(np.array([[accuracy[arm]] * SEEDS for arm in NEEDED])), 0.95)
    factorial = table[table["account"] == "factorial"].set_index("part")["effect_pp"]
    assert factorial[factorial.abs() > 1e-8].to_dict() == {"interaction: entropy and clones": pytest.approx(6)}


def test_the_table_has_every_contrast_in_order_with_p_values_corrected_over_the_parts() -> None:
    table = attribution(trials(NOISE), 0.95)
    assert list(table.columns) == COLUMNS
    assert list(zip(table["account"], table["part"], strict=True)) == list(CONTRASTS)
    whole = table["part"] == WHOLE
    assert (table["p_holm"] >= table["p_value"])[~whole].all() and table["p_holm"][whole].isna().all()
    for _, parts in table[~whole].groupby("account"):
        assert parts["p_holm"].tolist() == holm(parts["p_value"]).tolist()


def test_a_part_that_is_an_arm_minus_the_control_is_that_arm_in_the_decisions() -> None:
    parts = attribution(trials(NOISE), 0.95).query("part == 'noise gradient in the trunk'")
    arms = decide(trials(NOISE), 1.0, 0.95, {"p7b1": "noise", "p7b2": "split"}).query("arm == 'noise'")
    effects, deltas = ["effect_pp", "effect_lo", "effect_hi"], ["delta_pp", "delta_lo", "delta_hi"]
    assert parts[effects].to_numpy().tolist() == arms[deltas].to_numpy().tolist()


def without(table: pd.DataFrame, arm: str, seeds: range) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The trials that are left when some of an arm failed, and those."""
    failed = (table["phase"] + "/" + table["arm"] == arm) & table["seed"].isin(seeds)
    return table[~failed], table[failed][["phase", "arm", "seed"]]


def test_a_contrast_is_over_the_seeds_that_all_its_arms_finished() -> None:
    table, names = trials(NOISE), ["account", "part"]
    every = attribution(table, 0.95).set_index(names)
    fewer = attribution(table[table["seed"] != 2], 0.95).set_index(names)
    kept, failed = without(table, "p7b2/split_thresholds", range(2, 3))
    found = attribution(kept, 0.95, failed).set_index(names)
    concerned = ["p7b2/split_thresholds" in contrast for contrast in found["contrast"]]
    assert any(concerned) and not all(concerned)
    for rows, expected in ((concerned, fewer), (~np.array(concerned), every)):
        columns = ["n_seeds", "effect_pp", "effect_lo", "effect_hi", "p_value"]
        pd.testing.assert_frame_equal(found.loc[rows, columns], expected.loc[rows, columns])


def test_a_contrast_that_no_seed_finished_is_blank_and_counts_for_holm() -> None:
    table = trials(NOISE)
    kept, failed = without(table, "p7b1/noise_acting", range(SEEDS))
    whole, found = attribution(table, 0.95), attribution(kept, 0.95, failed)
    blank = found["n_seeds"] == 0
    assert found[blank]["part"].tolist() == ["a head deciding, not the labels", WHOLE]
    assert found.loc[blank, ["effect_pp", "effect_lo", "effect_hi", "p_value", "p_holm"]].isna().all().all()
    worst = whole["p_value"].mask(blank, 1)[(found["account"] == "p7b1") & (found["part"] != WHOLE)]
    assert found["p_holm"][worst.index].dropna().tolist() == holm(worst).tolist()[:-1]


@pytest.mark.parametrize("arm", [arm for arm in NEEDED if arm != CONTINUED])
def test_an_arm_that_is_missing_is_named(arm: str) -> None:
    table = trials(NOISE)
    with pytest.raises(UserError, match=f"needs the arm {arm}: it has no trials"):
        attribution(table[table["phase"] + "/" + table["arm"] != arm], 0.95)
