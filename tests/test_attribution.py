"""Each part of an account is the effect that it is named after, and what harms is told from what was done."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phasegate.base.errors import UserError
from phasegate.params import load_params
from phasegate.params.names import CONTINUED
from phasegate.verdicts.attribution import ACCOUNTS, ADDING, BOTH, CHOOSING, REMOVING, attribution
from phasegate.verdicts.attribution import attribution_findings as findings
from phasegate.verdicts.statistics import holm, mean_interval
from tests.small_study import ROOT
from tests.test_decisions import NONE, failing, trials_of

CONTRASTS = {(name, part): weights for name, account in ACCOUNTS.items() for part, weights in account.items()}
NEEDED = sorted({arm for contrast in CONTRASTS.values() for arm in contrast})
SEEDS = 4
EFFECT = ["effect_pp", "effect_lo", "effect_hi"]
Rows = list[tuple[str, int, int, int | None]]


def logs(**arms: list[Rows]) -> pd.DataFrame:
    """The logs of surgeries of arms (`phase__arm`), by seed: operation, block, expert and parent of each."""
    columns = ["phase", "arm", "seed", "operation", "block", "expert", "parent"]
    rows = [(*key.split("__"), seed, *row) for key, log in arms.items() for seed, of in enumerate(log) for row in of]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(n_routed_before=9, n_routed_after=10 - 2 * table["operation"].isin(["remove", "merge"]))


def splits(n: int) -> Rows:
    return [("split", 0, 12 + i, i) for i in range(n)]


def removals(n: int) -> Rows:
    return [("remove", 0, i, None) for i in range(n)]


LOGS = logs(
    p7b1__grow=[splits(n) for n in (1, 2, 3, 4)],
    p7b1__prune=[removals(n) for n in (0, 2, 4, 4)],
    p7b1__random_acting=[splits(2) + removals(3)] * SEEDS,
    p7b2__split=[splits(2) + removals(3)] * SEEDS,
    p7b2__yoked=[removals(3) + splits(2)] * SEEDS,
)
TRIALS = trials_of(dict(zip(NEEDED, np.random.default_rng(0).normal(80, 3, (len(NEEDED), SEEDS)), strict=True)))
TABLE = attribution(TRIALS, NONE, LOGS, 0.95)


def planted(**lost: list[float]) -> pd.DataFrame:
    """The account of 7b.1, by part, where arms of it lose this much, seed by seed, beside what a seed adds to all."""
    seeds = np.array([80.1, 81.7, 79.4, 80.6])
    trials = trials_of({arm: seeds - lost.get(arm.removeprefix("p7b1/"), 0) for arm in NEEDED})
    return attribution(trials, NONE, LOGS, 0.95).query("account == 'p7b1'").set_index("part")


@pytest.mark.parametrize("key", CONTRASTS, ids=": ".join)
def test_a_contrast_compares_known_arms_and_its_weights_sum_to_zero(key: tuple[str, str]) -> None:
    assert sum(CONTRASTS[key].values()) == 0
    phases = load_params(ROOT / "params.yaml").arms()
    assert set(CONTRASTS[key]) <= {f"{phase}/{arm}" for phase, arms in phases.items() for arm in arms}


def test_the_table_has_every_contrast_in_order_with_corrected_p_values() -> None:
    assert list(zip(TABLE["account"], TABLE["part"], strict=True)) == list(CONTRASTS)
    for _, parts in TABLE.groupby("account"):
        assert parts["p_holm"].tolist() == holm(parts["p_value"]).tolist()


def test_planted_effects_are_found_in_all_and_by_operation() -> None:
    rows = planted(grow=[0.1, 0.2, 0.3, 0.4], prune=[0, 3, 5, 6], random_acting=[2.0] * 4, noise=[1.0] * 4)
    assert rows["effect_pp"].round(6).tolist() == [-0.25, -3.5, -2, -1, 3, 1]
    assert rows.loc[[ADDING, REMOVING, BOTH], "added"].tolist() == [2.5, 0, 2]
    assert rows.loc[[ADDING, REMOVING, BOTH], "removed"].tolist() == [0, 2.5, 1]
    each = rows[["each_pp", "each_lo", "each_hi"]]
    assert list(each.loc[ADDING]) == pytest.approx([-0.1] * 3)
    assert list(each.loc[REMOVING]) == pytest.approx(mean_interval([-1.5, -1.25, -1.5], 0.95))
    assert each.drop([ADDING, REMOVING]).isna().all(axis=None)


def test_choosing_counts_what_it_spared() -> None:
    rows = TABLE.set_index(["account", "part"])
    # both arms grow twice and remove three experts; in one two of them are halves
    assert list(rows.loc[("p7b2", CHOOSING), ["added", "removed"]]) == [0, -2]
    assert list(rows.loc[("p7b4", CHOOSING), ["added", "removed"]]) == [0, 0]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["split", "clone", "remove"]), st.integers(0, 1), st.integers(0, 99))))
def test_whole_families_are_counted_as_a_layer_would(operations: list[tuple[str, int, int]]) -> None:
    layers: list[list[set[int]]] = [[{e} for e in range(3)] for _ in range(2)]  # families of experts
    new, removed, rows = [3, 3], 0, Rows()
    for operation, block, drawn in operations:
        families = layers[block]
        experts = [e for family in families for e in sorted(family)]
        if not experts:
            continue
        chosen = experts[drawn % len(experts)]
        family = next(family for family in families if chosen in family)
        if operation == "remove":
            family.discard(chosen)
            removed += not family
            layers[block] = [family for family in families if family]
            rows.append((operation, block, chosen, None))
            continue
        if operation == "split":
            family.add(new[block])
        else:
            families.append({new[block]})
        rows.append((operation, block, new[block], chosen))
        new[block] += 1
    found = attribution(TRIALS, NONE, logs(p7b1__random_acting=[rows] * SEEDS), 0.95).set_index("part")
    added = sum(operation != "remove" for operation, *_ in rows)
    assert found.loc[BOTH, ["added", "removed"]].to_numpy()[0].tolist() == [added, removed]


@pytest.mark.parametrize(
    ("lost", "harm"),
    [
        ({}, "neither does certain harm"),
        ({"grow": 2}, "adding, by splits, does the harm, and removing none that is certain"),
        ({"prune": 2}, "removing does the harm, and adding, by splits, none that is certain"),
        ({"grow": 1, "prune": 2}, "adding and removing both do harm"),
        ({"grow": -2, "prune": 2}, "removing does the harm, and adding, by splits, none that is certain"),
    ],
)
def test_the_finding_tells_which_of_adding_and_removing_does_the_harm(lost: dict[str, float], harm: str) -> None:
    noise = np.array([0.1, -0.1, 0.05, -0.05])
    study = trials_of({arm: 80 - lost.get(arm.removeprefix("p7b1/"), 0) + noise * (arm != CONTINUED) for arm in NEEDED})
    first, _, third = findings(attribution(study, NONE, LOGS, 0.95), 0.95)
    assert first.startswith("7b.1, random labels: adding alone, ") and f"; {harm}; choosing the experts" in first
    assert "by 2.5 added experts (" in first and "by 2.5 whole families removed (" in first
    assert third == "7b.4, usage: choosing the experts and not drawing them, 0.00 pp [0.00, 0.00], not certain (Holm)."


def test_a_contrast_is_over_the_seeds_that_all_its_arms_finished() -> None:
    columns, fewer = ["n_seeds", *EFFECT, "p_value"], attribution(TRIALS[TRIALS["seed"] != 2], NONE, LOGS, 0.95)
    found = attribution(*failing("p7b2/yoked/2", study=TRIALS), LOGS, 0.95)
    concerned = found["contrast"].str.contains("p7b2/yoked")
    assert concerned.sum() == 1
    pd.testing.assert_frame_equal(found[columns], fewer[columns].where(concerned, TABLE[columns]))


def test_a_contrast_that_no_seed_finished_is_blank_and_counts_for_holm() -> None:
    found = attribution(*failing(*(f"p7b1/yoked/{seed}" for seed in range(SEEDS)), study=TRIALS), LOGS, 0.95)
    blank = found["n_seeds"] == 0
    assert found[blank]["part"].tolist() == [CHOOSING]
    assert found.loc[blank, [*EFFECT, "p_value", "p_holm"]].isna().all(axis=None)
    worst = TABLE["p_value"].mask(blank, 1)[found["account"] == "p7b1"]
    assert found["p_holm"][worst.index].dropna().tolist() == holm(worst).tolist()[:-1]
    assert "choosing the experts and not drawing them, no seed finished." in findings(found, 0.95)[0]


@pytest.mark.parametrize("arm", [arm for arm in NEEDED if arm != CONTINUED])
def test_an_arm_that_is_missing_is_named(arm: str) -> None:
    with pytest.raises(UserError, match=f"needs the arm {arm}: it has no trials"):
        attribution(TRIALS[TRIALS["phase"] + "/" + TRIALS["arm"] != arm], NONE, LOGS, 0.95)
