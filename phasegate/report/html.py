"""The report page: one self-contained HTML file without scripts or anything fetched from a network."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from phasegate.report import attribution_tables, signal_tables, surgery_tables, tables
from phasegate.report.story import story_cells

CAPTIONS = {
    "differences": "Difference of each arm from the control",
    "attribution": "What each ingredient of an arm does",
    "learning_curves": "Learning curves and surgeries",
    "lineage": "Lineages of the experts, with their load over time",
    "entropy": "Routing entropy over time",
    "expert_routing": "Which expert serves which class",
    "surgery": "What each kind of surgery does, at once and in the end",
    "halves": "What operations in a row leave of the function, and what becomes of the halves of a split",
    "signals": "How well each signal tells what surgery will do",
    "regret": "What it costs to let each signal choose the experts that go",
    "leaderboard_q1": "Search of the training configuration (7a Q1)",
    "leaderboard_q2": "Search of the architecture (7a Q2)",
}


class Claims(NamedTuple):
    """What was written before the run."""

    hypotheses: Mapping[str, str]  # by phase
    margin_pp: float
    confidence: float


def render(
    table: Mapping[str, pd.DataFrame],
    figures: Mapping[str, str],
    claims: Claims,
    data: str,
    provenance: Mapping[str, object],
) -> str:
    """The whole page as HTML.

    Args:
        table: the tables of `reports/`, by name; that of the tasks may be empty.
        figures: SVG text from `drawing.svg`, by the names of `CAPTIONS`.
        data: name of the data set.
        provenance: what the results came from; may nest mappings.

    Raises:
        UserError: for a phase without a hypothesis.
    """
    decisions, summary = table["decisions"], table["surgery_summary"]
    leaderboards = {name: table[f"leaderboard_{name}"] for name in ("q1", "q2")}
    return _template().render(
        data=tables.data_label(data),
        seeds=int(decisions["n_seeds"].max()),
        phases=_phases(decisions, claims),
        rule=tables.rule(claims.margin_pp, claims.confidence),
        decisions=tables.decision_cells(decisions),
        failures=tables.failure_list(table["failures"]),
        primary=list(decisions["primary"]),
        costs=tables.cost_cells(decisions),
        story=story_cells(decisions, leaderboards),
        figures={
            name: {"name": name, "caption": CAPTIONS[name], "svg": inline_svg(svg, name)}
            for name, svg in figures.items()
        },
        broken=attribution_tables.attribution_findings(table["attribution"], claims.confidence),
        attribution=attribution_tables.attribution_cells(table["attribution"]),
        findings=signal_tables.signal_findings(
            table["signal_summary"], decisions, table["surgeries"], claims.confidence
        ),
        signals=signal_tables.signal_cells(table["signal_summary"], claims.confidence),
        surgeries=surgery_tables.surgery_cells(summary) if len(summary) > 1 else [],
        dead=surgery_tables.dead_finding(table["curves"]),
        halves=surgery_tables.halves_cells(summary),
        tasks=tables.task_cells(table["tasks"], claims.confidence),
        leaderboards={name: tables.leaderboard_cells(board) for name, board in leaderboards.items()},
        provenance=list(_flat(provenance)),
    )


def _template() -> Template:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")


def _phases(decisions: pd.DataFrame, claims: Claims) -> list[dict[str, str]]:
    """What the page begins with: one card per phase."""
    return [
        {
            "label": tables.phase_label(row.phase),
            "verdict": row.verdict,
            "hypothesis": tables.hypothesis(claims.hypotheses, row.phase),
            "outcome": tables.outcome(row, decisions, claims.margin_pp),
        }
        for row in tables.headline_rows(decisions)
    ]


def inline_svg(svg: str, name: str) -> Markup:
    """A figure's `<svg>` element for a page of several: ids made unique by `name`, size left to the page."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    element = re.sub(r'\b(id=")|((?:xlink:)?href="#)|(url\(#)', rf"\g<0>{name}-", element)
    opening, rest = element.split(">", 1)
    width = re.search(r'\bwidth="([\d.]+)pt"', opening)
    assert width, "matplotlib gives the width of a figure in points"
    opening = re.sub(r'\s(?:width|height)="[^"]*"', "", opening)
    # It shrinks to the page down to 70 % of its size, where its text is still readable, and then scrolls.
    size = f"max-width:{float(width[1]) * 4 / 3:.0f}px;min-width:{float(width[1]) * 4 / 3 * 0.7:.0f}px"
    return Markup(f'{opening} role="img" aria-labelledby="{name}-caption" style="{size}">{rest}')


def _flat(mapping: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as (dotted name, text) pairs."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
