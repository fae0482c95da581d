"""Score the experts of a 7a checkpoint by every signal, and compare the scores with what a survey measured.

Scores are made from the signal split and judged on the gate split: by their rank correlation with the measured changes
of the loss, and by regret. Regret is what it costs, compared with the best choice, to let the signal choose the experts
that go. One half of the measurement is among the signals, judged by the other half, which was made on other examples
and batches. If it predicts the other half badly, the measurement is mostly noise, and tells no signals apart. It is no
upper bound: a perfect signal predicts either half better than they predict each other.

Planted truth needs no measurement: in a copy of the checkpoint some experts are killed, the same as in phase 7c.3. The
copy is trained until the first decision of 7c.3, for the router to react. Who scores the dead below the living?
"""

from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.optim import Optimizer

from phasegate.model.classifier import Model
from phasegate.params.names import MEASURED, PREDICTED
from phasegate.params.phases import Schedule
from phasegate.params.plugins import Plugin
from phasegate.records.prepared import META, Array
from phasegate.records.tables import read_table, write_table
from phasegate.signals import forks
from phasegate.signals.features import CHANGES, Change, describe
from phasegate.signals.predictor import HEAD, SURVEY, CounterfactualHead, load_head
from phasegate.signals.published import PUBLISHED, Scores, Signal, plugin_signal
from phasegate.signals.removal_cost import Removals
from phasegate.signals.survey import SURVEY_COLUMNS
from phasegate.surgery.operations import kill_some
from phasegate.surgery.probe import Probe
from phasegate.training import loop, losses
from phasegate.training.course import Course, load_start, start_files
from phasegate.training.randomness import generator
from phasegate.trials.trial import Trial

GONE = (1, 2, 4)  # experts that go, for the regret
SCORES = "signals.csv"
SCORE_COLUMNS = ["signal", "seed", "spearman_prune", "spearman_recovered", "spearman_grow"]
SCORE_COLUMNS += ["regret_1", "regret_2", "regret_4", "chance_1", "chance_2", "chance_4", "auc_dead"]
"""Regrets are in nats; chance is the mean regret of all sets of that many experts. auc_dead: the area under the ROC
curve by which a signal tells planted dead experts from living ones; 0.5 is chance. Blank: the signal says nothing."""
Plugins = tuple[Plugin, ...]


def scorings(
    prepared: Path,
    baselines: Path,
    surveys: Path,
    heads: Path,
    seeds: range,
    schedule: Schedule,
    dead: int,
    plugins: Plugins = (),
) -> list[Trial]:
    """List the trials of all seeds: seed s scores all signals, plugins included, of `baselines`/seed-s.

    `dead` experts of each layer are killed in the copy with planted truth.
    """
    trials = []
    for seed in seeds:
        start, survey, head = (folder / f"seed-{seed}" for folder in (baselines, surveys, heads))
        arguments = {"prepared": prepared, "start": start, "survey": survey, "head": head, "seed": seed}
        arguments |= {"schedule": schedule, "dead": dead, "plugins": plugins}
        files = (*start_files(prepared, start), survey / SURVEY, head / HEAD, *(plugin.path for plugin in plugins))
        trials.append(Trial("signals", "", seed, score_signals, arguments, files, (prepared / META,)))
    return trials


@torch.no_grad()
def score_signals(
    folder: Path,
    prepared: Path,
    start: Path,
    survey: Path,
    head: Path,
    seed: int,
    schedule: Schedule,
    dead: int,
    plugins: Plugins,
) -> None:
    """Score all signals on one seed and write `folder/signals.csv`: a row per signal, a mean over the layers."""
    model, optimizer, course = load_start(prepared, start, seed, schedule)
    damaged = with_dead(model, optimizer, course, dead)
    predictor = load_head(head, course.gate.x.device)
    surveyed = read_table(survey / SURVEY, SURVEY_COLUMNS)
    signals = PUBLISHED | {plugin.name: plugin_signal(plugin) for plugin in plugins}
    rows = []
    for block, layer in enumerate(damaged.layers):
        measured = surveyed[(surveyed["step"] == 0) & (surveyed["block"] == block)]
        ages = torch.tensor(measured["age"].to_numpy()).exp()
        predicted = (
            partial(_predicted, predictor, ages + steps, steps / schedule.steps) for steps in (0, schedule.act_every)
        )
        said, of_damaged = (
            _ask(signals | {PREDICTED: signal}, each, block, course)
            for signal, each in zip(predicted, (model, damaged), strict=True)
        )
        said[MEASURED] = _measured(measured, "_part")
        of_damaged[MEASURED] = Scores(forks.removals(Probe(damaged, block, course.signal)).change, None)
        removals, lifeless = Removals(Probe(model, block, course.gate)), ~layer.w_in.flatten(1).any(1)
        for name, scores in said.items():
            truth = _measured(measured, "_gate_rest" if name == MEASURED else "_gate")
            row = {"signal": name, "seed": seed} | _judge(scores, truth, removals)
            if (low := of_damaged[name].prune) is not None:
                row["auc_dead"] = area_under_roc(low.cpu().numpy(), lifeless.cpu().numpy())
            rows.append(row)
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


def area_under_roc(scores: Array, dead: Array) -> float:
    """Return how often dead experts score below living ones, both among (E,), ties counting half; NaN unless finite."""
    low, high = scores[dead][:, None], scores[~dead]
    return float((low < high).mean() + (low == high).mean() / 2) if np.isfinite(scores).all() else float("nan")


@torch.enable_grad()
def with_dead(model: Model, optimizer: Optimizer, course: Course, dead: int) -> Model:
    """Return a copy of a model as the controllers of 7c.3 first see it: some experts are dead since a few steps."""
    model, optimizer = deepcopy((model, optimizer))
    kill_some(model.layers, optimizer, dead, course.seed)
    objective = losses.plain_objective(model, course.training.label_smoothing)
    rates = course.rates[: course.schedule.act_every]
    loop.fit(model, optimizer, course.batches, objective, rates, lambda step, loss: None)
    return model


def _ask(signals: dict[str, Signal], model: Model, block: int, course: Course) -> dict[str, Scores]:
    """Return what each signal says of a layer, on the signal split."""
    return {
        name: signal(Probe(model, block, course.signal), generator(course.seed, name, block))
        for name, signal in signals.items()
    }


def _predicted(head: CounterfactualHead, ages: Tensor, progress: float, probe: Probe, draws: torch.Generator) -> Scores:
    """Return a head's predictions as scores; what it learned from was measured on other seeds."""
    change = head.predict(describe(probe, ages, progress)).change
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
