"""Draw the figures and write the page, from the tables of `reports/` alone."""

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from phasegate.data import load_meta
from phasegate.files import write_atomic
from phasegate.params import Params
from phasegate.report import attribution_plots, drawing, html, lineage_plots, plots, signal_plots, surgery_plots
from phasegate.stage import PREPARED, REPORTS, run
from phasegate.table_files import read_table

TABLES = (
    *("decisions", "attribution", "curves", "loads", "routing", "surgeries", "surgery_summary", "signal_summary"),
    *("halves", "preservation", "tasks", "failures", "leaderboard_q1", "leaderboard_q2"),
)
LIBRARIES = ("torch", "numpy", "scipy", "pandas", "dvc")


def main(params: Params) -> None:
    """Write every figure as SVG and PNG, and `reports/report.html`."""
    claims = params.decisions
    table = {name: read_table(REPORTS / f"{name}.csv") for name in TABLES}
    decisions, surgeries, summary = table["decisions"], table["surgeries"], table["surgery_summary"]
    figures = {
        "differences": plots.differences(decisions, claims.margin_pp),
        "learning_curves": plots.learning_curves(
            table["curves"], decisions, claims.margin_pp, claims.confidence, surgeries
        ),
        "attribution": attribution_plots.attribution(table["attribution"], claims.confidence),
        "lineage": lineage_plots.lineage(table["loads"], surgeries, decisions),
        "entropy": lineage_plots.entropy(table["curves"], decisions, claims.confidence),
        "expert_routing": plots.expert_routing(table["routing"], decisions),
        "surgery": surgery_plots.surgery(summary, surgeries, claims.margin_pp),
        "halves": surgery_plots.halves(table["preservation"], table["halves"], summary, params.p7b.steps),
        "signals": signal_plots.signals(table["signal_summary"], claims.confidence),
        "regret": signal_plots.regret(table["signal_summary"], claims.confidence),
        "leaderboard_q1": plots.leaderboard(table["leaderboard_q1"], "Q1"),
        "leaderboard_q2": plots.leaderboard(table["leaderboard_q2"], "Q2"),
    }
    for name, figure in figures.items():
        drawing.save(figure, REPORTS / name)
    page = html.render(
        table,
        {name: (REPORTS / f"{name}.svg").read_text() for name in figures},
        html.Claims(
            {phase: claim.hypothesis for phase, claim in params.claims().items()}, claims.margin_pp, claims.confidence
        ),
        data=load_meta(PREPARED).name,
        provenance=provenance(params),
    )
    write_atomic(REPORTS / "report.html", page)


def provenance(params: Params) -> dict[str, object]:
    """What the results came from: data hashes, parameters, versions, and the machine."""
    meta = load_meta(PREPARED)
    hashes = {name: array.sha256 for name, array in meta.arrays.items()}
    versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
    return {
        "command": "dvc repro",
        "data": {"name": meta.name, "sha256": hashes},
        "versions": versions,
        "machine": {
            "system": platform.platform(terse=True),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads_per_trial": 1,
        },
        "parameters": json.loads(params.model_dump_json(exclude={"headline"})),
    }


def processor() -> str:
    """What this machine's processor is called."""
    listed = Path("/proc/cpuinfo")  # Linux
    names = re.findall(r"model name\s*: (.+)", listed.read_text()) if listed.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    run(main)
