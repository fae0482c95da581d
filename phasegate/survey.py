"""Surveys: what surgery would do to the experts of a 7a checkpoint, and of what random surgery makes of it, measured.

They are what control heads learn from and what signals are judged by. The first survey is of the checkpoint itself,
of all its experts; the others follow while random but exact surgery goes on, so that experts of all ages, with and
without siblings, are among those measured.
"""

import time
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from phasegate.control import LabelControl, Proposal, Situation
from phasegate.counterfactual import Estimate, estimate, removals
from phasegate.counterfactual_head import CHANGES, FEATURES, GROW, PRUNE, RECOVERED, SURVEY
from phasegate.data import meta_file
from phasegate.files import write_atomic
from phasegate.model import Model
from phasegate.phase import begin, begin_files
from phasegate.phase_params import GroundTruth, RandomLabels, Schedule
from phasegate.probe import Probe
from phasegate.randomness import generator
from phasegate.snapshots import Snapshots
from phasegate.surgeon import Surgeon, Treatment
from phasegate.training import fit, plain_objective
from phasegate.trials import Trial

EXPLORE = RandomLabels(grow=0.3, prune=0.2, loss_weight=0, head_lr=1)  # which surgery goes on between surveys


SURVEY_COLUMNS = [
    *("seed", "block", "step", "expert"),
    *FEATURES,
    *(f"{change}{part}" for change in CHANGES for part in ("", "_error", "_gate", "_part", "_gate_rest")),
    *("removal_seconds", "fork_seconds"),
]
"""Per change of `CHANGES`: its label (signal split, nats) and standard error; the same change on the gate split; and,
for judging measurement itself, the label by the first half of the repeats and the gate's change by the others. The
seconds are what measuring took, per expert of the survey."""


def surveys(prepared: Path, baselines: Path, seeds: int, schedule: Schedule, truth: GroundTruth) -> list[Trial]:
    """The trials of all seeds: seed s surveys `baselines`/seed-s."""
    return [
        Trial(
            f"seed-{seed}",
            survey,
            {"prepared": prepared, "start": start, "seed": seed, "schedule": schedule, "truth": truth},
            begin_files(prepared, start),
            (meta_file(prepared),),
        )
        for seed in range(seeds)
        for start in [baselines / f"seed-{seed}"]
    ]


def survey(folder: Path, *, prepared: Path, start: Path, seed: int, schedule: Schedule, truth: GroundTruth) -> None:
    """Survey one seed, and write `folder/survey.csv`: a row per survey and expert, in `SURVEY_COLUMNS`.

    Features come from the gate split and labels from the signal split: no label shares its examples with what is to
    predict it.
    """
    begun, course = begin(prepared, start, seed, schedule)
    model, optimizer = begun.model, begun.optimizer
    assert isinstance(model, Model) and optimizer is not None, "not a 7a checkpoint"
    surgeon, rows = Surgeon(model, optimizer, Treatment(LabelControl(EXPLORE)), course), _Rows()
    snapshots = Snapshots(folder, model, optimizer, {"surgeon": surgeon, "rows": rows})

    def after_step(step: int, loss: Tensor) -> None:
        if step % truth.survey_every == 0:
            rows.add(_survey(surgeon, step, truth))
        if step % schedule.act_every == 0:
            surgeon.act(step)
        if step % schedule.eval_every == 0:
            snapshots.take(step)

    objective = plain_objective(model, course.training.label_smoothing)
    rates = course.rates[: truth.survey_every * (truth.surveys - 1)]
    done = snapshots.begin(lambda: rows.add(_survey(surgeon, 0, truth, everything=True)))
    fit(model, optimizer, course.batches, objective, rates, after_step, done)
    table = pd.DataFrame([{"seed": seed, **row} for row in rows.rows], columns=SURVEY_COLUMNS)
    write_atomic(folder / SURVEY, table.to_csv(index=False))


class _Rows:
    """The rows so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Those of one more survey."""
        self.rows += rows

    def state_dict(self) -> dict[str, Any]:
        """What a snapshot must hold, as JSON can."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        self.rows = state["rows"]


@torch.no_grad()
def _survey(surgeon: Surgeon, step: int, truth: GroundTruth, everything: bool = False) -> list[dict[str, Any]]:
    """A row per expert of every layer; of those that may be operated on, all or a few are measured by forks."""
    rows = []
    for block, layer in enumerate(surgeon.model.layers):
        draws = generator(surgeon.seed, "survey", step, block)
        signal, gate = (Probe(surgeon.model, block, split) for split in (surgeon.course.signal, surgeon.course.gate))
        situation = surgeon.situation(signal, step, draws)
        begun = time.perf_counter()
        at_once = (removals(signal), removals(gate))
        seconds = (time.perf_counter() - begun) / 2 / layer.n_routed
        features = situation.features().tolist()
        table = [
            {"block": block, "step": step, "expert": expert, **dict(zip(FEATURES, features[e], strict=True))}
            | _removal(at_once, e)
            | {"removal_seconds": seconds}
            for e, expert in enumerate(layer.expert_id.tolist())
        ]
        proposals = _proposals(situation, None if everything else truth.surveyed, draws)
        begun = time.perf_counter()
        forked = situation.forks(proposals, truth.recovery_steps, truth.repeats)
        seconds = (time.perf_counter() - begun) / max(len(proposals), 1)
        half = truth.repeats // 2
        for proposal, signal_change, gate_change in zip(proposals, forked.signal, forked.gate, strict=True):
            change = CHANGES[GROW if proposal.action == "grow" else RECOVERED]
            label = estimate(signal_change)
            table[proposal.expert] |= {
                change: float(label.change),
                f"{change}_error": float(label.error),
                f"{change}_gate": float(gate_change.mean()),
                f"{change}_part": float(signal_change[:half].mean()),
                f"{change}_gate_rest": float(gate_change[half:].mean()),
                "fork_seconds": seconds,
            }
        rows += table
    return rows


def _removal(at_once: tuple[Estimate, Estimate], e: int) -> dict[str, float]:
    """The columns of a removal without training: nothing is repeated, so its parts are the splits. Blank if refused."""
    name, (signal, gate) = CHANGES[PRUNE], at_once
    if not signal.change[e].isfinite():
        return {}
    on_signal, on_gate = float(signal.change[e]), float(gate.change[e])
    return {
        name: on_signal,
        f"{name}_error": float(signal.error[e]),
        f"{name}_gate": on_gate,
        f"{name}_part": on_signal,
        f"{name}_gate_rest": on_gate,
    }


def _proposals(situation: Situation, some: int | None, draws: torch.Generator) -> list[Proposal]:
    """What is allowed, of each kind: all, or `some` drawn at random."""
    chosen: list[Proposal] = []
    actions: tuple[Literal["grow", "prune"], ...] = ("grow", "prune")
    for action, mask in zip(actions, situation.allowed, strict=True):
        experts = mask.nonzero().flatten()
        if some is not None:
            experts = experts[torch.randperm(len(experts), generator=draws)][:some]
        chosen += [Proposal(action, e) for e in experts.tolist()]
    return chosen
