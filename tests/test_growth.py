"""What growing, deciding at an arrival, and looking for dead experts are worth: from tables made by hand."""

from math import inf, isnan, nan
from typing import Any

import numpy as np
import pandas as pd
import pytest

from phasegate.params.phases import Claim
from phasegate.verdicts.arrival import arrival
from phasegate.verdicts.growth import growth, mean_rates
from phasegate.verdicts.repair import repair
from phasegate.verdicts.statistics import mean_interval, ratio_interval, share_interval
from tests.test_decisions import claims_of, trials_of

ELSEWHERE = {"elsewhere": "p7a/continue"}


def claims(phase: str, control: str, *arms: str) -> dict[str, Claim]:
    """The claim of one phase whose last arm is the primary."""
    claim = claims_of({phase: arms[-1]})[phase]
    return {phase: claim.model_copy(update={"arms": arms, "control": f"{phase}/{control}"})}


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.2])
def test_fiellers_interval_covers_the_ratio_of_two_means(seeds: int, ratio: float) -> None:
    draws, covered, studies = np.random.default_rng([seeds, int(10 * ratio)]), 0, 2000
    for _ in range(studies):
        gap = 4 + 2 * draws.normal(size=seeds)
        _, lo, hi = ratio_interval(ratio * gap + draws.normal(size=seeds), gap, 0.95)
        covered += lo <= ratio <= hi
    unclear = 0.03 if seeds == 5 else 0  # whose gap is not certain: their bounds are infinite
    assert abs(covered / studies - 0.95) < 3 * np.sqrt(0.95 * 0.05 / studies) + unclear


def test_a_ratio_has_no_bounds_where_the_gap_is_not_certain() -> None:
    assert ratio_interval([1, 2, 3], [2.0, 2, 2], 0.95) == pytest.approx(np.array(mean_interval([1, 2, 3], 0.95)) / 2)
    assert ratio_interval([1, 1, 1], [2, 2, 2], 0.95) == (0.5, 0.5, 0.5)
    assert ratio_interval([2.0, 3, 4], [2.0, 3, 4], 0.95) == pytest.approx((1, 1, 1))
    for gap in ([1.0, -1, 0.5], [-2.0, -2.1, -1.9], [3.0]):
        mean, lo, hi = ratio_interval([1.0] * len(gap), gap, 0.95)
        assert isnan(mean) and (lo, hi) == (-inf, inf)
    assert share_interval(0, 10, 0.95) == pytest.approx((0, 0, 1 - 0.025**0.1))


def test_the_gap_closed_is_paired_and_stands_beside_step_rate_and_slots() -> None:
    arms = {"p7a/continue": [0.0] * 3, "p7a/baseline": [0.0] * 3, "p7c1/small": [60.0, 61, 62]}
    arms |= {"p7c1/large": [64.0, 65, 66], "p7c1/birth": [63.0, 64, 65], "p7c1/birth_early": [64.0, 64, 64]}
    trials = trials_of(arms)
    gone = (trials["arm"] == "birth_early") & (trials["seed"] == 2)
    failures = trials[gone][["phase", "arm", "seed"]].assign(step=1, reason="the loss is nan")
    paces = {"small": [4, 4, 4], "large": [4, 4, 4], "birth": [4, 8, 4], "birth_early": [6, 4, 4]}
    curves = pd.DataFrame(
        {"phase": "p7c1", "arm": arm, "seed": seed, "step": step, "slots": slot}
        for arm, slots in paces.items()
        for seed in range(3)
        for step, slot in zip((0, 10, 20, 40), (nan, *slots), strict=True)
    )
    grown = [("birth", seed, 20) for seed in range(3)] + [("birth_early", seed, 10) for seed in (0, 1)]
    surgeries = pd.DataFrame(grown, columns=["arm", "seed", "step"]).assign(phase="p7c1")
    rates = pd.DataFrame(
        {"operator": operator, "factor": factor, "seed": seed, "accuracy": 70 + factor + seed}
        | {"chosen": factor == best}
        for operator, best in (("small", 4), ("large", 8), ("birth", 2))
        for factor in (2, 4, 8)
        for seed in range(2)
    )
    tables = {"trials": trials[~gone], "failures": failures, "curves": curves, "surgeries": surgeries, "rates": rates}
    rows: Any = growth(tables, claims("p7c1", "small", "small", "large", "birth_early", "birth"), 0.95).set_index("arm")
    assert rows["gap_closed"].to_dict() == pytest.approx({"small": 0, "large": 1, "birth": 0.75, "birth_early": 0.875})
    assert rows.loc["birth", ["gap_closed_lo", "gap_closed_hi"]].tolist() == pytest.approx([0.75, 0.75])
    assert rows["lead_pp"].to_dict() == {"small": 3, "large": -1, "birth_early": -0.5, "birth": 0}
    lead = mean_interval([-1, 0], 0.95)
    assert rows.loc["birth_early", ["lead_pp", "lead_lo", "lead_hi"]].tolist() == pytest.approx(lead)
    assert rows["n_seeds"].tolist() == [3, 3, 2, 3]
    assert rows["operator"].to_dict() == {"small": "small", "large": "large", "birth": "birth", "birth_early": "birth"}
    assert rows["factor"].tolist() == [4, 8, 2, 2]
    assert rows["step"].fillna(-1).tolist() == [-1, -1, 10, 20]
    assert rows["slot_ratio"].to_dict() == pytest.approx({"small": 1, "large": 1, "birth": 1.25, "birth_early": 1.125})
    means = mean_rates(rates.assign(accuracy=rates["accuracy"].mask(rates.index == 0)), 0.95)
    assert means["accuracy"].tolist()[:3] == [73, 74.5, 78.5] and means["n_seeds"].tolist()[:3] == [1, 2, 2]
    assert means[means["chosen"]]["factor"].tolist() == [4, 8, 2]


def test_old_and_new_classes_are_compared_apart() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    wrong = {"stay": ([0], [0]), "measured": ([6, 7], [0, 6]), "large": ([], [])}
    predictions = {}
    for arm, seeds in wrong.items():
        for seed, places in enumerate(seeds):
            predictions[f"p7c2/{arm}/seed-{seed}"] = np.where(np.isin(np.arange(8), places), 9, labels)
    del predictions["p7c2/large/seed-1"]
    predictions["plugins/mine/seed-1"] = predictions["p7c2/measured/seed-1"]
    known = claims("p7c2", "stay", "stay", "large", "measured")
    mine = {"plugins": known["p7c2"].model_copy(update={"arms": ("mine", "elsewhere"), "controls": ELSEWHERE})}
    rows = arrival(labels, predictions, known | mine, 2, 0.95)
    of_mine = rows[rows["arm"] == "plugins/mine"].set_index("classes")
    assert of_mine["accuracy"].to_dict() == pytest.approx({"all": 75, "old": 500 / 6, "new": 50})
    table = rows.drop(index=rows.index[-3:]).set_index(["arm", "classes"])
    assert table["accuracy"].to_dict() == pytest.approx(
        {("stay", "old"): 100 * 5 / 6, ("stay", "new"): 100, ("large", "old"): 100, ("large", "new"): 100}
        | {("measured", "old"): 100 * 11 / 12, ("measured", "new"): 25}
        | {("stay", "all"): 87.5, ("large", "all"): 100, ("measured", "all"): 75}
    )
    leads = {("stay", "all"): -12.5, ("stay", "new"): -75, ("large", "all"): -25, ("measured", "all"): 0}
    assert {key: table["lead_pp"].to_dict()[key] for key in leads} == leads
    bounds = table["lead_lo"]["stay", "new"], table["lead_hi"]["stay", "new"]
    assert bounds == pytest.approx(mean_interval([-100, -50], 0.95)[1:])
    deltas = table["delta_pp"].to_dict()
    assert deltas["measured", "old"] == pytest.approx(100 / 12) and deltas["measured", "new"] == -75
    assert table["worst_delta"]["measured", "new"] == -100 and table["n_seeds"]["large", "old"] == 1
    assert set(arrival(labels, predictions, claims("p7c2", "stay", "stay"), 9, 0.95)["classes"]) == {"all", "old"}


def test_found_and_false_removals_are_counted_by_seed() -> None:
    arms = ("p7c3/leave", "p7c3/oracle", "p7c3/sham", "plugins/oracle", "plugins/elsewhere")
    trials = trials_of(dict.fromkeys(arms, [50.0] * 4))  # 12 experts, 4 of them dead
    removal: dict[str, Any] = {"phase": "p7c3", "n_routed_before": 12, "n_routed_after": 11}
    done = [("oracle", seed, True) for seed in (0, 0, 0, 0, 1, 1, 2)] + [("oracle", 1, False), ("sham", 3, False)]
    surgeries = pd.DataFrame({"arm": arm, "seed": seed, "dead": dead} | removal for arm, seed, dead in done)
    grown = {"phase": "p7c3", "arm": "oracle", "seed": 3, "dead": False, "n_routed_before": 11, "n_routed_after": 12}
    of_mine = surgeries[surgeries["arm"] == "oracle"].head(3).assign(phase="plugins")
    surgeries = pd.concat([surgeries, pd.DataFrame([grown]), of_mine])
    known = claims("p7c3", "leave", "leave", "oracle", "sham")
    mine = {"plugins": known["p7c3"].model_copy(update={"arms": ("oracle", "elsewhere"), "controls": ELSEWHERE})}
    table: Any = repair({"trials": trials, "surgeries": surgeries}, known | mine, 4 / 12, 0.95).set_index("arm")
    assert table.loc["plugins/oracle", ["dead", "found", "false"]].tolist() == [4, 0.75 / 4, 0]
    table = table.drop("plugins/oracle")
    assert table["dead"].to_dict() == {"leave": 4, "oracle": 4, "sham": 0}
    assert table["found"].fillna(-1).to_dict() == {"leave": 0, "oracle": (1 + 0.5 + 0.25 + 0) / 4, "sham": -1}
    assert table["false"].to_dict() == {"leave": 0, "oracle": 0.25, "sham": 0.25}
    assert table["false_share"].to_dict() == pytest.approx({"leave": 0, "oracle": 0.25 / 8, "sham": 0.25 / 12})
    assert table["operations"].to_dict() == {"leave": 0, "oracle": 9 / 4, "sham": 0.25}
    assert table["acting"].to_dict() == {"leave": 0, "oracle": 1, "sham": 0.25}
    assert table.loc["sham", ["acting_lo", "acting_hi"]].tolist() == pytest.approx([0.0063, 0.8059], abs=1e-4)
    assert table.loc["sham", ["false_lo", "operations_lo"]].tolist() == [0, 0]
    found = mean_interval([1, 0.5, 0.25, 0], 0.95)
    assert found[1] < 0 and found[2] > 1 and table.loc["oracle", ["found_lo", "found_hi"]].tolist() == [0, 1]
    lone: Any = repair({"trials": trials[trials["seed"] == 0], "surgeries": surgeries}, known, 4 / 12, 0.95)
    assert lone.set_index("arm").loc["oracle", ["found_lo", "found_hi"]].tolist() == [-inf, inf]
