"""Measure what surgery would do to the experts of a 7a checkpoint, and of what random surgery makes of it.

Control heads learn from these surveys, and signals are judged by them. The first survey measures all experts of the
checkpoint itself. The others follow while random but exact surgery continues, so that they include experts of all ages,
with and without siblings.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from phasegate.params.phases import GroundTruth, RandomLabels, Schedule
from phasegate.records.prepared import META
from phasegate.records.tables import write_table
from phasegate.signals.features import CHANGES, FEATURES, Change, situation_features
from phasegate.signals.forks import estimate, fork_proposals, removals
from phasegate.signals.predictor import SURVEY
from phasegate.surgery.controllers import Action, LabelPolicy, Proposal, Situation
from phasegate.surgery.probe import Probe
from phasegate.surgery.surgeon import Surgeon, Treatment
from phasegate.training import loop, losses, randomness
from phasegate.training.course import load_start, start_files
from phasegate.training.killed_trials import Snapshots
from phasegate.trials.trial import Trial

EXPLORE = RandomLabels(grow=0.3, prune=0.2, loss_weight=0, head_lr=1)  # the surgery that continues between surveys
PARTS = ("", "_error", "_gate", "_part", "_gate_rest")
"""What is known of each change: its label (signal split, nats) and standard error; the same change on the gate split;
and, to judge measurement itself, the label by the first half of the repeats and the gate's change by the others."""
SURVEY_COLUMNS = ["seed", "block", "step", "expert", *FEATURES]
SURVEY_COLUMNS += [f"{change}{part}" for change in CHANGES for part in PARTS]

Row = dict[str, Any]


def surveys(prepared: Path, baselines: Path, seeds: range, schedule: Schedule, truth: GroundTruth) -> list[Trial]:
    """List the trials of all seeds: seed s surveys `baselines`/seed-s."""
    trials = []
    for seed in seeds:
        start = baselines / f"seed-{seed}"
        arguments = {"prepared": prepared, "start": start, "seed": seed, "schedule": schedule, "truth": truth}
        arguments["steps"] = truth.last_survey
        files = start_files(prepared, start)
        trials.append(Trial("survey", "", seed, survey, arguments, files, (prepared / META,)))
    return trials


class _Rows(list[Row]):
    """Hold the rows so far, as a part of snapshots."""

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self[:] = state["rows"]


def survey(
    folder: Path, *, prepared: Path, start: Path, seed: int, schedule: Schedule, truth: GroundTruth, steps: int
) -> None:
    """Survey one seed for `steps` steps: write `folder/survey.csv`, a row per survey and expert, in `SURVEY_COLUMNS`.

    Features come from the gate split and labels from the signal split: no label shares its examples with what is to
    predict it.
    """
    model, optimizer, course = load_start(prepared, start, seed, schedule)
    surgeon, rows = Surgeon(model, optimizer, Treatment(LabelPolicy(EXPLORE)), course), _Rows()
    snapshots = Snapshots(folder, model, optimizer, {"surgeon": surgeon, "rows": rows})

    def after_step(step: int, loss: Tensor) -> None:
        if step % truth.survey_every == 0:
            rows.extend(_survey(surgeon, step, truth))
        if course.acts_at(step):
            surgeon.act(step)
        if step % schedule.eval_every == 0:
            snapshots.take(step)

    objective = losses.plain_objective(model, course.training.label_smoothing)
    done = snapshots.begin(lambda: rows.extend(_survey(surgeon, 0, truth)))
    loop.fit(model, optimizer, course.batches, objective, course.rates[:steps], after_step, done)
    table = pd.DataFrame([{"seed": seed, **row} for row in rows], columns=SURVEY_COLUMNS)
    write_table(folder / SURVEY, table, digits=None)


@torch.no_grad()
def _survey(surgeon: Surgeon, step: int, truth: GroundTruth) -> list[Row]:
    """Return a row per expert of every layer; forks measure all allowed operations in the first survey, else a few."""
    rows = []
    for block, layer in enumerate(surgeon.model.layers):
        draws = randomness.generator(surgeon.course.seed, "survey", step, block)
        signal, gate = (Probe(surgeon.model, block, split) for split in (surgeon.course.signal, surgeon.course.gate))
        situation = surgeon.situation(signal, step, draws)
        removed, removed_gate = removals(signal), removals(gate).change.tolist()
        table: list[Row] = []
        features, experts = situation_features(situation, surgeon.course).tolist(), layer.expert_id.tolist()
        for e, (change, error) in enumerate(zip(*(part.tolist() for part in removed), strict=True)):
            table.append(dict(zip(FEATURES, features[e], strict=True)))
            table[e] |= {"block": block, "step": step, "expert": experts[e]}
            if change < float("inf"):  # else the removal was refused; nothing is repeated, so its parts are the splits
                table[e] |= _label(Change.PRUNE, change, error, removed_gate[e], change, removed_gate[e])
        for proposal, label in _fork(surgeon, situation, truth, everything=step == 0).items():
            table[proposal.expert] |= label
        rows += table
    return rows


def _fork(surgeon: Surgeon, situation: Situation, truth: GroundTruth, everything: bool) -> dict[Proposal, Row]:
    """Measure allowed operations by forks, all or a few of each kind drawn at random; return the columns of each."""
    kinds = [situation.allowed.proposals(action) for action in (Action.GROW, Action.PRUNE)]
    if not everything:
        orders = [torch.randperm(len(kind), generator=situation.draws).tolist() for kind in kinds]
        kinds = [[kind[place] for place in order[: truth.surveyed]] for kind, order in zip(kinds, orders, strict=True)]
    steps, repeats = truth.recovery_steps, truth.repeats
    forked = fork_proposals(
        [(proposal,) for proposal in (*kinds[0], *kinds[1])],
        situation,
        surgeon.optimizer,
        surgeon.course,
        steps,
        repeats,
    )
    parts = (torch.split(split, [*map(len, kinds)]) for split in forked)
    labels, half = {}, repeats // 2
    for change, kind, signal, gate in zip((Change.GROW, Change.RECOVERED), kinds, *parts, strict=True):
        if not kind:  # torch warns of the variance of nothing
            continue
        means = (gate.mean((1, 2)), signal[:, :half].mean((1, 2)), gate[:, half:].mean((1, 2)))
        for proposal, *values in zip(kind, *estimate(signal), *means, strict=True):
            labels[proposal] = _label(change, *map(float, values))
    return labels


def _label(change: Change, *values: float) -> Row:
    """Return the columns of one change of one expert, from the values of its `PARTS`."""
    return {f"{CHANGES[change]}{part}": value for part, value in zip(PARTS, values, strict=True)}
