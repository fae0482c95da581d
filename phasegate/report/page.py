"""Write the report page: one HTML file that holds everything, without scripts and without requests to a network."""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from jinja2 import StrictUndefined, Template
from markupsafe import Markup

from phasegate.params import Params
from phasegate.params.names import DATA_SETS
from phasegate.report import story
from phasegate.report.drawing import Tables, unbroken
from phasegate.report.figures import FIGURES
from phasegate.verdicts import attribution, signal_summary, surgery_summary, wording


def render(
    tables: Tables, figures: Mapping[str, str], params: Params, data: str, provenance: Mapping[str, object]
) -> str:
    """Return the page as HTML, with the SVG texts of `FIGURES`, by name, and nested mappings of provenance."""
    decisions, summary = tables["decisions"], tables["surgery_summary"]
    claims, confidence = params.claims(), params.decisions.confidence
    text = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    template = Template(text, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page: str = template.render(
        data=DATA_SETS.get(data, data),
        confidence=f"{100 * confidence:g}",
        seeds=int(decisions["n_seeds"].max()),
        phases=[
            {"label": wording.phase_label(row.phase), "verdict": row.verdict}
            | {"hypothesis": wording.stated(claims[row.phase]), "outcome": wording.outcome(row, decisions)}
            for row in wording.headline_rows(decisions)
        ],
        answer=[unbroken(paragraph) for paragraph in story.answer(tables, params)],
        first=story.story_table({data: decisions}, params),
        **{name: cells(tables[name]) for name, cells in story.CELLS_OF.items()},
        rates=story.rate_cells(tables["rates"]),
        rule=wording.rule(decisions, params.decisions),
        decisions=wording.decision_cells(decisions),
        failures=wording.failure_list(tables["failures"]),
        primary=list(decisions["primary"]),
        costs=wording.cost_cells(decisions),
        figures=[
            entry._asdict() | {"name": name, "svg": inline_svg(figures[name], name)} for name, entry in FIGURES.items()
        ],
        accounts=attribution.attribution_findings(tables["attribution"], confidence),
        attribution=attribution.attribution_cells(tables["attribution"]),
        findings=signal_summary.signal_findings(tables["signal_summary"], decisions, tables["surgeries"], confidence),
        signals=signal_summary.signal_cells(tables["signal_summary"], confidence),
        surgeries=surgery_summary.surgery_cells(summary) if len(summary) > 1 else [],
        dead=surgery_summary.dead_finding(tables["curves"]),
        halves=surgery_summary.halves_cells(summary),
        tasks=wording.task_cells(tables["tasks"], confidence),
        leaderboards={name: wording.leaderboard_cells(tables[f"leaderboard_{name}"]) for name in ("q1", "q2")},
        provenance=pd.json_normalize(dict(provenance)).iloc[0].items(),
    )
    return page


def inline_svg(svg: str, name: str) -> Markup:
    """Return a figure's `<svg>` element for a page of several: ids made unique by `name`, its size left to the page."""
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
