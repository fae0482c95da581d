"""What is said of a signal follows from its scores over the seeds: better than chance, or not shown to be."""

import numpy as np
import pandas as pd
import pytest

from phasegate.errors import UserError
from phasegate.report import drawing, signal_plots, signal_tables
from phasegate.signal_summary import COLUMNS, beats_chance, signal_summary

NAN = float("nan")


def scores(seeds: int = 10) -> pd.DataFrame:
    """A signal that knows what removals do, one that draws, one that ranks nothing, and one about splits alone."""
    draws = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        chance = {f"chance_{gone}": 0.1 * gone + 0.001 * seed for gone in (1, 2, 4)}
        for signal, correlation, share in (
            *(("random_labels", 0.0, 1.0), ("usage_frequency", 0.8, 0.2)),
            *(("zero_hits", None, 1.0), ("gradmax", NAN, NAN), ("measured_change", 0.9, 0.1)),
        ):
            noise = draws.normal(0, 0.1, 2)
            found = 0.0 if correlation is None else correlation + noise[0]
            regrets = {f"regret_{gone}": share * chance[f"chance_{gone}"] * (1 + noise[1]) for gone in (1, 2, 4)}
            if correlation is None:
                regrets = {f"regret_{gone}": chance[f"chance_{gone}"] for gone in (1, 2, 4)}
            grow = NAN if correlation is None else draws.normal(0, 0.3)
            rows.append(
                {"signal": signal, "seed": seed, "spearman_prune": found, "spearman_recovered": found / 2}
                | {"spearman_grow": grow, "seconds": 0.5, **regrets, **chance}
            )
    return pd.DataFrame(rows)


def summary(seeds: int = 10) -> pd.DataFrame:
    return signal_summary(scores(seeds), 0.95)


DECISIONS = pd.DataFrame(
    {
        "phase": phase,
        "arm": arm,
        "primary": arm == "counterfactual_head",
        "n_seeds": 10,
        "n_failed": 0,
        "train_seconds": seconds,
    }
    | {"delta_pp": delta, "delta_lo": delta - half, "delta_hi": delta + half}
    for phase, arm, delta, half, seconds in (
        *(("p7a", "continue", 0.0, 0.0, 5.0), ("p7b4", "counterfactual_head", 0.0, 0.0, 6.0)),
        *(("p7b4", "oracle", 0.9, 0.2, 20.0), ("p7b4", "frequency", -0.9, 0.2, 5.0), ("p7b4", "keep", 0.1, 0.2, 6.0)),
    )
)
SURGERIES = pd.DataFrame(
    [("p7b4", "oracle", 0, "split"), ("p7b4", "oracle", 0, "remove"), ("p7b4", "oracle", 3, "split")],
    columns=["phase", "arm", "seed", "operation"],
)


def test_the_summary_has_a_row_per_signal_with_the_means_of_its_seeds() -> None:
    table, given = summary(), scores()
    assert list(table.columns) == COLUMNS and list(table["signal"]) == list(given["signal"].unique())
    row = table.set_index("signal").loc["usage_frequency"]
    runs = given[given["signal"] == "usage_frequency"]
    assert row["spearman_prune"] == pytest.approx(runs["spearman_prune"].mean())
    assert row["saved_4"] == pytest.approx((runs["chance_4"] - runs["regret_4"]).mean())
    assert row["regret_4_lo"] < row["regret_4"] < row["regret_4_hi"] and row["n_seeds"] == 10


def test_only_what_is_better_than_chance_is_said_to_be() -> None:
    found = {
        name: [row.signal for row in summary().itertuples() if beats_chance(row, name, 0.95)]
        for name in ("spearman_prune", "spearman_grow", "regret_1", "regret_4")
    }
    knowing = ["usage_frequency", "measured_change"]
    assert found == {"spearman_prune": knowing, "spearman_grow": [], "regret_1": knowing, "regret_4": knowing}


def test_a_signal_that_is_worse_than_chance_does_not_beat_it() -> None:
    given = scores()
    given[["spearman_prune", "spearman_recovered"]] *= -1
    rows = signal_summary(given, 0.95).itertuples()
    assert not any(beats_chance(row, "spearman_prune", 0.95) for row in rows)


def test_chance_findings_are_corrected_for_the_number_of_signals() -> None:
    """Of a hundred signals that know nothing, about five would pass an uncorrected test."""
    draws, one = np.random.default_rng(1), scores().query("signal == 'random_labels'")
    many = pd.concat(one.assign(signal=f"s{n}", spearman_prune=draws.normal(0, 0.3, 10)) for n in range(100))
    assert sum(beats_chance(row, "spearman_prune", 0.95) for row in signal_summary(many, 0.95).itertuples()) == 0


def test_what_a_signal_does_not_speak_of_is_blank_and_one_seed_shows_nothing() -> None:
    rows = summary().set_index("signal")
    assert rows.loc["gradmax", ["spearman_prune", "regret_1", "saved_4", "p_regret_2"]].isna().all()
    assert rows.loc["zero_hits", "p_spearman_prune"] == 1
    assert not any(beats_chance(row, "spearman_prune", 0.95) for row in summary(1).itertuples())


def test_the_findings_name_who_beats_chance_what_it_costs_and_whether_acting_pays() -> None:
    prune, _, grow, cost, *arms = signal_tables.signal_findings(summary(), DECISIONS, SURGERIES, 0.95)
    better, rest = prune.split("; not shown to be for ")
    assert "measured change 0.9" in better and "usage frequency 0." in better and "random labels" in rest
    assert "no signal's rank correlation is shown to be better than chance" in grow and "zero hits" not in grow
    assert grow.endswith("so this tells no signals apart.") and "tells no signals apart" not in prune
    assert cost.index("measured change") < cost.index("usage frequency") < cost.index("random labels")
    assert "chance costs 0.40" in cost and cost.index("not shown to cost less") < cost.index("random labels")
    assert cost.split("not shown to cost less than chance, ")[1].count("[") == 2
    said = dict(zip(DECISIONS["arm"][1:], arms, strict=True))
    assert "operated not once in 10 seeds and equals the fixed" in said["counterfactual_head"]
    assert said["counterfactual_head"].startswith("Self-modification on ground truth")
    assert "operated 3 times in 2 of 10 seeds (2 × split, 1 × remove) and beats the fixed" in said["oracle"]
    assert "is worse than the fixed" in said["frequency"] and "neither beats nor loses to" in said["keep"]
    assert "+0.90 pp [+0.70, +1.10], at 20 s a trial instead of 5 s" in said["oracle"]


def test_an_arm_of_which_trials_failed_says_so() -> None:
    failed = DECISIONS.set_index("arm")
    failed.loc["oracle", ["n_seeds", "n_failed", "delta_pp", "delta_lo", "delta_hi"]] = [0, 10, NAN, NAN, NAN]
    failed.loc["frequency", ["n_seeds", "n_failed"]] = 9, 1
    oracle, frequency = signal_tables.acting_findings(failed.reset_index(), SURGERIES)[1:3]
    assert oracle == "Arm `oracle`: all 10 trials failed."
    assert "not once in 9 seeds" in frequency and frequency.endswith("instead of 5 s; 1 of 10 trials failed.")
    failed = DECISIONS.set_index("arm")
    failed.loc["continue", "n_failed"] = 1  # then it may have operated in seeds that the decisions leave out
    assert "3 times in 2 seeds (" in signal_tables.acting_findings(failed.reset_index(), SURGERIES)[1]


def test_the_titles_count_the_signals_that_beat_chance() -> None:
    def title(text: str) -> str:
        return text.replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ")

    table = summary()
    correlations = title(signal_plots.signals(table, 0.95).get_suptitle())
    assert correlations.startswith(
        "1 of 3 signals tell better than chance what a removal does at once, usage frequency"
    )
    assert correlations.endswith("0 of 3 signals tell better than chance what a split does after training")
    assert "1 of 3 signals choose better than chance; usage frequency costs least" in title(
        signal_plots.regret(table, 0.95).get_suptitle()
    )
    none = signal_plots.regret(table.query("signal == 'gradmax'"), 0.95).get_suptitle()
    assert none == "No signal could be asked to let 4 experts go"


@pytest.mark.parametrize("seeds", [1, 10])
def test_equal_scores_give_equal_figures(seeds: int) -> None:
    for figure in (signal_plots.signals, signal_plots.regret):
        assert drawing.svg(figure(summary(seeds), 0.95)) == drawing.svg(figure(summary(seeds), 0.95))


def test_figures_without_signals_say_so() -> None:
    with pytest.raises(UserError, match="nothing to plot"):
        signal_plots.signals(summary().head(0), 0.95)
