"""Draw the figures of training: learning curves, routing entropy, lineages of the experts, and their classes."""

from collections.abc import Iterable
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from phasegate.params import Params
from phasegate.params.names import BASELINE, CONTROL, START
from phasegate.report import drawing
from phasegate.report.drawing import Tables, band, new_figure, wrapped
from phasegate.verdicts import wording
from phasegate.verdicts.decisions import decision_rows, key_of, of_arm
from phasegate.verdicts.statistics import mean_interval
from phasegate.verdicts.wording import beside, headline_rows, number, phase_label, rows_of

CONTROL_STYLE = (drawing.GREY, "-")  # colour and dash
COLOURS = [drawing.BLUE, drawing.VERMILION, drawing.GREEN, drawing.PURPLE, drawing.ORANGE, drawing.SKY]
DASHES: list[Any] = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]
ARM_STYLES = list(zip(COLOURS, DASHES, strict=True))  # of the arms of a phase, primary first
MARKERS = {"split": "^", "clone": "P", "reinit": "*", "remove": "v", "merge": "d"}
MARKERS |= {"birth": "o", "handover": "s", "upcycle": "X"}
PLUGIN_MARKER = "h"  # of every surgery that is a plugin
THINNEST, WIDEST = 0.03, 0.42  # half the height of an idle expert, and of the busiest; rows are one apart
BLOCK = 0  # the block whose experts are drawn
LONGEST = 16  # characters of the name of a class


def learning_curves(tables: Tables, params: Params) -> Figure:
    """Draw gate accuracy (percent) over training steps, a panel per phase: mean and interval over seeds of each arm."""
    curves, decisions, surgeries = tables["curves"], tables["decisions"], tables["surgeries"]
    confidence = params.decisions.confidence
    shown = curves[curves["arm"] != CONTROL]["phase"].unique()
    rows = decision_rows(decisions)
    heads = [row for row in rows if row.primary and row.phase in shown]
    columns = min(2, len(heads))
    figure, panels = new_figure(6.4 * columns, 3.7 * ceil(len(heads) / columns), len(heads), columns)
    done = set[str]()
    for axes, head in zip(panels, heads, strict=True):
        if head.phase != START:
            control = of_arm(curves, *key_of(head.control))
            band(axes, control, "accuracy", CONTROL_STYLE, confidence, beside(head), 1.3)
        every = [row.arm for row in rows if row.phase == head.phase and not row.is_control]
        variants = {arm for arm in every[1:] for other in every if arm.startswith(f"{other}_")}
        every.sort(key=variants.__contains__)  # such as `birth_early`, behind all others
        arms = every[: len(ARM_STYLES)]
        for arm, style in zip(arms, ARM_STYLES, strict=False):
            points = of_arm(curves, head.phase, arm)
            band(axes, points, "accuracy", style, confidence, arm, 2.2 if arm == head.arm else 1.3)
        own = surgeries[(surgeries["phase"] == head.phase) & surgeries["arm"].isin(arms)]
        _mark_surgeries(axes, own, arms)
        done |= set(own["operation"])
        axes.set_title(wrapped(f"{phase_label(head.phase)} {wording.finding(head)}"))
        axes.set(xlabel="training step", ylabel="gate accuracy, %")
        more = len(every) - len(arms)
        title = f"and {more} more arm{'s' if more > 1 else ''}" if more else None
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title=title, title_fontsize=8)
    if done:
        names = [name for name in MARKERS if name in done] + sorted(done - set(MARKERS))
        look: dict[str, Any] = {"color": drawing.BLACK, "linestyle": "", "markersize": 5}
        marks = [Line2D([], [], marker=MARKERS.get(name, PLUGIN_MARKER), label=name, **look) for name in names]
        title = "surgeries, in the arm's colour; the larger, the more seeds"
        figure.legend(handles=marks, loc="outside lower center", ncols=len(names), title=title)
    return figure


def entropy(tables: Tables, params: Params) -> Figure:
    """Draw routing entropy (normalised, on the gate split) over training: each primary arm beside the control."""
    curves, confidence = tables["curves"], params.decisions.confidence
    heads = headline_rows(tables["decisions"])
    columns = min(3, len(heads))
    figure, panels = new_figure(4.2 * columns, 3.2 * ceil(len(heads) / columns), len(heads), columns)
    for axes, head in zip(panels, heads, strict=True):
        rows, control = of_arm(curves, head.phase, head.arm), of_arm(curves, *key_of(head.control))
        band(axes, control, "routing_entropy", CONTROL_STYLE, confidence, beside(head), 1.3)
        band(axes, rows, "routing_entropy", (drawing.BLUE, "--"), confidence, head.arm, 2)
        axes.set(xlabel="training step", ylabel="routing entropy (1: uniform)")
        ending = _compare_endings(rows, control, confidence) or wording.failed(head)
        axes.set_title(wrapped(f"{phase_label(head.phase)} {head.arm}: {ending}", 44))
        axes.legend(fontsize=8)
    return figure


def lineage(tables: Tables, params: Params) -> Figure:
    """Draw a line per expert, as thick as its load, joined to its parent, for each primary arm with surgery."""
    loads, done = (tables[name][tables[name]["block"] == BLOCK] for name in ("loads", "surgeries"))
    seed = int(loads["seed"].iloc[0])
    done = done[done["seed"] == seed]
    heads = [row for row in headline_rows(tables["decisions"]) if len(of_arm(loads, row.phase, row.arm))]
    operated = [row for row in heads if len(of_arm(done, row.phase, row.arm))] or heads[:1]  # if none did, the first
    columns = min(2, len(operated)) or 1
    figure, panels = new_figure(6.4 * columns, 4.6 * ceil(len(operated) / columns) or 1, len(operated), columns)
    for axes, head in zip(panels, operated, strict=True):
        shown, surgeries = of_arm(loads, head.phase, head.arm), of_arm(done, head.phase, head.arm)
        _draw_tree(axes, shown, surgeries, float(loads["share"].max()))
        born = (surgeries["n_routed_after"] - surgeries["n_routed_before"]).clip(0).sum()
        final = shown[shown["step"] == shown["step"].max()]["share"]
        counts = f"{born} born, {len(_gone(shown, surgeries))} gone, {len(final)} in the end"
        busiest = f"the busiest takes {number(100 * final.max(), 0)} % of the tokens"
        axes.set_title(wrapped(f"{phase_label(head.phase)} {head.arm}: {counts}; {busiest}"))
    still = [phase_label(row.phase) for row in heads if row not in operated]
    rest = f"; {wording.listed(still)} changed nothing" if still else "" if heads else "; no primary arm finished it"
    title = f"Lineages of the experts, as thick as their load (seed {seed}; blue: born, orange: gone){rest}"
    figure.suptitle(wrapped(title, 110), x=0.01, ha="left")
    return figure


def expert_routing(tables: Tables, params: Params) -> Figure:
    """Draw the share of each class's tokens by expert, in rows: removed ones stay grey, born ones follow."""
    routing = tables["routing"][tables["routing"]["block"] == BLOCK]
    shown = {
        (row.phase, row.arm): part.pivot_table(
            "tokens", "expert", "class", "sum", fill_value=0, sort=False
        ).sort_index()
        for row in decision_rows(tables["decisions"])
        if row.primary and len(part := of_arm(routing, row.phase, row.arm))
    }
    began = tables["trials"].drop_duplicates(["phase", "arm"]).set_index(["phase", "arm"])["n_routed_start"]
    olds: dict[Any, pd.Index[Any]] = {key: pd.Index(range(int(began[key]))) for key in shown}
    height = 1.4 + min(8, 0.2 * max(len(olds[key].union(counts.index)) for key, counts in shown.items()))
    columns = min(3, len(shown))
    figure, panels = new_figure(4.2 * columns, height * ceil(len(shown) / columns), len(shown), columns)
    most = max(float(_shares(counts).to_numpy().max()) for counts in shown.values())
    for axes, ((phase, arm), counts) in zip(panels, shown.items(), strict=True):
        old = olds[phase, arm]
        mesh = _draw_heatmap(axes, _shares(counts).reindex(old.union(counts.index)), old, most)
        kept, born = len(old.intersection(counts.index)), len(counts.index.difference(old))
        what = f"{len(old)} experts" if phase == START else f"{kept} of {len(old)} experts kept, {born} born"
        busiest = f"the busiest takes {_busiest(counts):.0f} % of all tokens"
        axes.set_title(wrapped(f"{phase_label(phase)} {arm}: {what}, {busiest}", 44))
    figure.colorbar(mesh, ax=panels, label="share of the class's tokens, %", shrink=0.6, aspect=25)
    after = [_busiest(counts) for (phase, _), counts in shown.items() if phase != START]
    then = f", and {min(after):.0f} to {max(after):.0f} % at the end of the other phases" if after else ""
    title = f"The busiest expert takes {_busiest(shown[START, BASELINE]):.0f} % of all tokens in 7a{then}"
    key = f"(seed {routing['seed'].iloc[0]}, block {BLOCK}; grey: removed, +: born)"
    figure.suptitle(f"{title}\n{key}", x=0.01, ha="left")
    return figure


def _mark_surgeries(axes: Axes, surgeries: pd.DataFrame, arms: list[str]) -> None:
    """Draw a strip below the curves: a row for each arm and operation, its marks the larger, the more seeds."""
    rows = [
        (arm, str(operation), steps.value_counts())
        for arm in arms
        for operation, steps in surgeries[surgeries["arm"] == arm].groupby("operation")["step"]
    ]
    low, high = axes.get_ylim()
    share = 0.05 * len(rows) + 0.02  # of the height of the panel
    axes.set_ylim(low - (high - low) * share / (1 - share), high)
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= high])  # the strip is no place of accuracies
    for level, (arm, operation, counts) in enumerate(rows):
        heights, sizes = np.full(len(counts), 0.03 + 0.05 * level), 10 + 25 * counts / counts.max()
        look: dict[str, Any] = {"marker": MARKERS.get(operation, PLUGIN_MARKER), "color": COLOURS[arms.index(arm)]}
        axes.scatter(counts.index, heights, sizes, linewidth=0, transform=axes.get_xaxis_transform(), **look)


def _compare_endings(rows: pd.DataFrame, control: pd.DataFrame, confidence: float) -> str:
    """Return where the routing entropy of an arm ends, and whether it differs from the control; blank without seeds."""
    ends = [part[part["step"] == part["step"].max()].set_index("seed")["routing_entropy"] for part in (rows, control)]
    pairs = ends[0].sub(ends[1]).round(9).dropna()
    if pairs.empty:
        return ""
    _, lo, hi = mean_interval(pairs, confidence)
    verdict = "above" if lo > 0 else "below" if hi < 0 else "the same as" if lo == hi == 0 else "not apart from"
    return f"ends at {number(ends[0].mean(), 3)}, {verdict} the control"


def _gone(loads: pd.DataFrame, surgeries: pd.DataFrame) -> set[int]:
    """Return the experts that are not there in the end: removed by an operation, or retired by a handover."""
    shrinking = surgeries[surgeries["n_routed_after"] < surgeries["n_routed_before"]]
    last = loads[loads["step"] == loads["step"].max()]
    return set(shrinking["expert"]) | set(loads["expert"]) - set(last["expert"])


def _draw_tree(axes: Axes, loads: pd.DataFrame, surgeries: pd.DataFrame, most: float) -> None:
    """Draw the lineage of one arm."""
    grown = surgeries["n_routed_after"] > surgeries["n_routed_before"]
    births = {
        row.expert + further: row
        for row in rows_of(surgeries[grown])
        for further in range(row.n_routed_after - row.n_routed_before)
    }
    removed = _gone(loads, surgeries)
    experts = {expert: rows_of(rows) for expert, rows in loads.groupby("expert")}
    parents = {expert: birth.parent for expert, birth in births.items() if birth.parent in experts}
    place = {expert: y for y, expert in enumerate(_descendants(None, experts, parents))}
    for expert, points in experts.items():
        y, birth = place[expert], births.get(expert)
        steps = [birth.step if birth else 0, *(point.step for point in points)]
        colour = drawing.BLUE if birth else drawing.VERMILION if expert in removed else drawing.GREY
        shares = np.array([points[0].share, *(point.share for point in points)])  # of the steps up to each point
        half = THINNEST + (WIDEST - THINNEST) * shares / most
        axes.fill_between(steps, y - half, y + half, step="pre", color=colour, linewidth=0)
        if expert in parents:
            axes.plot([steps[0]] * 2, [place[parents[expert]], y], color=drawing.BLUE, linewidth=0.7)
        if expert in removed:
            axes.plot(steps[-1], y, "X", color=drawing.VERMILION, markersize=6)
    axes.set_yticks(range(len(place)), [str(expert) for expert in place], fontsize=7)
    axes.set(xlim=(0, loads["step"].max() * 1.01), ylim=(len(place) - 0.4, -0.6))
    axes.set(xlabel="training step", ylabel="expert")


def _descendants(ancestor: Any, experts: Iterable[Any], parents: dict[Any, Any]) -> list[Any]:
    """Return the experts below an ancestor, the latest child nearest, so that few branches cross another's line."""
    children = sorted((one for one in experts if parents.get(one) == ancestor), reverse=ancestor is not None)
    return [expert for child in children for expert in (child, *_descendants(child, experts, parents))]


def _busiest(counts: pd.DataFrame) -> float:
    """Return the share (percent) of all tokens that the busiest expert gets; counts (experts, classes)."""
    return float(100 * counts.sum(axis=1).max() / max(1, counts.to_numpy().sum()))


def _shares(counts: pd.DataFrame) -> pd.DataFrame:
    """Return tokens (experts, classes) as percent of each class; a class without tokens stays at 0."""
    return 100 * counts / counts.sum(axis=0).clip(lower=1)


def _draw_heatmap(axes: Axes, shares: pd.DataFrame, old: "pd.Index[Any]", most: float) -> QuadMesh:
    """Draw one panel of `expert_routing`; rows without numbers are the removed experts."""
    many = shares.size > 1500  # then as pixels, without white lines between the cells
    edges: dict[str, Any] = {"edgecolors": "none"} if many else {"edgecolors": "white", "linewidth": 0.5}
    values = np.ma.masked_invalid(shares.to_numpy(dtype=float))
    mesh = axes.pcolormesh(values, cmap="Blues", vmin=0, vmax=most, rasterized=many, **edges)
    axes.set_facecolor("#bbbbbb")
    names = [str(expert) if expert in old else f"+{expert}" for expert in shares.index]
    every = ceil(len(names) / 40)
    axes.set_yticks(np.arange(0, len(names), every) + 0.5, names[::every], fontsize=7)
    labels = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in map(str, shares.columns)]
    every, upright = ceil(len(labels) / 34), len(labels) > 25 or max(map(len, labels)) > 3
    axes.set_xticks(np.arange(0, len(labels), every) + 0.5, labels[::every], fontsize=7, parse_math=False)
    axes.tick_params(axis="x", rotation=90 if upright else 0)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set(xlabel="class", ylabel="expert")
    return mesh
