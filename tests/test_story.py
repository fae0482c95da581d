"""What is told first is true, whatever the tables say."""

from collections.abc import Iterable
from math import nan
from typing import Any

import numpy as np
import pandas as pd
import pytest

from phasegate.params import load_params
from phasegate.report.growth_plots import gap
from phasegate.report.story import answer, story_cells, story_table
from phasegate.verdicts.arrival import arrival
from phasegate.verdicts.attribution import attribution
from phasegate.verdicts.decisions import decide
from phasegate.verdicts.growth import growth, mean_rates
from phasegate.verdicts.repair import repair
from phasegate.verdicts.wording import measure
from tests.small_study import ROOT
from tests.test_decisions import NONE, tables_of, trials_of

PARAMS = load_params(ROOT / "params.yaml")
CLAIMS = PARAMS.decisions.phases
EFFECTS = {  # pp, of the arms that have any
    "p7a/baseline": -0.1, "p7b1/noise_acting": -3.5, "p7b1/prune": -3.8, "p7b1/random_acting": -3.6, "p7b2/prune": -2.2,
    "p7b1/yoked": -3.4, "p7b3/drowned": -1.9, "surgery/clone": -0.8, "surgery/remove_by_usage": -1.6,
    "p7c1/large": 6.1, "p7c1/birth": 2.8, "p7c1/birth_early": 4.5, "p7c1/birth_late": 1.0, "p7c1/birth_short": 2.6,
    "p7c1/handover": 2.9, "p7c1/upcycle": 2.6, "p7c1/upcycle_carried": 1.6, "p7c1/reinit": 1.2, "p7c1/split": -1.0,
    "p7c2/large": 6.5, "p7c2/measured": 2.1, "p7c2/informed": 2.6, "p7c2/yoked": 1.4, "p7c2/restart": 2.4,
    "p7c2/split": -1.4, "p7c3/removed": 1.1, "p7c3/oracle": 0.9, "p7c3/frequency": -1.0, "p7c3/yoked": -1.9,
}  # fmt: skip
LEVELS = {"p7c1": 74.0, "p7c2": 73.0, "p7c3": 81.0}  # of the controls; 82.5 in 7b
STILL = {"continue", "baseline", "noise", "task_gates", "heads", "drowned", "entropy_loss", "small", "stay", "leave"}
STILL |= {"large", "restart", "sham"}
CONTROLS = ("continue", "small", "stay", "leave")
STEPS = {"birth_early": 100, "birth_late": 600}
GAP = (
    "Of the gap to 24 experts from the start (+6.27 pp [+5.98, +6.56]), it closes 73 % [67, 79] if it grows at step 100"
)
CLOSING = f"gains +2.46 pp [+2.26, +2.66] (GO). At the moment of growth no bit of the output changes. {GAP}, 39 % ["


def tried(seeds: int = 10, /, **effects: float) -> pd.DataFrame:
    """Trials of every arm of the study, with these effects (`phase__arm`), which scatter by half a percentage point."""
    changed, draws = EFFECTS | {key.replace("__", "/"): pp for key, pp in effects.items()}, np.random.default_rng(0)
    levels = {phase: LEVELS.get(phase, 82.5) + draws.normal(size=seeds) for phase in ("p7a", *LEVELS)}
    arms: dict[str, Iterable[float]] = {}
    for phase, names in PARAMS.arms().items():
        for name in names:
            key, level = f"{phase}/{name}", levels.get(phase, levels["p7a"])
            scatter = 0.5 * draws.normal(size=seeds) * (changed.get(key) != 0)
            arms[key] = level if name in CONTROLS else level + changed.get(key, 0.1) + scatter
    arms["p7c3/sham"] = arms["p7a/continue"]
    return trials_of(arms)


def logged(trials: pd.DataFrame, idle: Iterable[str] = ()) -> pd.DataFrame:
    """A log in which every arm that may operate did so once, by an operation that keeps the output."""
    keys = trials[["phase", "arm", "seed"]]
    done = keys[~keys["arm"].isin(STILL) & ~(keys["phase"] + "/" + keys["arm"]).isin(list(idle))].copy()
    done["step"] = done["arm"].map(STEPS).fillna(300).astype(int)
    done["n_routed_before"] = 12
    done["n_routed_after"] = 12 + np.where((done["phase"] == "p7c3") | (done["arm"] == "prune"), -1, 1)
    done["dead"] = done["arm"].isin(["removed", "oracle"])
    blank: dict[str, Any] = {"block": 0, "operation": "split", "expert": 12, "parent": nan}
    found = done[done["arm"].isin(["removed", "oracle"])]
    return pd.concat([done, *[found] * 3]).assign(**blank, output_change=0.0, accuracy_before=80.0, accuracy_after=80.0)


def story_tables(
    seeds: int = 10, idle: Iterable[str] = (), failures: pd.DataFrame = NONE, **effects: float
) -> dict[str, pd.DataFrame]:
    """The tables of a whole study that the story is told from."""
    trials = tried(seeds, **effects)
    gone = pd.MultiIndex.from_frame(failures[["phase", "arm", "seed"]])
    trials = trials[~pd.MultiIndex.from_frame(trials[["phase", "arm", "seed"]]).isin(gone)]
    surgeries = logged(trials, idle)
    made: dict[str, pd.DataFrame] = tables_of(trials, failures) | {"surgeries": surgeries}
    steps = pd.DataFrame({"step": [0, 300, 1500], "slots": [nan, 4.0, 4.2]})
    made["curves"] = trials[["phase", "arm", "seed"]].merge(steps, "cross")
    made["rates"] = pd.DataFrame(
        {"operator": operator, "factor": factor, "seed": seed, "accuracy": 70.0 + factor + seed, "chosen": factor == 2}
        for operator in ("small", "large", "birth", "handover", "upcycle", "upcycle_carried", "reinit", "split")
        for factor in (1, 2, 4, 8)
        for seed in range(3)
    )
    labels = np.arange(200) % 10
    told = {
        f"p7c2/{arm}/seed-{seed}": np.where(np.arange(200) < seed + 10 * (arm == "stay"), 10, labels)
        for arm in CLAIMS["p7c2"].arms
        for seed in range(seeds)
    }
    summary = surgeries[["phase", "arm", "output_change"]].drop_duplicates()
    return {
        **made,
        "decisions": decide(made, CLAIMS, PARAMS.decisions),
        "attribution": attribution(trials, failures, surgeries, 0.95),
        "surgery_summary": summary.rename(columns={"output_change": "output_change_max"}),
        "growth": growth(made, CLAIMS, 0.95),
        "arrival": arrival(labels, told, CLAIMS, PARAMS.p7c2.classes, 0.95),
        "repair": repair(made, CLAIMS, 4 / 12, 0.95),
        "rates": mean_rates(made["rates"], 0.95),
    }


STORY = story_tables()


def told(question: int, **changes: Any) -> str:
    """One paragraph of the answer: on the converged model, on growing, on arriving, or on repairing."""
    return answer(story_tables(**changes) if changes else STORY, PARAMS)[question]


def test_the_first_paragraph_says_which_arms_gain_and_what_does_the_harm() -> None:
    text = told(0)
    question = "**Does adding or removing experts help a model that has converged?"
    start = f"{question} No gain is shown.** Of 25 arms that add or remove experts, "
    assert text.startswith(f"{start}none is shown to be better than the ")
    assert "trained for as many steps, and 7 are worse. " in text
    assert "by random labels or by routing entropy, removing does the harm, and adding, by splits, none" in text
    better = told(0, surgery__merge=3.0, p7b2__clone=2.0)
    assert "2 of 25 arms gain.** Of 25 arms that add or remove experts, 2 are better (`clone` of 7b.2 (+" in better
    one = told(0, p7b2__prune=0.1, p7b2__grow=-3.0, surgery__merge=3.0)
    assert "none is shown" not in better and "1 is better (`merge` of surgery (+" in one
    assert "by random labels, removing does the harm, and adding, by splits, none that is certain; by routing" in one
    idle = [f"{phase}/{arm}" for phase, arms in PARAMS.arms().items() for arm in arms]
    assert told(0, idle=idle).startswith(f"{question} No arm did.** ")


@pytest.mark.parametrize(
    ("effect", "short", "said"),
    [
        (2.8, "Yes.", CLOSING),
        (-2.0, "No, it harms.", "loses: −2.34 pp [−2.54, −2.14] (NO-GO)."),
        (0.34, "No.", "neither gains nor loses more than the margin: 0.00 pp [−0.20, +0.20] (NO-GO)."),
        (0.6, "Yes.", "gains +0.26 pp [+0.06, +0.46] (GO)."),
    ],
)
def test_growing_is_told_by_the_word_of_its_arm(effect: float, short: str, said: str) -> None:
    start = "A model that starts with 4 experts and grows to 24 at step 300 of 1,500 by births (`birth`)"
    text = told(1, p7c1__birth=effect)
    question = f"**Does growing help a model that started too small? {short}**"
    assert text.startswith(f"{question} {start} {said}")


@pytest.mark.parametrize(
    ("effect", "said"), [(1.6, "ahead of routed"), (2.46, "not certainly apart from routed"), (4.0, "behind routed")]
)
def test_the_answer_says_where_births_end_beside_routed_copies(effect: float, said: str) -> None:
    lead = story_tables(p7c1__upcycle=effect)["growth"].set_index("arm").loc["upcycle"]
    end = f" When both grow at step 300, `birth` ends {said} copies (`upcycle`): "
    assert told(1, p7c1__upcycle=effect).endswith(f"{end}{measure(lead, 'lead_pp', 2, True, 'pp')}.")
    early = STORY["growth"].assign(step=STORY["growth"]["step"].mask(STORY["growth"]["arm"] == "upcycle", 100))
    assert "When both grow" not in answer(STORY | {"growth": early}, PARAMS)[1]


def test_without_an_assay_there_is_no_verdict_and_without_a_gap_no_share_of_it() -> None:
    short = "**Does growing help a model that started too small? Not decided.**"
    start = f"{short} For a verdict, `large` had to be certainly more than 2 pp ahead of `small`, and its lead is +1.6"
    end = "] (NO ASSAY). The arm on trial, `birth`, gains +2.46 pp [+2.26, +2.66]."
    text = told(1, p7c1__large=1.5)
    assert text.startswith(start) and text.endswith(end) and text.count(". ") == 1
    assert "Of the gap" not in told(1, p7c1__large=0.0)
    failures = pd.DataFrame({"phase": "p7c1", "arm": "large", "seed": range(10)}).assign(step=7, reason="it is nan")
    assert "ahead of `small`, and no seed finished both (NO ASSAY)." in told(1, failures=failures)
    text = told(3, p7c3__removed=0.0)
    assert "more than 0.5 pp ahead of `leave`, and its lead is 0.00 pp [0.00, 0.00] (NO ASSAY). The arm on" in text
    assert " It removes 100 % [100, 100] of the dead experts, and no living one. Where none is dead, it" in text


def test_failed_and_idle_arms_are_told_as_such() -> None:
    failures = pd.DataFrame({"phase": "p7c1", "arm": "birth", "seed": range(10)}).assign(step=7, reason="it is nan")
    assert "is compared in no seed: all 10 trials failed (NO-GO)." in told(1, failures=failures)
    assert ", though 1 of 10 trials failed (INCONCLUSIVE)." in told(1, failures=failures.head(1))
    text = told(2, idle=["p7c2/measured"], p7c2__measured=0.0)
    assert "arrive? It never acted.** " in text and "It grows in 0 of 10 seeds." in text
    assert "whether growing lowers the loss (`measured`) never acts: 0.00 pp [0.00, 0.00] (INCONCLUSIVE). It " in text
    failures = pd.DataFrame({"phase": "p7c2", "arm": "stay", "seed": range(3)}).assign(step=7, reason="it is nan")
    assert "It grows in 10 of 10 seeds." in told(2, failures=failures)


@pytest.mark.parametrize("fails", [False, True])
def test_an_arm_that_never_grew_closes_no_gap_and_ends_nowhere(fails: bool) -> None:
    failures = pd.DataFrame({"phase": "p7c1", "arm": "birth", "seed": range(10)}).assign(step=7, reason="it is nan")
    tables = story_tables(failures=failures) if fails else story_tables(idle=["p7c1/birth"], p7c1__birth=0.0)
    text = answer(tables, PARAMS)[1]
    assert "When both grow" not in text and (fails or "Of the gap" not in text)
    assert "birth closes" in gap(tables, PARAMS).get_suptitle()


def test_arriving_and_repairing_have_the_numbers_of_their_tables() -> None:
    text = told(2)
    question = "**Does a controller that decides when to grow help when classes arrive? Yes.**"
    assert text.startswith(f"{question} When further classes join the first 5 at step 500, a controller that ")
    assert "It grows in 10 of 10 seeds. Growing when told (`informed`) gains +2.67 pp" in text
    assert "(GO). By classes: +5.00 pp [+5.00, +5.00] on old classes and +5.00 pp [+5.00, +5.00] on new cla" in text
    text = told(3)
    assert text.startswith(
        "**Does finding and removing dead experts help? Yes.** Where 4 of 12 experts are dead "
        "(their weights set to zero), a controller that measures what each removal costs (`oracle`) gains "
    )
    assert "(GO). It removes 100 % [100, 100] of the dead experts, and no living one. Where none is dead, it" in text
    assert text.endswith(" Where none is dead, it removes experts in 0 of 10 seeds (0 % [0, 31]).")


@pytest.mark.parametrize(
    ("lead", "said"),
    [
        ([-0.5, -0.99, -0.1], "is shown: −0.50 pp [−0.99, −0.10]."),
        ([-0.8, -1.0, -0.6], "is not shown: −0.80 pp [−1.00, −0.60]."),
        ([-1.5, -1.99, -1.01], "is refuted: −1.50 pp [−1.99, −1.01]."),
    ],
)
def test_whether_the_controller_is_near_who_was_told_decides_no_verdict(lead: list[float], said: str) -> None:
    table = STORY["arrival"].copy()
    table.loc[(table["arm"] == "informed") & (table["classes"] == "all"), ["lead_pp", "lead_lo", "lead_hi"]] = lead
    text = answer(STORY | {"arrival": table}, PARAMS)[2]
    half = "A second half of the claim decides no verdict: `measured` ends less than 1 pp below `informed`. This"
    assert text.endswith(f" {half} {said}") and "(GO)" in text


def test_the_first_table_shows_every_primary_arm_and_the_other_study_beside_it() -> None:
    decisions, other = STORY["decisions"], story_tables(p7c1__large=1.0)["decisions"]
    keys = dict(story_cells(decisions, PARAMS))
    rows = dict(zip(keys, story_table({"one": decisions, "two": other}, PARAMS), strict=True))
    primary = decisions[decisions["primary"] & (decisions["phase"] != "p7a")]
    assert set(primary["phase"] + "/" + primary["arm"]) <= set(rows)
    birth = rows["p7c1/birth"]
    assert birth["what was done"] == "7c.1: started with 4, grown to 24 by births at step 300"
    shown = ("+2.46 [+2.26, +2.66]", "BETTER (GO)", "yes")
    assert (birth["difference, pp"], birth["word"], birth["as expected"]) == shown
    assert birth["two"] == "+2.46 [+2.26, +2.66], BETTER (NO ASSAY)" and float(birth["worst seed, pp"]) > 2
    unknown = decisions.assign(arm=decisions["arm"].replace({"birth": "mine"}))
    assert dict(story_cells(unknown, PARAMS))["p7c1/mine"]["what was done"] == "7c.1: `mine`"
