"""The report says what the tables say, renders any study, and gives the same bytes for the same data."""

import re
from functools import cache
from math import nan
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from phasegate.params import load_params
from phasegate.report import drawing, page
from phasegate.report.figures import FIGURES, draw
from phasegate.tools import documents
from phasegate.tools.documents import blocks
from phasegate.verdicts import attribution, surgery_summary, wording
from phasegate.verdicts.decisions import decide
from phasegate.verdicts.leaderboard import leaderboard, reference_rows
from phasegate.verdicts.statistics import column_names
from tests.small_study import ROOT
from tests.test_decisions import NO_SHARE, NONE, RULE, claims_of, rule_of, searched, tables_of, trials_of
from tests.test_story import STORY

PARAMS = load_params(ROOT / "params.yaml")
COMMITTED = {path.stem: pd.read_csv(path) for path in (ROOT / "reports/tables").glob("*.csv")}
DELTAS = {"p7a/continue": 0.0, "p7a/baseline": -1.0, "p7b1/noise_acting": -5.0, "p7b1/a|b_c": 0.0, "p7b2/split": 2.0}
DELTAS |= {"p7b3/task_gates": -0.9, "surgery/split": 0.0, "surgery/clone": -3.0, "surgery/merge": -0.2}
DELTAS |= {"p7c1/small": 0.0, "p7c1/large": 4.0, "p7c1/birth": 2.0, "p7c1/birth_early": 3.0}
ARMS = [key.split("/") for key in DELTAS]
PRIMARY = {"p7b1": "noise_acting", "p7b2": "split", "p7b3": "task_gates", "surgery": "split"}
PRIMARY |= {"p7c1": "birth"}
CLAIMS = claims_of(PRIMARY)
CLAIMS["p7c1"] = CLAIMS["p7c1"].model_copy(update={"control": "p7c1/small", "claim": "gain"})


def tried(seeds: int = 3) -> pd.DataFrame:
    """The trials of a study."""
    return trials_of({key: 67 + delta + 0.1 * np.arange(seeds) * (delta != 0) for key, delta in DELTAS.items()})


@cache
def decided(seeds: int = 3) -> pd.DataFrame:
    """Decisions with a NO-GO (7b.1), a GO (7b.2) and an INCONCLUSIVE (7b.3), if there are three seeds."""
    trials = tried(seeds)
    rule = rule_of(1.0, trials[trials["arm"] == "continue"]["accuracy"])
    return decide(tables_of(trials, idle=["merge"]), CLAIMS, rule)


@cache
def board(seeds: int = 2) -> pd.DataFrame:
    """A leaderboard with three candidates and one reference."""
    runs, references = (searched(names, seeds=seeds) for names in ({"wide": 70, "deep": 68, "plain": 60}, {"cnn": 92}))
    references = references.assign(published_accuracy=94.0)
    tested = references.assign(phase="references", arm="cnn")
    return leaderboard(runs, "wide", "wide", 0.95, reference_rows(references, tested, NO_SHARE, 0.95))


def curves(seeds: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        {"phase": phase, "arm": arm, "seed": seed, "step": step, "accuracy": 60.0 + seed + step - (arm == "clone")}
        | {"n_routed": 12, "dead_experts": 2 * (arm == "clone" and step == 2)}
        | {"routing_entropy": 0.8 + 0.1 * (arm == "noise_acting")}
        for phase, arm in ARMS
        for seed in range(seeds)
        for step in (0, 1, 2)
    )


def routing(experts: int = 4, classes: int = 3) -> pd.DataFrame:
    """Routing in which 7b.1 has lost expert 0 and borne one; its last class has no tokens."""
    return pd.DataFrame(
        {"phase": phase, "arm": arm, "seed": 0, "block": 0, "expert": expert + (phase == "p7b1")}
        | {"class": kind, "tokens": 0 if kind == classes - 1 else expert + kind}
        for phase, arm in ARMS
        for expert in range(experts)
        for kind in range(classes)
    )


SURGERIES = pd.DataFrame(
    {
        "phase": ["p7b2"] * 5 + ["surgery"] * 6,
        "arm": ["split"] * 6 + ["clone"] * 3 + ["merge"] * 2,
        "seed": [0, 1, 0, 1, 2, 0, 0, 0, 1, 0, 0],
        "operation": ["split"] * 2 + ["remove"] * 3 + ["split"] + ["clone"] * 3 + ["split", "merge"],
        "output_change": [1e-9, 3e-9, 0.1, 0.3, 0.2, 0.0, 0.2, 0.4, 0.3, 0.0, 0.05],
        "accuracy_after": 67.0 - np.array([0, 0, 2, 4, 3, 0, 1, 3, 6, 0, 0.5]),
        "recovery_steps": [0, 0, 30, np.nan, np.nan, 0, 20, 20, np.nan, 0, 20],
    }
).assign(step=1, block=0, expert=1, parent=0, n_routed_before=12, n_routed_after=13, accuracy_before=67.0)
HALVES = pd.DataFrame(
    {"phase": "surgery", "arm": "split", "seed": seed, "block": 0, "expert": 12, "parent": 3, "step": 10 * seed}
    | {"smaller_share": share, "weight_distance": 0.1, "output_distance": distance, "swap_loss": 0.01 * seed}
    for seed, share, distance in ((0, 0.5, 0.1), (1, 0.2, 0.2), (2, 0.25, 0.3))
)


def summed(surgeries: pd.DataFrame = SURGERIES) -> pd.DataFrame:
    """The summary of the surgeries above."""
    return surgery_summary.surgery_summary(surgeries, HALVES, curves(), decided(), 0.95)


EXPLAINED = sorted({arm for account in attribution.ACCOUNTS.values() for part in account.values() for arm in part})
LOST = {arm: 3.0 * ("random" in arm) + (7 + 0.1 * np.arange(3)) * (arm == "p7b1/prune") for arm in EXPLAINED}
ATTRIBUTION = attribution.attribution(trials_of({arm: 67 - lost for arm, lost in LOST.items()}), NONE, SURGERIES, 0.95)
GROWTH = pd.DataFrame({"arm": ["small", "large", "birth", "birth_early"], "step": [nan, nan, 300, 100]})
GROWTH = GROWTH.assign(operator=["small", "large", "birth", "birth"], factor=[4, 8, 2, 2], n_seeds=3)
SHARES: dict[str, list[float]] = {"gap_closed": [0, 1, 0.5, 0.75], "slot_ratio": [1, 1, 1.05, 1.05]}
SHARES["lead_pp"] = [2, -2, 0, -1]
for name, values in SHARES.items():
    GROWTH[list(column_names(name))] = [[value, value - 0.1, value + 0.1] for value in values]
LOADS = pd.DataFrame(
    {"phase": phase, "arm": arm, "seed": 0, "step": step, "block": 0, "expert": expert, "share": share}
    for phase, arm in PRIMARY.items()
    for step, shares in ((1, {0: 0.5, 1: 0.5}), (2, {0: 0.5, 2: 0.2, 3: 0.3}))
    for expert, share in shares.items()
)
BORN = pd.DataFrame(
    {"phase": "p7b2", "arm": "split", "seed": 0, "step": 1, "block": 0, "operation": operation, "expert": expert}
    | {"parent": parent, "n_routed_before": 12, "n_routed_after": 11 if operation == "remove" else 13}
    for operation, expert, parent in (("split", 2, 0), ("reinit", 3, np.nan), ("remove", 1, np.nan))
)


def tables(seeds: int = 3, /, **changes: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables of the study above, some of them changed; the others are the committed tables."""
    boards = dict.fromkeys(("leaderboard_q1", "leaderboard_q2"), board(seeds))
    boards |= {"growth": GROWTH} | {name: STORY[name] for name in ("arrival", "repair", "rates")}
    same = {"failures": NONE, "surgeries": SURGERIES, "split_halves": HALVES, "attribution": ATTRIBUTION}
    made = {"decisions": decided(seeds), "surgery_summary": summed(), "curves": curves(seeds), "routing": routing()}
    return COMMITTED | boards | same | made | {"loads": LOADS, "trials": tried(seeds)} | changes


def titles(name: str, **changes: pd.DataFrame) -> list[str]:
    """The titles of a figure: of all of it, and of its panels."""
    figure = draw(name, tables(**changes), PARAMS)
    said = [figure.get_suptitle(), *(axes.get_title(loc="left") for axes in figure.axes)]
    return [text.replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ") for text in said]


def rendered(tmp_path: Path, **changes: pd.DataFrame) -> str:
    """The page of the study above."""
    drawing.save(draw("leaderboard_q1", tables(), PARAMS), tmp_path / "figure")
    svgs = dict.fromkeys(FIGURES, (tmp_path / "figure.svg").read_text())
    claim = PARAMS.decisions.phases["p7b1"].model_copy(update={"hypothesis": "Noise is <b>harmless</b>"})
    decisions = PARAMS.decisions.model_copy(update={"phases": PARAMS.decisions.phases | {"p7b1": claim}})
    params = PARAMS.model_copy(update={"decisions": decisions})
    return page.render(tables(**changes), svgs, params, "mnist1d", {"data": {"sha256": "abc123"}, "seeds": [0, 1]})


def test_numbers_read_well() -> None:
    assert wording.interval(-0.42, -0.91, 0.07, signed=True) == "−0.42 [−0.91, +0.07]"
    assert wording.interval(70.0, -np.inf, np.inf) == "70.00 [no interval]"
    assert wording.number(-0.001, signed=True) == "0.00"
    changes = [surgery_summary.change(value) for value in (0.0, 1.2e-9, 0.0234, 0.996, 1.5)]
    assert changes == ["0 %", "1.2e-09", "2.3 %", "100 %", "150 %"]
    assert [wording.phase_label(phase) for phase in ("p7a", "p7b4", "references")] == ["7a", "7b.4", "references"]


def test_each_finding_agrees_with_its_row() -> None:
    rows = {row.phase: row for row in wording.headline_rows(decided())}
    assert wording.finding(rows["p7b1"]).startswith("NO-GO: noise_acting is WORSE than continue, −4.90 pp [")
    nll = "NLL 0.000 [0.000, 0.000]"
    better = rf"GO: split is BETTER than continue, \+2\.10 pp \[.*\], {re.escape(nll)}"
    assert re.fullmatch(better, wording.finding(rows["p7b2"]))
    near = rows["p7b2"]._replace(delta_pp=0.5, delta_lo=-0.2, delta_hi=0.8, word="EQUIVALENT", nll_delta=-0.0123)
    said = f"GO: split is EQUIVALENT to continue, +0.50 pp [−0.20, +0.80], {nll.replace('0.000 ', '−0.012 ')}"
    assert wording.finding(near) == said
    assert wording.finding(rows["p7b3"]).startswith("INCONCLUSIVE: task_gates is WORSE than continue")
    idle = rows["surgery"]._replace(word="NOTHING DONE", verdict="INCONCLUSIVE")
    said = "INCONCLUSIVE: split never operated and equals continue in every seed (NOTHING DONE)"
    assert wording.finding(idle) == said


def test_an_outcome_says_whether_it_was_expected_and_why_there_is_no_assay() -> None:
    rows = {row.phase: row for row in wording.headline_rows(decided())}
    for phase, remark in (("p7b1", "not as expected"), ("p7b2", "as expected")):
        assert f"(3 seeds; {remark})" in wording.outcome(rows[phase], decided())
    assert "(3 seeds)" in wording.outcome(rows["p7b3"], decided())
    failed = rows["p7b2"]._replace(verdict="NO ASSAY", as_expected="open", assay_pp=0.1, assay_lo=-0.1, assay_hi=0.3)
    said = wording.outcome(failed, decided())
    assert "the assay's better arm against its worse one: +0.10 pp [−0.10, +0.30])" in said


def test_the_rule_names_the_margins_and_what_so_many_seeds_can_decide() -> None:
    text = wording.rule(decided(10), RULE.model_copy(update={"margin": 0.03, "spread_pp": 0.5}))
    assert "The margin is 3 % of the control's error" in text and ": 1.00 pp and 0.0" in text
    assert "surgery without control head" not in text and "fixed order, 7b.1, 7b.2, 7b.3, surgery and 7c.1;" in text
    assert "With 10 seeds a difference that spreads by 0.5 pp" in text and "is known to ±0.36 pp." in text
    assert wording.reach(1, RULE) == "One seed decides nothing."


def test_an_arm_that_spends_more_than_the_control_says_so() -> None:
    control = wording.control_row(decided())._replace(params_total=100.0, flops_per_example=100.0)
    assert wording.spending(control, control) == ""
    row = control._replace(params_total=165.0)
    assert wording.spending(row, control) == ", with 65 % more parameters than continue"
    row = row._replace(flops_per_example=102.0)
    assert wording.spending(row, control) == ", with 65 % more parameters and 2 % more FLOPs per example than continue"


def test_the_attribution_says_what_does_the_harm() -> None:
    first, *_ = attribution.attribution_findings(ATTRIBUTION, 0.95)
    assert "removing alone, −7.10 pp [−7.35, −6.85]; both, −3.00 pp [−3.00, −3.00]; removing does the harm" in first
    assert len(attribution.attribution_cells(ATTRIBUTION)) == len(ATTRIBUTION)


def test_lineages_count_births_and_name_phases_that_changed_nothing() -> None:
    whole, panel = titles("lineage", surgeries=BORN)
    assert panel == "7b.2 split: 2 born, 1 gone, 3 in the end; the busiest takes 50 % of the tokens"
    assert "7b.1, 7b.3, surgery and 7c.1 changed nothing" in whole
    handover = BORN.assign(operation="handover", n_routed_after=14).head(1)  # 0 and 1 hand over to 2 and 3
    left = LOADS[~((LOADS["step"] == 2) & (LOADS["expert"] == 0))]
    assert "7b.2 split: 2 born, 2 gone, 2 in the end" in titles("lineage", surgeries=handover, loads=left)[1]
    (axes,) = draw("lineage", tables(surgeries=BORN), PARAMS).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "1", "3"]  # children below parents


def test_the_markdown_table_has_a_cell_for_every_column_and_bold_primary_arms() -> None:
    text = wording.decisions_markdown(decided(), NONE, CLAIMS, RULE)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1 and len(rows) == 2 + len(ARMS)
    assert r"**noise\_acting**" in text and r"| a\|b\_c |" in text
    assert "- **7b.2** It is so. (Claim: harmless; expected: GO; assay: p7a/continue beats p7a/baseline by" in text


def test_a_hypothesis_stands_in_markdown_as_it_was_written() -> None:
    written = r"<script>a|b</script> *c* `d` [e](f) #1 &lt; ~g~ $h$ \\ i_j"
    claims = CLAIMS | {"p7b2": CLAIMS["p7b2"].model_copy(update={"hypothesis": written})}
    params = PARAMS.model_copy(update={"decisions": PARAMS.decisions.model_copy(update={"phases": claims})})
    texts = [wording.decisions_markdown(decided(), NONE, claims, RULE)]
    texts += documents.claims({"mnist1d": decided()}, params)
    lines = [line for text in texts for line in text.splitlines() if line.startswith("- **7b.2**")]
    assert len(lines) == 2
    for line in lines:
        said = line.removeprefix("- **7b.2** ").partition(". (Claim")[0]
        assert re.sub(r"\\(.)", r"\1", said) == written
        assert not re.search(r"(?<!\\)(\\\\)*[<>|*`\[\]#&~$_]", said)


def test_balanced_accuracy_stands_beside_accuracy_where_classes_are_uneven() -> None:
    even = decided().assign(balanced_accuracy=lambda table: table["accuracy"] + 1e-9)
    assert "balanced" not in wording.decisions_markdown(even, NONE, CLAIMS, RULE)
    assert wording.decision_cells(even.assign(balanced_accuracy=61.234))[0]["balanced accuracy, %"] == "61.23"


def test_classes_have_their_names_in_their_order_in_the_figure(tmp_path: Path) -> None:
    names = ["zebra", "a $x_$ \\{", "antelope of the mountains"]
    named = routing().assign(**{"class": lambda table: table["class"].map(dict(enumerate(names)))})
    figure = draw("expert_routing", tables(routing=named), PARAMS)
    drawing.save(figure, tmp_path / "figure")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [*names[:2], "antelope of the…"]


def rows_by_key(summary: pd.DataFrame) -> dict[tuple[str, str, str], dict[Any, Any]]:
    return {(row["phase"], row["arm"], row["operation"]): row for row in summary.to_dict("records")}


def test_the_summary_of_surgeries_is_over_seeds_and_ends_at_the_decision() -> None:
    rows = rows_by_key(summed())
    assert next(iter(rows)) == ("p7a", "continue", "none") and rows["p7a", "continue", "none"]["surgeries"] == 0
    clone = rows["surgery", "clone", "clone"]
    assert [clone[name] for name in ("surgeries", "output_change", "output_change_max")] == pytest.approx([3, 0.3, 0.4])
    assert (clone["n_seeds"], clone["seeds_operated"]) == (3, 2)
    assert clone["accuracy_lost_lo"] < 2 and clone["accuracy_lost"] == 4.0 and clone["accuracy_lost_hi"] > 6  # 2 and 6
    decision = decided().query("phase == 'surgery' and arm == 'clone'").to_dict("records")[0]
    assert all(clone[name] == decision[name] for name in ("delta_pp", "delta_lo", "delta_hi"))
    assert [clone[f"gate_delta_{name}"] for name in ("pp", "lo", "hi")] == [-1, -1, -1]
    split = {"pairs": 3, "balanced": 2 / 3, "output_distance": 0.2, "swap_loss": 0.01}
    assert {name: rows["surgery", "split", "split"][name] for name in split} == pytest.approx(split)
    assert summed()["pairs"].notna().sum() == 1


def test_the_summary_of_surgeries_leaves_out_seeds_that_the_control_failed() -> None:
    kept = curves().query("arm != 'continue' or seed != 1")
    rows = rows_by_key(surgery_summary.surgery_summary(SURGERIES, HALVES, kept, decided(), 0.95))
    clone = rows["surgery", "clone", "clone"]
    assert (clone["surgeries"], clone["seeds_operated"], clone["accuracy_lost"]) == (2, 1, 2.0)
    assert clone["gate_delta_pp"] == -1 and rows["surgery", "split", "split"]["pairs"] == 2


def test_the_summary_of_surgeries_compares_each_arm_with_its_own_control() -> None:
    grown = SURGERIES.assign(phase="p7c1", arm="birth", operation="birth").head(3)
    points = curves()
    points["accuracy"] -= 5.0 * ((points["phase"] == "p7c1") & (points["arm"] == "small"))
    rows = rows_by_key(surgery_summary.surgery_summary(grown, HALVES, points, decided(), 0.95))
    birth = rows["p7c1", "birth", "birth"]
    assert birth["gate_delta_pp"] == 5 and birth["delta_pp"] == pytest.approx(2.1)


def test_a_surgery_that_never_recovered_counts_in_the_median() -> None:
    rows = rows_by_key(summed())
    assert [rows["p7b2", "split", name]["recovery_steps"] for name in ("remove", "split")] == [np.inf, 0]
    cells = {row["operation"]: row for row in surgery_summary.surgery_cells(summed()) if row["phase"] == "7b.2"}
    assert [cells[name]["median recovery, steps"] for name in ("remove", "split")] == ["never", "0"]
    assert [cells[name]["recovered"] for name in ("remove", "split")] == ["33 %", "100 %"]
    assert [cells[name]["output change"] for name in ("remove", "split")] == ["20 %", "2.0e-09"]


def test_the_finding_on_surgery_has_the_numbers_of_its_rows() -> None:
    growth, merging = surgery_summary.surgery_finding(summed())
    assert "splits end 0.00 pp [0.00, 0.00], each changing the output by 0 % and costing 0.00 pp" in growth
    assert "clones end −2.90 pp [−3.15, −2.65], each changing the output by 30 % and costing 4.00 pp [−21.41," in growth
    assert growth.index("splits") < growth.index("clones")
    assert merging.startswith("After as many splits, 0.333333 merges end −0.10 pp [−0.35, +0.15], each changing the")
    assert surgery_summary.surgery_finding(summed(SURGERIES.head(0))) == []
    assert "1 clones end −2.90 pp [−3.15, −2.65]" in titles("surgery")[0]
    rows = surgery_summary.study_rows(summed())  # growth, and then pruning without the splits before it
    shown = list(zip(rows["arm"], rows["operation"], strict=True))
    assert shown == [("continue", "none"), ("split", "split"), ("clone", "clone"), ("merge", "merge")]


def test_dead_experts_are_reported() -> None:
    found = surgery_summary.dead_finding(curves())
    assert found.startswith("In 3 of the 78 intervals") and "at most 2 at once (phase surgery, clone, seed 2" in found
    assert "every existing expert got tokens" in surgery_summary.dead_finding(curves().query("arm != 'clone'"))


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", FIGURES)
def test_equal_data_gives_equal_figures(name: str, seeds: int, tmp_path: Path) -> None:
    for copy in ("first", "second"):
        drawing.save(draw(name, tables(seeds), PARAMS), tmp_path / copy)
    for kind in ("svg", "png"):
        assert (tmp_path / f"first.{kind}").read_bytes() == (tmp_path / f"second.{kind}").read_bytes()


def test_titles_say_the_verdict_the_ranking_and_where_entropy_ends() -> None:
    assert drawing.unbroken("by 2 pp [1, 3], 4 % of it") == "by 2\xa0pp [1,\xa03], 4\xa0% of it"
    verdicts = [text.split()[1].rstrip(":") for text in titles("learning_curves")[1:]]
    assert verdicts == ["BASELINE", "NO-GO", "GO", "INCONCLUSIVE", "GO", "GO"]
    ends = ["noise_acting: ends at 0.900, above the control", "split: ends at 0.800, the same as the control"]
    assert titles("entropy")[1:3] == [f"7b.1 {ends[0]}", f"7b.2 {ends[1]}"]
    assert "Q1: wide chosen at 71.0" in titles("leaderboard_q1")[0]
    assert "59 of 60 experts kept, 1 born" in routed(60)[2]
    assert "4 of 4 experts kept, 56 born" in routed(60, birth=4)[-2]


def routed(experts: int, **started: int) -> list[str]:
    """The titles of the figure of routing with so many experts at the end; arms started with as many, or others."""
    trials = tried().assign(n_routed_start=lambda table: table["arm"].map(started).fillna(experts))
    return titles("expert_routing", trials=trials, routing=routing(experts, 100))


def test_learning_curves_draw_ways_before_their_variants_and_name_no_others_marks() -> None:
    arms = ["birth", "birth_early", "birth_late", "handover", "large", "reinit", "split", "upcycle"]
    rows = pd.concat(
        [decided().query("phase == 'p7c1' and arm == 'small'")]
        + [decided().query("arm == 'birth'").assign(arm=arm, primary=arm == "birth") for arm in arms]
    )
    points = pd.concat([curves().query("arm == 'birth'").assign(arm=arm) for arm in arms])
    done = {"birth_early": "clone", "upcycle": "upcycle"}
    marks = pd.concat([SURGERIES.head(1).assign(phase="p7c1", arm=arm, operation=way) for arm, way in done.items()])
    figure = draw("learning_curves", tables(decisions=rows, curves=points, surgeries=marks), PARAMS)
    drawn = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
    assert drawn == ["birth", "handover", "large", "reinit", "split", "upcycle"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["upcycle"]


def test_the_page_is_well_formed_self_contained_and_escapes_what_people_wrote(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    assert "On MNIST-1D, 3 seeds per arm. In brackets: 95" in text and "<p><strong>Does adding or" in text
    ids = [element.attrib["id"] for element in ElementTree.fromstring(text).iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert "Noise is &lt;b&gt;harmless" in text and "abc123" in text
    assert all(f">{entry.caption}</figcaption>" in text for entry in FIGURES.values())
    linked = {first or second for first, second in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)}
    assert linked and linked <= set(ids)
    assert not re.search(r'<script|@import|(src|href)="(?!#|data:)', text)


def test_the_documents_tell_the_answer_of_every_study_and_then_one_table() -> None:
    made = blocks({"mnist1d": tables(), "fashion_mnist": tables()}, PARAMS)
    (first, points), (other, _) = made["answer"].split("\n\n"), made["elsewhere"].split("\n\n")
    how = "differences of test accuracy in percentage points (pp), [95 % interval], (verdict):"
    assert first == f"**MNIST-1D**, 3 seeds per arm; {how}"
    assert other.startswith("**Fashion-MNIST**, 3 seeds per arm")
    assert points.startswith("- **Does adding or") and "to 24 at step 300 of 1,500 by births (`birth`)" in points
    header, _, *rows = made["results"].splitlines()
    assert header.endswith("| word | as expected | Fashion-MNIST |") and len(rows) == 6
    assert made["growth"].count("\n") == 5
    assert "| birth | 300 | 50 % [40, 60] | × 2 | 0.00 [−0.10, +0.10] | 1.05" in made["growth"]


def test_a_study_without_surgeries_has_a_figure_and_a_page_too(tmp_path: Path) -> None:
    nothing = {"surgery_summary": summed(SURGERIES.head(0)), "surgeries": SURGERIES.head(0)}
    assert titles("surgery", **nothing) == ["The surgery study has no surgeries to show"]
    assert titles("learning_curves", **nothing)[2].startswith("7b.1 NO-GO")
    assert "No arm had a surgery" in rendered(tmp_path, **nothing)
