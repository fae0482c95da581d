"""The README's blocks of results, written from the committed tables: `python -m phasegate.report.readme`."""

import re
from pathlib import Path

import pandas as pd

from phasegate.decisions import START
from phasegate.params import load_params
from phasegate.report.surgery_tables import surgery_finding
from phasegate.report.tables import markdown_rows, rule

COLUMNS = ["phase", "arm", "verdict", "accuracy, %", "difference, pp", "experts"]


def refreshed(readme: str, decisions: pd.DataFrame, summary: pd.DataFrame, margin_pp: float, confidence: float) -> str:
    """The README's text with what stands between its markers written anew: primary arms, and the surgery study.

    Raises:
        ValueError: if the markers are not there.
    """
    first = decisions[decisions["primary"].astype(bool) | (decisions["phase"] == START)]
    results = [*markdown_rows(first, COLUMNS), "", rule(margin_pp, confidence)]
    findings = [f"- {sentence}" for sentence in surgery_finding(summary)]
    for name, lines in {"results": results, "surgery": findings}.items():
        parts = re.split(rf"(<!-- /?{name} -->\n)", readme)
        if len(parts) != 5:
            raise ValueError(
                f"README.md must hold the markers <!-- {name} --> and <!-- /{name} --> once, each on a line"
            )
        readme = "".join([*parts[:2], "\n", "\n".join(lines), "\n\n", *parts[3:]])
    return readme


if __name__ == "__main__":
    path, claims = Path("README.md"), load_params().decisions
    decisions = pd.read_csv("reports/decisions.csv")
    summary = pd.read_csv("reports/surgery_summary.csv")
    path.write_text(refreshed(path.read_text(), decisions, summary, claims.margin_pp, claims.confidence))
