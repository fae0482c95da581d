"""List every figure of the report: a function of the tables and the parameters, whose title is a finding."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from matplotlib.figure import Figure

from phasegate.params import Params
from phasegate.report import growth_plots, signal_plots, surgery_plots, training_plots, verdict_plots
from phasegate.report.drawing import Tables, styled


class Entry(NamedTuple):
    """Describe a figure."""

    section: str  # where the page shows it: `drawn("verdicts")` in page.html.j2 shows all figures of that section
    caption: str
    function: Callable[[Tables, Params], Figure]


FIGURES = {
    "gap": Entry(
        "first", "What growing gains, by the step of growth: means over seeds, with intervals", growth_plots.gap
    ),
    "differences": Entry("first", "Difference of each arm from its control", verdict_plots.differences),
    "attribution": Entry("accounts", "What each ingredient of an arm does", verdict_plots.attribution),
    "learning_curves": Entry("training", "Learning curves and surgeries", training_plots.learning_curves),
    "lineage": Entry("surgeries", "Lineages of the experts, with their load over time", training_plots.lineage),
    "surgery": Entry("surgeries", "What each kind of surgery does, immediately and finally", surgery_plots.surgery),
    "halves": Entry("halves", "Many operations in a row, and how the halves of a split develop", surgery_plots.halves),
    "entropy": Entry("routing", "Routing entropy over time", training_plots.entropy),
    "expert_routing": Entry("routing", "Which expert serves which class", training_plots.expert_routing),
    "signals": Entry(
        "signals", "How well each signal predicts what surgery will do, and tells the dead", signal_plots.signals
    ),
    "regret": Entry("signals", "What it costs to let each signal choose the experts to remove", signal_plots.regret),
    "leaderboard_q1": Entry("q1", "Search for the training configuration", partial(verdict_plots.leaderboard, "q1")),
    "leaderboard_q2": Entry("q2", "Search for the architecture", partial(verdict_plots.leaderboard, "q2")),
}


@styled
def draw(name: str, tables: Tables, params: Params) -> Figure:
    """Return the figure of this name."""
    return FIGURES[name].function(tables, params)
