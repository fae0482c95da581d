"""Score the experts of a 7a checkpoint by every signal, and compare the scores with what a survey measured.

Scores are made from the signal split and judged on the gate split: by their rank correlation with the measured changes
of the loss, and by regret. Regret is what it costs, compared with the best choice, to let the signal choose the experts
that go. One half of the measurement is among the signals, judged by the other half, which was made on other examples
and batches. If it predicts the other half badly, the measurement is mostly noise, and tells no signals apart. It is no
upper bound: a perfect signal predicts either half better than they predict each other.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from phasegate.params.names import MEASURED, PREDICTED
from phasegate.params.phases import Schedule
from phasegate.params.plugins import Plugin
from phasegate.records.prepared import META, Array
from phasegate.records.tables import read_table, write_table
from phasegate.signals.features import CHANGES, Change, describe
from phasegate.signals.predictor import HEAD, SURVEY, CounterfactualHead, load_head
from phasegate.signals.published import PUBLISHED, Scores, plugin_signal
from phasegate.signals.removal_cost import Removals
from phasegate.signals.survey import SURVEY_COLUMNS
from phasegate.surgery.probe import Probe
from phasegate.training.course import load_start, start_files
from phasegate.training.randomness import generator
from phasegate.trials.trial import Trial

GONE = (1, 2, 4)  # experts that go, for the regret
SCORES = "signals.csv"
SCORE_COLUMNS = ["signal", "seed", "spearman_prune", "spearman_recovered", "spearman_grow"]
SCORE_COLUMNS += ["regret_1", "regret_2", "regret_4", "chance_1", "chance_2", "chance_4"]
"""Regrets are in nats; chance is the mean regret of all sets of that many experts. Blank: the signal says nothing."""
Plugins = tuple[Plugin, ...]


def scorings(
    prepared: Path, baselines: Path, surveys: Path, heads: Path, seeds: range, schedule: Schedule, plugins: Plugins = ()
) -> list[Trial]:
    """List the trials of all seeds: seed s scores all signals, plugins included, of `baselines`/seed-s."""
    trials = []
    for seed in seeds:
        start, survey, head = (folder / f"seed-{seed}" for folder in (baselines, surveys, heads))
        arguments = {"prepared": prepared, "start": start, "survey": survey, "head": head, "seed": seed}
        arguments |= {"schedule": schedule, "plugins": plugins}
        files = (*start_files(prepared, start), survey / SURVEY, head / HEAD, *(plugin.path for plugin in plugins))
        trials.append(Trial("signals", "", seed, score_signals, arguments, files, (prepared / META,)))
    return trials


@torch.no_grad()
def score_signals(
    folder: Path, prepared: Path, start: Path, survey: Path, head: Path, seed: int, schedule: Schedule, plugins: Plugins
) -> None:
    """Score all signals on one seed and write `folder/signals.csv`: a row per signal, a mean over the layers."""
    model, _, course = load_start(prepared, start, seed, schedule)
    predictor = load_head(head, course.gate.x.device)
    surveyed = read_table(survey / SURVEY, SURVEY_COLUMNS)
    signals = PUBLISHED | {plugin.name: plugin_signal(plugin) for plugin in plugins}
    rows = []
    for block in range(len(model.layers)):
        measured = surveyed[(surveyed["step"] == 0) & (surveyed["block"] == block)]
        removals, truth = Removals(Probe(model, block, course.gate)), _measured(measured, "_gate")
        signals[PREDICTED] = partial(_predicted, predictor, torch.tensor(measured["age"].to_numpy()).exp())
        for name, signal in signals.items():
            scores = signal(Probe(model, block, course.signal), generator(seed, name, block))
            rows.append({"signal": name, "seed": seed} | _judge(scores, truth, removals))
        judged = _judge(_measured(measured, "_part"), _measured(measured, "_gate_rest"), removals)
        rows.append({"signal": MEASURED, "seed": seed} | judged)
    table = pd.DataFrame(rows, columns=SCORE_COLUMNS).groupby(["signal", "seed"], sort=False).mean().reset_index()
    write_table(folder / SCORES, table, digits=None)


def rank_correlation(x: Array, y: Array) -> float:
    """Return Spearman's correlation of the finite pairs; 0 where one side ranks nothing, NaN below 3 pairs."""
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 3:
        return float("nan")
    if np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0:
        return 0.0
    return float(spearmanr(x[known], y[known]).statistic)


def _predicted(head: CounterfactualHead, ages: Tensor, probe: Probe, draws: torch.Generator) -> Scores:
    """Return a head's predictions as scores; what it learned from was measured on other seeds."""
    change = head.predict(describe(probe, ages, progress=0)).change
    return Scores(change[:, Change.PRUNE], -change[:, Change.GROW], change[:, Change.RECOVERED])


def _measured(measured: pd.DataFrame, part: str) -> Scores:
    """Return one part of the measured changes as scores."""
    change = {name: torch.tensor(measured[f"{name}{part}"].to_numpy()) for name in CHANGES}
    return Scores(change["prune"], -change["grow"], change["recovered"])


def _judge(scores: Scores, truth: Scores, removals: Removals) -> dict[str, float]:
    """Return the rank correlations and regrets of scores."""
    row, said = {}, scores if scores.recovered is not None else scores._replace(recovered=scores.prune)
    for change, values in said._asdict().items():
        if values is not None:
            row[f"spearman_{change}"] = rank_correlation(values.cpu().numpy(), getattr(truth, change).numpy())
    for gone in GONE:
        lowest = removals.lowest(gone)
        for name, values in (("regret", scores.prune), ("chance", torch.zeros(removals.n_routed))):
            if values is not None and np.isfinite(lowest):
                row[f"{name}_{gone}"] = removals.chosen(values, gone) - lowest
    return row
