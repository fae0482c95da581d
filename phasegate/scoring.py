"""How good each signal is: its scores of a 7a checkpoint's experts, beside what a survey measured of them.

Scores are made from the signal split and judged on the gate split: by their rank correlation with the measured
changes of the loss, and by regret, what it costs more than the best choice to let the signal choose the experts that
go. Half of the measurement itself is among the signals, judged by its other half, made on other examples and batches:
where it does not foretell that, the measurement is mostly noise, and tells no signals apart. It is no bound: a perfect
signal foretells either half better than they do each other.

Shapes: E experts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from phasegate.counterfactual_head import (
    CHANGES,
    GROW,
    HEAD,
    PRUNE,
    RECOVERED,
    SURVEY,
    CounterfactualHead,
    describe,
    load_head,
)
from phasegate.data import Array, meta_file
from phasegate.files import write_atomic
from phasegate.importance import PUBLISHED, Signal, own_signal
from phasegate.model import Model
from phasegate.phase import begin, begin_files
from phasegate.phase_params import Schedule
from phasegate.plugins import Plugin
from phasegate.probe import Probe
from phasegate.randomness import generator
from phasegate.regret import Removals
from phasegate.study import MEASURED, PREDICTED
from phasegate.survey import SURVEY_COLUMNS
from phasegate.table_files import read_table
from phasegate.trials import Trial

GONE = (1, 2, 4)  # experts that go, for the regret
SCORES = "signals.csv"
SCORE_COLUMNS = [
    *("signal", "seed", "spearman_prune", "spearman_recovered", "spearman_grow"),
    *(f"regret_{gone}" for gone in GONE),
    "seconds",
    *(f"chance_{gone}" for gone in GONE),
]
"""Regrets are in nats; chance is the mean regret of all sets of so many experts. Blank: nothing said of the kind."""


@dataclass(frozen=True, eq=False)
class Claim:
    """What a signal says of a layer's experts, higher for those that it would rather keep, or rather grow (E,)."""

    prune: Tensor | None
    recovered: Tensor | None  # the same of removals after recovery, where the signal tells the two apart
    grow: Tensor | None
    seconds: float
    truth: str = "_gate"  # the survey's columns that it is judged by


def scorings(
    prepared: Path,
    baselines: Path,
    surveys: Path,
    heads: Path,
    seeds: int,
    schedule: Schedule,
    own: tuple[Plugin, ...] = (),
) -> list[Trial]:
    """The trials of all seeds: seed s scores the published signals, and those of one's own, of `baselines`/seed-s."""
    shared = {"prepared": prepared, "surveys": surveys, "heads": heads, "schedule": schedule, "own": own}
    return [
        Trial(
            f"seed-{seed}",
            score_signals,
            {**shared, "start": start, "seed": seed},
            (
                *begin_files(prepared, start),
                *(surveys / f"seed-{seed}" / SURVEY, heads / f"seed-{seed}" / HEAD),
                *(plugin.path for plugin in own),
            ),
            (meta_file(prepared),),
        )
        for seed in range(seeds)
        for start in [baselines / f"seed-{seed}"]
    ]


@torch.no_grad()
def score_signals(
    folder: Path,
    *,
    prepared: Path,
    start: Path,
    surveys: Path,
    heads: Path,
    seed: int,
    schedule: Schedule,
    own: tuple[Plugin, ...],
) -> None:
    """Score all signals on one seed and write `folder/signals.csv`: a row per signal, a mean over the layers."""
    begun, course = begin(prepared, start, seed, schedule)
    model, head = begun.model, load_head(heads / f"seed-{seed}").to(course.gate.x.device)
    assert isinstance(model, Model), "not a 7a checkpoint"
    survey = read_table(surveys / f"seed-{seed}" / SURVEY, SURVEY_COLUMNS)
    signals = PUBLISHED | {plugin.name: own_signal(plugin) for plugin in own}
    rows = []
    for block in range(len(model.layers)):
        measured = survey[(survey["step"] == 0) & (survey["block"] == block)]
        probe, removals = partial(Probe, model, block, course.signal), Removals(Probe(model, block, course.gate))
        claims = {name: _said(signal, generator(seed, name, block), probe) for name, signal in signals.items()}
        claims[PREDICTED] = _predicted(head, probe, measured)
        claims[MEASURED] = _measured(measured)
        rows += [{"signal": name, "seed": seed} | _judged(claim, measured, removals) for name, claim in claims.items()]
    table = pd.DataFrame(rows, columns=SCORE_COLUMNS).groupby(["signal", "seed"], sort=False).mean().reset_index()
    write_atomic(folder / SCORES, table.to_csv(index=False))


def rank_correlation(x: Array, y: Array) -> float:
    """Spearman's rank correlation of the pairs that are finite; 0 where one side ranks nothing, NaN below 3 pairs."""
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 3:
        return float("nan")
    if np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0:
        return 0.0
    return float(spearmanr(x[known], y[known]).statistic)


def _said(signal: Signal, draws: torch.Generator, probe: Callable[[], Probe]) -> Claim:
    """A published signal, with all the passes that it needs on the clock."""
    begun = time.perf_counter()
    scores = signal(probe(), draws)
    return Claim(scores.prune, scores.prune, scores.grow, time.perf_counter() - begun)


def _predicted(head: CounterfactualHead, probe: Callable[[], Probe], measured: pd.DataFrame) -> Claim:
    """The head's predictions; what it learned from was measured on other seeds."""
    begun = time.perf_counter()
    change = head.predict(describe(probe(), torch.tensor(measured["age"].to_numpy()).exp(), progress=0)).change
    return Claim(change[:, PRUNE], change[:, RECOVERED], -change[:, GROW], time.perf_counter() - begun)


def _measured(measured: pd.DataFrame) -> Claim:
    """One part of the measurements, judged by the other."""
    part = {change: torch.tensor(measured[f"{change}_part"].to_numpy()) for change in CHANGES}
    seconds = float(measured["removal_seconds"].sum() + 2 * measured["fork_seconds"].sum())
    return Claim(part["prune"], part["recovered"], -part["grow"], seconds, truth="_gate_rest")


def _judged(claim: Claim, measured: pd.DataFrame, removals: Removals) -> dict[str, float]:
    """A row of the table."""
    row = {"seconds": claim.seconds}
    for change, sign in zip(CHANGES, (1, 1, -1), strict=True):
        scores: Tensor | None = getattr(claim, change)
        truth = sign * measured[change + claim.truth].to_numpy()
        row[f"spearman_{change}"] = float("nan") if scores is None else rank_correlation(scores.cpu().numpy(), truth)
    for gone in GONE:
        lowest = removals.lowest(gone)
        for name, scores in (("regret", claim.prune), ("chance", torch.zeros(removals.n_routed))):
            if scores is not None and np.isfinite(lowest):
                row[f"{name}_{gone}"] = removals.chosen(scores, gone) - lowest
    return row
