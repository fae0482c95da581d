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
    growth.PHASE: "Does growing help a model that started too small?",
    arrival.PHASE: "Does a controller that decides when to grow help when classes arrive?",
    repair.PHASE: "Does finding and removing dead experts help?",
}
ANSWERS = {  # by the word of a primary arm: what it says of a question whether something helps
    words.BETTER: "Yes.",
    words.WORSE: "No, it harms.",
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
    "measured": "a controller that measures in short trainings whether growing lowers the loss (`measured`)",
    "oracle": "a controller that measures what each removal costs (`oracle`)",
}
COPIES = "upcycle"  # the arm of 7c.1 that grows by routed copies
DONE = {
    "p7b1/noise_acting": "a head trained on random labels adds and removes experts",
    "p7b1/grow": "random labels only add",
    "p7b1/prune": "random labels only remove",
    "p7b2/split": "routing entropy adds and removes experts",
    "p7b3/task_gates": "further tasks are learned, with gates of their own",
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
        if row.verdict == words.NO_ASSAY:
            short, text = "Not decided.", _undecided(row, params)
            text += _removals(row, tables) if row.phase == repair.PHASE else ""
        else:
            short, text = ANSWERS.get(row.word, "No trial finished."), tell[row.phase](row, tables, params)
        paragraphs.append(f"**{QUESTIONS[row.phase]} {short}** {text}")
    return paragraphs


def _converged(rows: Iterable[Decision]) -> str:
    """Say which arms that added or removed experts of a converged model are better or worse than no surgery."""
    rewired = [row for row in rows if row.phase in CONVERGED and row.operations > 0]
    question = "Does adding or removing experts help a model that has converged?"
    if not rewired:
        return f"**{question} No arm did.**"
    better, worse = ([row for row in rewired if row.word == word] for word in (words.BETTER, words.WORSE))
    are, also = ("are" if len(rows) > 1 else "is" for rows in (better, worse))
    named = [f"`{row.arm}` of {phase_label(row.phase)} ({measure(row, 'delta_pp', 2, True, 'pp')})" for row in better]
    gain = f"{len(better)} {are} better ({listed(named)})" if better else "none is shown to be better"
    short = f"{len(better)} of {len(rewired)} arms gain." if better else "No gain is shown."
    return (
        f"**{question} {short}** Of {len(rewired)} arms that add or remove experts, {gain} than the unchanged model, "
        f"trained for as many steps, and {len(worse) or 'none'} {also} worse."
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


def _undecided(row: Decision, params: Params) -> str:
    """Say which two arms had to differ for a verdict, by how much they do, and what became of the arm on trial."""
    assay = params.claims()[row.phase].assay
    lead = measure(row, "assay_pp", 2, True, "pp")
    found = f"its lead is {lead}" if lead else "no seed finished both"
    better, worse = (f"`{name.partition('/')[2]}`" for name in (assay.better, assay.worse))
    had = f"{better} had to be certainly more than {assay.margin_pp:g} pp ahead of {worse}"
    return f"For a verdict, {had}, and {found} ({row.verdict}). The arm on trial, `{row.arm}`, {gained(row)}."


def _growing(row: Decision, tables: Tables, params: Params) -> str:
    """Say what growing a model that started too small gains, how much of the gap it closes, and when."""
    small, large, steps = params.p7c.small, params.p7c.large, params.p7c.steps
    table = {each.arm: each for each in rows_of(tables["growth"])}
    own, copies = table[row.arm], table.get(COPIES)
    at, of = (f" at step {own.step:.0f}", f" of {number(steps, 0)}") if pd.notna(own.step) else ("", "")
    who = f"A model that starts with {small} experts and grows to {large}{at}{of} by {_actor(row)}"
    text = f"{who} {gained(row)} ({row.verdict})."
    if pd.isna(own.step):  # it never grew
        return text
    done = of_arm(tables["surgery_summary"], row.phase, row.arm)
    text += " At the moment of growth no bit of the output changes." if done["output_change_max"].max() == 0 else ""
    alike = tables["growth"].query("operator == @own.operator").dropna(subset=["step", "gap_closed"])
    by_step = rows_of(alike.drop_duplicates("step").sort_values("step"))
    shares = [f"{share(each, 'gap_closed')} if it grows at step {each.step:.0f}" for each in by_step]
    if shares and pd.notna(own.gap_closed):
        [best] = decision_rows(of_arm(tables["decisions"], row.phase, growth.LARGE))
        gap = measure(best, "delta_pp", 2, True, "pp")
        text += f" Of the gap to {large} experts from the start ({gap}), it closes {listed(shares)}."
    if copies and row.arm != COPIES and copies.step == own.step and pd.notna(copies.lead_pp):
        ends = "ahead of" if copies.lead_lo > 0 else "behind" if copies.lead_hi < 0 else "not certainly apart from"
        lead = measure(copies, "lead_pp", 2, True, "pp")
        text += f" When both grow{at}, `{row.arm}` ends {ends} routed copies (`{COPIES}`): {lead}."
    return text


def _arriving(row: Decision, tables: Tables, params: Params) -> str:
    """Say whether a controller gains when classes arrive, on old classes too, and where it stands beside being told."""
    start = f"When further classes join the first {params.p7c2.classes} at step {params.p7c2.at}, {_actor(row)}"
    text = f"{start} {gained(row)} ({row.verdict})."
    table = {(each.arm, each.classes): each for each in rows_of(tables["arrival"])}
    own = [table[row.arm, part] for part in ("old", "new") if (row.arm, part) in table]
    parts = [f"{measure(each, 'delta_pp', 2, True, 'pp')} on {each.classes} classes" for each in own if each.n_seeds]
    text += f" By classes: {listed(parts)}." if parts and row.word != words.NOTHING_DONE else ""
    seeds, acting = (set(of_arm(tables[name], row.phase, row.arm)["seed"]) for name in ("trials", "surgeries"))
    text += f" It grows in {len(seeds & acting)} of {number(len(seeds), 0)} seeds." if seeds else ""
    for told in decision_rows(of_arm(tables["decisions"], row.phase, arrival.TOLD)):
        text += f" Growing when told (`{told.arm}`) {gained(told)}."
    near = table.get((arrival.TOLD, "all"))
    if near and row.arm != arrival.TOLD and pd.notna(near.lead_pp):
        lo, hi = near.lead_lo + arrival.NEAR_PP, near.lead_hi + arrival.NEAR_PP
        shown = "shown" if lo > 0 else "refuted" if hi < 0 else "not shown"
        half = f"`{row.arm}` ends less than {arrival.NEAR_PP:g} pp below `{arrival.TOLD}`. This is {shown}"
        lead = measure(near, "lead_pp", 2, True, "pp")
        text += f" A second half of the claim decides no verdict: {half}: {lead}."
    return text


def _repairing(row: Decision, tables: Tables, params: Params) -> str:
    """Say what removing experts gains where some are dead, and which it removes."""
    where = f"Where {params.p7c3.dead} of {params.p7a.n_routed} experts are dead (their weights set to zero)"
    return f"{where}, {_actor(row)} {gained(row)} ({row.verdict}).{_removals(row, tables)}"


def _removals(row: Decision, tables: Tables) -> str:
    """Say how many dead experts an arm removes, how many living ones, and what it does where none is dead."""
    counts, text = {each.arm: each for each in rows_of(tables["repair"])}, ""
    own, sham = counts.get(row.arm), counts.get(repair.SHAM)
    if own and own.n_seeds:
        living = "no living one" if own.false_hi == 0 else f"{measure(own, 'false')} living ones per seed"
        text = f" It removes {share(own, 'found')} of the dead experts, and {living}."
    if sham and sham.n_seeds:
        seeds, of = round(sham.acting * sham.n_seeds), f"{sham.n_seeds} seeds ({share(sham, 'acting')})"
        text += f" Where none is dead, it removes experts in {seeds} of {of}."
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
