"""Tell the answer first: what came out in plain words, and one table of what was done.

Each sentence is made from rows of the tables, and says no more than their words do.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from phasegate.params import Params
from phasegate.params.names import START
from phasegate.verdicts import arrival, growth, repair, wording
from phasegate.verdicts import decisions as words
from phasegate.verdicts.attribution import ADDING, REMOVING, SIGNALS, harm
from phasegate.verdicts.decisions import Decision, decision_rows, of_arm
from phasegate.verdicts.statistics import column_names
from phasegate.verdicts.wording import Cells, interval, listed, measure, number, phase_label, rows_of

Tables = Mapping[str, pd.DataFrame]
CONVERGED = ("p7b1", "p7b2", "p7b3", "p7b4", "surgery")
"""The phases that begin with a converged model of which nothing is broken."""
QUESTIONS = {
    growth.PHASE: "Does growing pay in a model that started too small?",
    arrival.PHASE: "Does a controller that decides when to grow pay when classes arrive?",
    repair.PHASE: "Does finding and removing dead experts pay?",
}
ANSWERS = {  # by the word of a primary arm: what it says of a question whether something pays
    words.BETTER: "Yes.",
    words.WORSE: "No, it costs.",
    words.EQUIVALENT: "No.",
    words.NO_WORSE: "Not shown.",
    words.UNDECIDED: "Not shown.",
    words.NOTHING_DONE: "It never acted.",
}
GAINED = {  # by the word of a row; each goes on with the difference
    words.BETTER: "gains",
    words.WORSE: "loses:",
    words.EQUIVALENT: "neither gains nor loses more than the margin:",
    words.NO_WORSE: "loses no more than the margin, and is not shown to gain:",
    words.UNDECIDED: "is not shown to gain, nor to be harmless:",
    words.NOTHING_DONE: "never acts:",
}
ACTOR = {  # who acts, in plain words
    "birth": "births (`birth`)",
    "measured": "a controller that measures whether to grow (`measured`)",
    "oracle": "a controller that measures what each removal costs (`oracle`)",
}
BESIDE = {  # arms of 7c.1 that the primary arm is compared with, in plain words
    "upcycle": "routed copies (`upcycle`)",
    "large": "{large} experts from the start (`large`)",
}
DONE = {
    "p7b1/noise_acting": "a head trained on random labels adds and removes experts",
    "p7b1/grow": "random labels only add",
    "p7b1/prune": "random labels only remove",
    "p7b2/split": "routing entropy adds and removes experts",
    "p7b3/task_gates": "further tasks, with gates of their own",
    "p7b4/counterfactual_head": "a head that predicts ground truth adds and removes experts",
    "surgery/split": "the busiest experts are split",
    "p7c1/large": "started with {large} experts, not {small}",
    "p7c1/birth": "started with {small}, grown to {large} by births at step {at}",
    "p7c1/upcycle": "grown by routed copies at step {at}",
    "p7c1/split": "grown by splits at step {at}",
    "p7c2/measured": "classes arrive: a controller grows once measuring shows a gain",
    "p7c2/informed": "classes arrive: grown when told",
    "p7c3/removed": "{dead} experts are dead: these, and no others, are removed",
    "p7c3/oracle": "{dead} experts are dead: ground truth removes what it finds",
}
"""What was done, in plain words, in the arms that the first table shows; primary arms are always shown."""


def answer(tables: Tables, params: Params) -> list[str]:
    """Return what came out, a paragraph for each question: it and a short answer between `**`, then the numbers."""
    rows = decision_rows(tables["decisions"])
    primary = {row.phase: row for row in rows if row.primary}
    paragraphs = [f"{_converged(rows)} {_breaking(tables['attribution'], params.decisions.confidence)}"]
    tell = {growth.PHASE: _growing, arrival.PHASE: _arriving, repair.PHASE: _repairing}
    for row in (primary[phase] for phase in QUESTIONS if phase in primary):
        short = "Not decided." if row.verdict == words.NO_ASSAY else ANSWERS.get(row.word, "No trial finished.")
        paragraphs.append(f"**{QUESTIONS[row.phase]} {short}** {tell[row.phase](row, tables, params)}")
    return paragraphs


def _converged(rows: Iterable[Decision]) -> str:
    """Say which arms that added or removed experts of a converged model are better or worse than no surgery."""
    rewired = [row for row in rows if row.phase in CONVERGED and row.operations > 0]
    question = "Does adding or removing experts pay in a model that has converged?"
    if not rewired:
        return f"**{question} No arm did.**"
    better, worse = ([row for row in rewired if row.word == word] for word in (words.BETTER, words.WORSE))
    are, also = ("are" if len(rows) > 1 else "is" for rows in (better, worse))
    named = [f"`{row.arm}` of {phase_label(row.phase)} ({measure(row, 'delta_pp', 2, True, 'pp')})" for row in better]
    gain = f"{len(better)} {are} better ({listed(named)})" if better else "none is shown to be better"
    short = f"{len(better)} of {len(rewired)} arms gain." if better else "No arm that does shows a gain."
    return (
        f"**{question} {short}** Of {len(rewired)} arms that add or remove experts, {gain} than the same model trained "
        f"on unchanged, and {len(worse) or 'none'} {also} worse."
    )


def _breaking(attribution: pd.DataFrame, confidence: float) -> str:
    """Say whether adding or removing experts does the harm."""
    found = {
        account: harm(attribution, account, confidence)
        for account in SIGNALS
        if {ADDING, REMOVING} <= set(attribution[attribution["account"] == account]["part"])
    }
    if len(set(found.values())) == 1:
        by = " or by ".join(SIGNALS[account] for account in found)
        return f"Where experts are chosen by {by}, {next(iter(found.values()))}."
    parts = [f"by {SIGNALS[account]}, {said}" for account, said in found.items()]
    return f"Where experts are chosen {'; '.join(parts)}."


def _actor(row: Decision) -> str:
    return ACTOR.get(row.arm, f"`{row.arm}`")


def gained(row: Decision) -> str:
    """Return what became of an arm beside its control, by its word, with the difference and the failed trials."""
    if not row.n_seeds:
        return f"is compared in no seed: {wording.failed(row) or 'its control failed there'}"
    text = f"{GAINED[row.word]} {measure(row, 'delta_pp', 2, True, 'pp')}" if row.word else "is the control"
    return f"{text}, though {wording.failed(row)}" if row.n_failed else text


def _verdict(row: Decision, params: Params) -> str:
    """Return the verdict in brackets; without an assay, what was not shown."""
    if row.verdict != words.NO_ASSAY:
        return f"({row.verdict})"
    assay = params.claims()[row.phase].assay
    found = measure(row, "assay_pp", 2, True, "pp") or "no seed finished both"
    better, worse = (f"`{name.partition('/')[2]}`" for name in (assay.better, assay.worse))
    return f"({row.verdict}: {better} is not certainly ahead of {worse} by {assay.margin_pp:g} pp, but {found})"


def _growing(row: Decision, tables: Tables, params: Params) -> str:
    """Say what growing a model that started too small gains, how much of the gap it closes, and when."""
    small, large, steps = params.p7c.small, params.p7c.large, params.p7c.steps
    table = {each.arm: each for each in rows_of(tables["growth"])}
    own, exact = table[row.arm], ""
    done = of_arm(tables["surgery_summary"], row.phase, row.arm)
    if len(done) and done["output_change_max"].max() == 0:
        exact = ", which at first changes no bit of the output,"
    at, of = (f" at step {own.step:.0f}", f" of {number(steps, 0)}") if pd.notna(own.step) else ("", "")
    text = (
        f"A model that starts with {small} experts and grows to {large} by {_actor(row)}{at}{of}{exact} "
        f"{gained(row)} {_verdict(row, params)}."
    )
    if pd.isna(own.step):  # it never grew
        return text
    alike = tables["growth"].query("operator == @own.operator").dropna(subset=["step", "gap_closed"])
    by_step = rows_of(alike.drop_duplicates("step").sort_values("step"))
    shares = [f"{share(each, 'gap_closed')} if it grows at step {each.step:.0f}" for each in by_step]
    if shares and pd.notna(own.gap_closed):
        text += f" Of the gap to {large} experts from the start, it closes {listed(shares)}."
    leads = [
        f"{_standing(table[arm])} {what.format(large=large)}, {measure(table[arm], 'lead_pp', 2, True, 'pp')}"
        for arm, what in BESIDE.items()
        if arm in table and arm != row.arm and pd.notna(table[arm].lead_pp)
    ]
    ends = f" Grown{at}, `{row.arm}` ends {', and '.join(leads)}; all learning rates were chosen in other seeds."
    return text + ends if leads else text


def _standing(row: Any) -> str:
    """Return where the primary arm stands beside that of a row, by the interval of its lead."""
    return "ahead of" if row.lead_lo > 0 else "behind" if row.lead_hi < 0 else "not certainly apart from"


def _arriving(row: Decision, tables: Tables, params: Params) -> str:
    """Say whether a controller gains when classes arrive, on old classes too, and where it stands beside being told."""
    start = f"When further classes join the first {params.p7c2.classes} at step {params.p7c2.at}, {_actor(row)}"
    text = f"{start} {gained(row)} {_verdict(row, params)}."
    table = {(each.arm, each.classes): each for each in rows_of(tables["arrival"])}
    own = [table[row.arm, part] for part in ("old", "new") if (row.arm, part) in table]
    parts = [f"{measure(each, 'delta_pp', 2, True, 'pp')} on {each.classes} classes" for each in own if each.n_seeds]
    text += f" Its difference is {listed(parts)}." if parts else ""
    seeds, acting = (set(of_arm(tables[name], row.phase, row.arm)["seed"]) for name in ("trials", "surgeries"))
    text += f" It grows in {len(seeds & acting)} of {number(len(seeds), 0)} seeds." if seeds else ""
    for told in decision_rows(of_arm(tables["decisions"], row.phase, arrival.TOLD)):
        text += f" Growing when told (`{told.arm}`) {gained(told)}."
    near = table.get((arrival.TOLD, "all"))
    if near and row.arm != arrival.TOLD and pd.notna(near.lead_pp):
        half = f"`{row.arm}` ends less than {arrival.NEAR_PP:g} pp below `{arrival.TOLD}`"
        least = -arrival.NEAR_PP
        shown = "shown" if near.lead_lo > least else "refuted" if near.lead_hi < least else "not shown"
        found = f"This is {shown}: {measure(near, 'lead_pp', 2, True, 'pp')}."
        text += f" The claim had a second half, which decides no verdict: {half}. {found}"
    return text


def _repairing(row: Decision, tables: Tables, params: Params) -> str:
    """Say how many dead experts ground truth finds, how many living ones it removes, and what it does where none is."""
    counts = {each.arm: each for each in rows_of(tables["repair"])}
    own, sham = counts.get(row.arm), counts.get(repair.SHAM)
    text = f"Where {params.p7c3.dead} of {params.p7a.n_routed} experts are dead (with weights of zero), {_actor(row)} "
    if own and own.n_seeds:
        living = "no living one" if own.false_hi == 0 else f"{measure(own, 'false')} living ones a seed"
        text += f"removes {share(own, 'found')} of them, and {living}; it "
    text += f"{gained(row)} {_verdict(row, params)}."
    if sham and sham.n_seeds:
        seeds, of = round(sham.acting * sham.n_seeds), f"{sham.n_seeds} seeds ({share(sham, 'acting')})"
        text += f" Where none is dead, it still removes experts in {seeds} of {of}."
    return text


def share(row: Any, name: str, digits: int = 0) -> str:
    """Return a share with its interval in percent, `78 % [60, 95]`."""
    mean, lo, hi = (100 * getattr(row, column) for column in column_names(name))
    return interval(mean, lo, hi, digits, unit="%")


def story_cells(decisions: pd.DataFrame, params: Params) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of the first table, each with its key, phase/arm."""
    growing, known = params.p7c, {f"{row.phase}/{row.arm}": row for row in decision_rows(decisions)}
    numbers = {"small": growing.small, "large": growing.large, "at": params.p7c1.at, "dead": params.p7c3.dead}
    for name, row in known.items():
        if row.phase == START or row.is_control or not (row.primary or name in DONE):
            continue
        what = DONE.get(name, f"`{row.arm}`").format(**numbers)
        cells = {
            "what was done": f"{phase_label(row.phase)}: {what}",
            "difference, pp": measure(row, "delta_pp", 2, True) or wording.failed(row),
            "worst seed, pp": number(row.worst_delta, signed=True),
            "word": " ".join(filter(None, [row.word, f"({row.verdict})" if row.verdict else ""])),
            "as expected": row.as_expected,
        }
        yield name, cells


def story_table(studies: Mapping[str, pd.DataFrame], params: Params) -> Cells:
    """Return the first table: of the first study, with difference and word of each other one in a further column."""
    (first, *others), found = studies, {name: dict(story_cells(table, params)) for name, table in studies.items()}
    rows = []
    for key, row in found[first].items():
        rows.append(dict(row))
        for other in others:
            there = found[other].get(key, {})
            rows[-1][other] = ", ".join(filter(None, [there.get("difference, pp"), there.get("word")]))
    return rows


def growth_cells(table: pd.DataFrame) -> Cells:
    """Return what growing is worth as people read it."""
    return [
        {"arm": row.arm, "grows at step": number(row.step, 0), "gap closed": share(row, "gap_closed")}
        | {"rate of experts": f"{wording.TIMES} {row.factor:g}" if pd.notna(row.factor) else ""}
        | {"lead of the primary arm, pp": measure(row, "lead_pp", 2, True)}
        | {"slot-steps, relative to the control": measure(row, "slot_ratio"), "seeds": str(row.n_seeds)}
        for row in rows_of(table)
    ]


def arrival_cells(table: pd.DataFrame) -> Cells:
    """Return the accuracies on old and new classes as people read them."""
    return [
        {"arm": row.arm, "classes": row.classes, "accuracy, %": measure(row, "accuracy")}
        | {"difference, pp": measure(row, "delta_pp", 2, True)}
        | {"worst seed, pp": number(row.worst_delta, signed=True)}
        | {"lead of the primary arm, pp": measure(row, "lead_pp", 2, True), "seeds": str(row.n_seeds)}
        for row in rows_of(table)
    ]


def repair_cells(table: pd.DataFrame) -> Cells:
    """Return what was found, and lost, among dead experts as people read it."""
    return [
        {"arm": row.arm, "dead": number(row.dead, 0), "dead experts removed": share(row, "found")}
        | {"living ones removed, per seed": measure(row, "false")}
        | {"of the living ones": share(row, "false_share", 1), "operations per seed": measure(row, "operations")}
        | {"seeds with any": share(row, "acting"), "seeds": str(row.n_seeds)}
        for row in rows_of(table)
    ]


def rate_cells(table: pd.DataFrame) -> Cells:
    """Return the rates that were tried as people read them."""
    return [
        {"way to have experts": row.operator, "rate of experts": f"{wording.TIMES} {row.factor:g}"}
        | {"gate accuracy, %": measure(row, "accuracy"), "chosen": "yes" * bool(row.chosen), "seeds": str(row.n_seeds)}
        for row in rows_of(table)
    ]


CELLS_OF = {"growth": growth_cells, "arrival": arrival_cells, "repair": repair_cells}
"""What returns the table of 7c.1, of 7c.2 and of 7c.3 as people read it, by the name of the table."""
