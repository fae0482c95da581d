"""The README's blocks of results, written from the committed tables: `python -m phasegate.report.readme`."""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from phasegate.params import START, load_params
from phasegate.report.attribution_tables import attribution_findings
from phasegate.report.signal_tables import signal_findings
from phasegate.report.surgery_tables import surgery_finding
from phasegate.report.tables import failed_lines, markdown_rows, rule
from phasegate.table_files import read_table

TABLES = ("decisions", "attribution", "surgery_summary", "signal_summary", "surgeries", "failures")
COLUMNS = ["phase", "arm", "verdict", "accuracy, %", "difference, pp", "experts"]


def refreshed(readme: str, tables: Mapping[str, pd.DataFrame], margin_pp: float, confidence: float) -> str:
    """The README's text with what stands between its markers written anew: primary arms, and findings.

    Raises:
        ValueError: if the markers are not there.
    """
    decisions = tables["decisions"]
    first = decisions[decisions["primary"].astype(bool) | (decisions["phase"] == START)]
    results = [*markdown_rows(first, COLUMNS), "", rule(margin_pp, confidence), *failed_lines(tables["failures"])]
    surgery = surgery_finding(tables["surgery_summary"])
    signals = signal_findings(tables["signal_summary"], decisions, tables["surgeries"], confidence)
    broken = attribution_findings(tables["attribution"], confidence)
    findings = {"attribution": broken, "surgery": surgery, "signals": signals}
    blocks = {name: [f"- {sentence}" for sentence in sentences] for name, sentences in findings.items()}
    for name, lines in {"results": results, **blocks}.items():
        parts = re.split(rf"(<!-- /?{name} -->\n)", readme)
        if len(parts) != 5:
            raise ValueError(
                f"README.md must hold the markers <!-- {name} --> and <!-- /{name} --> once, each on a line"
            )
        readme = "".join([*parts[:2], "\n", "\n".join(lines), "\n\n", *parts[3:]])
    return readme


if __name__ == "__main__":
    path, claims = Path("README.md"), load_params().decisions
    tables = {name: read_table(Path(f"reports/{name}.csv")) for name in TABLES}
    path.write_text(refreshed(path.read_text(), tables, claims.margin_pp, claims.confidence))
