"""What is said of a signal follows from its scores over the seeds: better than chance, or not shown to be."""

import numpy as np
import pandas as pd
import pytest

from phasegate.verdicts import signal_summary as signals
from phasegate.verdicts.decisions import Decision, word
from phasegate.verdicts.signal_summary import beats_chance, signal_summary

NAN = float("nan")
# rank correlation, and regret as a share of what chance costs; the second signal knows, the third ranks nothing
SIGNALS = {"random_labels": (0.0, 1.0), "usage_frequency": (0.8, 0.2), "zero_hits": (0.0, 1.0)}
SIGNALS |= {"gradmax": (NAN, NAN), "measured_change": (0.9, 0.1)}
AREAS = {"random_labels": 0.5, "usage_frequency": 1.0, "zero_hits": 0.5, "gradmax": NAN, "measured_change": 0.0}
# arms with their difference from the control, and half its interval
ARMS = {"p7a/continue": (0.0, 0.0), "p7b4/counterfactual_head": (0.0, 0.0), "p7b4/oracle": (0.9, 0.2)}
ARMS |= {"p7b4/frequency": (-0.9, 0.2), "p7b4/keep": (0.1, 0.2)}
ACTED = pd.DataFrame({"phase": "p7b4", "arm": "oracle", "seed": [0, 0, 3], "operation": ["split", "remove", "split"]})


def scores(seeds: int = 10) -> pd.DataFrame:
    """Scores of these signals, with noise but for the signal that ranks nothing."""
    draws, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        for signal, (correlation, share) in SIGNALS.items():
            noise = draws.normal(0, 0.1, 2) * (signal != "zero_hits")
            row = {"signal": signal, "seed": seed, "spearman_prune": correlation + noise[0]}
            row |= {"auc_dead": AREAS[signal]}
            row |= {"spearman_recovered": (correlation + noise[0]) / 2}
            row |= {"spearman_grow": NAN if signal == "zero_hits" else draws.normal(0, 0.3)}
            for gone in (1, 2, 4):
                chance = 0.1 * gone + 0.001 * seed
                row |= {f"chance_{gone}": chance, f"regret_{gone}": share * chance * (1 + noise[1])}
            rows.append(row)
    return pd.DataFrame(rows)


GIVEN = scores()
SUMMARY = signal_summary(GIVEN, 0.95)


def decisions(**failed: tuple[int, int]) -> pd.DataFrame:
    """Decisions on 7b.4, with other numbers of finished and failed trials by arm."""
    rows = []
    for key, (delta, half) in ARMS.items():
        phase, arm = key.split("/")
        row = Decision(phase, arm, arm == "counterfactual_head", *failed.get(arm, (10, 0)))
        row = row._replace(delta_pp=delta, delta_lo=delta - half, delta_hi=delta + half, margin_pp=1.0)
        row = row._replace(worst_delta=delta, nll_delta=0.0, operations=float(half > 0))
        rows.append(row._replace(word=word(row)))
    return pd.DataFrame(rows)


def test_the_summary_has_a_row_per_signal_with_the_means_of_its_seeds() -> None:
    assert list(SUMMARY.columns) == signals.COLUMNS and list(SUMMARY["signal"]) == list(GIVEN["signal"].unique())
    row = SUMMARY.set_index("signal").loc["usage_frequency"]
    runs = GIVEN[GIVEN["signal"] == "usage_frequency"]
    assert row["spearman_prune"] == pytest.approx(runs["spearman_prune"].mean())
    assert row["saved_4"] == pytest.approx((runs["chance_4"] - runs["regret_4"]).mean())
    assert row["regret_4_lo"] < row["regret_4"] < row["regret_4_hi"] and row["n_seeds"] == 10


def test_only_what_is_better_than_chance_is_said_to_be() -> None:
    found = {
        name: [row.signal for row in SUMMARY.itertuples() if beats_chance(row, name, 0.95)]
        for name in ("spearman_prune", "spearman_grow", "regret_1", "regret_4")
    }
    knowing = ["usage_frequency", "measured_change"]
    assert found == {"spearman_prune": knowing, "spearman_grow": [], "regret_1": knowing, "regret_4": knowing}
    worse = GIVEN.assign(spearman_prune=-GIVEN["spearman_prune"])
    assert not any(beats_chance(row, "spearman_prune", 0.95) for row in signal_summary(worse, 0.95).itertuples())


def test_chance_findings_are_corrected_for_the_number_of_signals() -> None:
    """Of a hundred signals that know nothing, about five would pass an uncorrected test."""
    draws, one = np.random.default_rng(1), scores().query("signal == 'random_labels'")
    many = pd.concat(one.assign(signal=f"s{n}", spearman_prune=draws.normal(0, 0.3, 10)) for n in range(100))
    assert sum(beats_chance(row, "spearman_prune", 0.95) for row in signal_summary(many, 0.95).itertuples()) == 0


def test_the_second_truth_has_a_chance_and_bounds_of_its_own() -> None:
    better, worse, rest = signals.signal_findings(SUMMARY, decisions(), ACTED, 0.95)[3].removesuffix(".").split("; ")
    assert better.endswith("ROC curve, above chance (0.50) for usage frequency 1.00 [1.00, 1.00]")
    assert worse == "below it for measured change 0.00 [0.00, 0.00]"
    assert rest == "not shown to differ from it for random labels 0.50 [0.50, 0.50], zero hits 0.50 [0.50, 0.50]"
    mute = signal_summary(GIVEN.query("signal == 'gradmax'"), 0.95)
    assert signals.signal_findings(mute, decisions(), ACTED, 0.95)[3].endswith("curve, which no signal has.")
    noisy = signal_summary(GIVEN.assign(auc_dead=np.tile([0.9, 1.0], 50)[: len(GIVEN)]), 0.95).set_index("signal")
    assert noisy["auc_dead_hi"]["zero_hits"] < 1 and beats_chance(next(noisy.itertuples()), "auc_dead", 0.95)
    two = signal_summary(scores(2).assign(auc_dead=[0.4, 0.9, 1, 1, 1, 1, 1, 1, 1, 1]), 0.95)
    assert (two["auc_dead_lo"][0], two["auc_dead_hi"][0]) == (0, 1) and not beats_chance(two.iloc[0], "auc_dead", 0.95)
    assert np.isinf(signal_summary(scores(1), 0.95)["auc_dead_hi"][0])
    cells = signals.signal_cells(SUMMARY, 0.95)
    assert all(len(row) == 9 for row in cells) and "1.00 [1.00, 1.00] *" in cells[1].values()


def test_what_was_not_measured_is_blank_and_one_seed_shows_nothing() -> None:
    rows = SUMMARY.set_index("signal")
    assert rows.loc["gradmax", ["spearman_prune", "auc_dead", "regret_1", "saved_4", "p_regret_2"]].isna().all()
    assert rows.loc["zero_hits", "p_spearman_prune"] == 1
    assert not any(beats_chance(row, "spearman_prune", 0.95) for row in signal_summary(scores(1), 0.95).itertuples())


def test_the_findings_name_who_beats_chance_and_whether_acting_pays() -> None:
    prune, _, grow, _, cost, *arms = signals.signal_findings(SUMMARY, decisions(), ACTED, 0.95)
    better, rest = prune.split("; not shown to be for ")
    assert "measured change 0.9" in better and "usage frequency 0." in better and "random labels" in rest
    assert "no signal's rank correlation is shown to be better than chance" in grow and "zero hits" not in grow
    assert grow.endswith("so this distinguishes no signals.") and "distinguishes no signals" not in prune
    assert cost.index("measured change") < cost.index("usage frequency") < cost.index("random labels")
    assert "chance costs 0.40" in cost and cost.index("not shown to cost less") < cost.index("random labels")
    assert cost.split("not shown to cost less than chance, ")[1].count("[") == 2
    head, oracle, frequency, keep = arms
    assert "operated not once in 10 seeds and equals the fixed" in head
    assert head.startswith("Self-modification on ground truth")
    assert "operated 3 times in 2 of 10 seeds (2 × split, 1 × remove) and beats the fixed" in oracle
    assert "+0.90 pp [+0.70, +1.10]." in oracle
    assert "is worse than the fixed" in frequency and "neither beats nor loses to" in keep


def test_an_arm_with_failed_trials_says_so() -> None:
    _, oracle, frequency, _ = signals.acting_findings(decisions(oracle=(0, 10), frequency=(9, 1)), ACTED)
    assert oracle == "Arm `oracle`: all 10 trials failed."
    assert "not once in 9 seeds" in frequency and frequency.endswith("; 1 of 10 trials failed.")
    table = decisions(**{"continue": (10, 1)})  # then it may have operated in seeds that the decisions leave out
    assert "3 times in 2 seeds (" in signals.acting_findings(table, ACTED)[1]


def test_the_titles_count_the_signals_that_beat_chance() -> None:
    first, _, grow, dead = signals.correlation_finding(SUMMARY, 0.95).split("; ")
    assert first == "1 of 3 signals predict better than chance what a removal does immediately, usage frequency best"
    assert dead == "1 of 3 score killed experts below living ones"
    assert grow == "0 of 3 signals predict better than chance what a split does after training"
    title = signals.regret_title(SUMMARY, 0.95)
    assert "1 of 3 signals choose better than chance; usage frequency costs least" in title
    nothing = SUMMARY.query("signal == 'gradmax'")
    assert signals.regret_title(nothing, 0.95) == "No signal could choose 4 experts to remove"
