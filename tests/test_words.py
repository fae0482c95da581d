"""Every word and every verdict is wrong as rarely as it claims: by simulation, also of skewed differences."""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from phasegate.verdicts.decisions import Decision, decide, verdict, word
from phasegate.verdicts.statistics import mean_interval
from tests.test_decisions import claims_of, rule_of, tables_of, trials_of

MARGIN, GAIN, SPREAD, STUDIES = 0.33, 0.33, 0.5, 1500  # pp, but for the last
SKEWS = {"normal": 0.0, "skewed to losses": -1.0, "skewed to gains": 1.0}  # of most arms in two runs: within 1.3
ASIDE = 0.025  # the share of wrong claims on either side of a 95 % interval
SKEWED = {5: 0.057, 10: 0.053, 20: 0.046}  # on the worse side, of Student's t at skewness 1, from 200,000 other studies
Draw = Callable[[float, float], NDArray[np.float64]]


def drawn(seeds: int, skew: float) -> Draw:
    """A function that draws studies, (studies, seeds), of differences with a mean and a standard deviation."""
    generator = np.random.default_rng([seeds, int(10 * skew) + 100])

    def draw(mean: float, spread: float) -> NDArray[np.float64]:
        if not skew:
            return np.asarray(mean + spread * generator.normal(size=(STUDIES, seeds)))
        shape = 4 / skew**2  # of the gamma distribution with this skewness
        gamma = generator.gamma(shape, size=(STUDIES, seeds))
        return np.asarray(mean + np.sign(skew) * spread * (gamma - shape) / np.sqrt(shape))

    return draw


def rows(accuracy: NDArray[np.float64], nll: NDArray[np.float64] | None = None) -> Iterable[Decision]:
    """The rows of a primary arm with these differences, (studies, seeds), pp and nats."""
    for index, deltas in enumerate(accuracy):
        mean, lo, hi = mean_interval(deltas, 0.95)
        numbers = {"delta_pp": mean, "delta_lo": lo, "delta_hi": hi, "worst_delta": deltas.min()}
        numbers |= {"margin_pp": MARGIN, "gain_pp": GAIN, "margin_nll": 0.01, "operations": 3, "assay_lo": 1}
        further = mean_interval(nll[index], 0.95) if nll is not None else (0.0, 0.0, 0.0)
        numbers |= dict(zip(("nll_delta", "nll_lo", "nll_hi"), further, strict=True))
        row = Decision("p7b2", "split", True, len(deltas), 0, **numbers)
        yield row._replace(word=word(row))


def shares(values: Iterable[str]) -> Counter[str]:
    """How often each occurs, as a share."""
    counts = Counter(values)
    return Counter({name: count / counts.total() for name, count in counts.items()})


def allowed(skew: float, seeds: int) -> tuple[float, float]:
    """How rarely and how often one side may be wrong, with three standard errors of the simulation."""
    share = SKEWED[seeds] if skew else ASIDE
    noise = 3 * np.sqrt(share * (1 - share) / STUDIES)
    return (0 if skew else share - noise), share + noise


@pytest.mark.parametrize("skew", SKEWS.values(), ids=SKEWS)
@pytest.mark.parametrize("seeds", [5, 10, 20])
def test_words_are_wrong_as_rarely_as_they_claim(seeds: int, skew: float) -> None:
    draw, (least, most) = drawn(seeds, skew), allowed(skew, seeds)
    zero = shares(row.word for row in rows(draw(0, SPREAD)))
    assert least <= zero["BETTER"] <= most and least <= zero["WORSE"] <= most
    assert zero["BETTER"] + zero["WORSE"] <= most + ASIDE
    far = shares(row.word for row in rows(draw(-MARGIN, SPREAD)))  # as much harm as counts
    assert far["BETTER"] + far["EQUIVALENT"] + far["NO WORSE"] <= most  # or WORSE, which is right
    above = shares(row.word for row in rows(draw(MARGIN, 0.1 * SPREAD)))  # certainly better
    assert above["BETTER"] > 0.99
    narrow = rows(draw(1.01 * MARGIN, 6 * SPREAD))  # outside of the margin, and wide
    assert shares(row.word for row in narrow)["EQUIVALENT"] <= most


@pytest.mark.parametrize("skew", SKEWS.values(), ids=SKEWS)
@pytest.mark.parametrize("seeds", [5, 10, 20])
def test_verdicts_are_wrong_as_rarely_as_they_claim(seeds: int, skew: float) -> None:
    draw, (least, most) = drawn(seeds, skew), allowed(skew, seeds)
    for claim, edge, wrong in (("gain", 0.0, "GO"), ("gain", GAIN, "NO-GO"), ("harmless", -MARGIN, "GO")):
        found = shares(verdict(row._replace(claim=claim), 0.5) for row in rows(draw(edge, SPREAD)))
        assert least * (claim == wrong) <= found[wrong] <= most, (claim, edge)
    both = rows(draw(-MARGIN, SPREAD), -draw(-0.01, 0.01))  # no harm in either, though only just: two chances to err
    assert shares(verdict(row._replace(claim="harmless"), 0.5) for row in both)["NO-GO"] <= 2 * most
    nll_alone = rows(draw(0, 0.01), -draw(-0.01, 0.01))  # as much harm in NLL as counts
    assert shares(verdict(row._replace(claim="harmless"), 0.5) for row in nll_alone)["GO"] <= most
    harmless, better = rows(draw(0, 0.1), -draw(0, 0.001)), rows(draw(4 * GAIN, SPREAD))  # right ones are reached
    assert shares(verdict(row._replace(claim="harmless"), 0.5) for row in harmless)["GO"] > 0.95
    assert shares(verdict(row._replace(claim="gain"), 0.5) for row in better)["GO"] > 0.9


def test_an_assay_passes_as_rarely_as_it_claims_where_the_winner_wins_by_no_more(seeds: int = 10) -> None:
    generator = np.random.default_rng(seeds)
    arms: dict[str, NDArray[np.float64]] = {"p7a/continue": np.full(seeds, 80.0)}
    for study in range(200):
        arms[f"{study}/lost"] = 79.5 + generator.normal(0, SPREAD, seeds)
        arms[f"{study}/split"] = 80.1 + generator.normal(0, 0.01, seeds)
    phases = [str(study) for study in range(200)]
    claims = {
        phase: claims_of({phase: "split"}, worse=f"{phase}/lost", margin_pp=0.5)[phase] for phase in phases
    }  # the winner wins by exactly the margin
    table = decide(tables_of(trials_of(arms)), claims, rule_of(MARGIN, arms["p7a/continue"]))
    found = shares(table[table["primary"]]["verdict"])
    assert found["NO ASSAY"] + found["GO"] == 1 and 0.002 < found["GO"] < 0.05


def test_one_of_many_exploratory_arms_is_wrongly_called_in_one_study_of_twenty() -> None:
    generator, arms = np.random.default_rng(0), {"p7a/continue": np.full(10, 80.0), "p7a/baseline": np.full(10, 79.0)}
    for study in range(100):
        arms |= {f"{study}/{arm}": 80 + generator.normal(0, SPREAD, 10) for arm in "pabcdef"}
    claims = claims_of({str(study): "p" for study in range(100)})
    table = decide(tables_of(trials_of(arms)), claims, rule_of(MARGIN, arms["p7a/continue"]))
    explored = table[~table["primary"] & (table["phase"] != "p7a")]
    wrong = explored["word"].isin(["BETTER", "WORSE"]).groupby(explored["phase"]).any().mean()
    uncorrected = (explored["p_value"] < 0.05).groupby(explored["phase"]).any().mean()
    assert wrong < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100) and uncorrected > 0.2
