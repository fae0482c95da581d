"""The blocks of results in README.md and docs/, from the committed tables: `make docs`.

A block stands between two markers, `<!-- results -->` and `<!-- /results -->`, each on a line of its own.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import yaml

from phasegate.decisions import CONTROL
from phasegate.errors import told_by
from phasegate.estimates import made_by, studies_below
from phasegate.files import read_json, write_atomic
from phasegate.params import load_params
from phasegate.report.attribution_tables import attribution_findings
from phasegate.report.pipeline import mermaid
from phasegate.report.signal_tables import signal_findings
from phasegate.report.surgery_tables import surgery_finding
from phasegate.report.tables import (
    MINUS,
    changed_nothing,
    data_label,
    escaped,
    failed_lines,
    hypothesis,
    interval,
    outcome,
    phase_label,
    rows_of,
    rule,
    verdict,
)
from phasegate.study import START
from phasegate.table_files import read_table

DOCUMENTS = ("README.md", "docs/study.md", "docs/architecture.md")
TABLES = ("decisions", "attribution", "surgery_summary", "signal_summary", "surgeries", "failures")
Study = Mapping[str, pd.DataFrame]
"""The tables of `TABLES`, by name."""


def blocks(
    studies: Mapping[str, Study], hypotheses: Mapping[str, str], margin_pp: float, confidence: float
) -> dict[str, str]:
    """The text of every block of results.

    Args:
        studies: by the data set's name; the first is the one whose findings are told.
    """
    study = next(iter(studies.values()))
    decisions = study["decisions"]
    told = {
        "attribution": attribution_findings(study["attribution"], confidence),
        "surgery": surgery_finding(study["surgery_summary"]),
        "signals": signal_findings(study["signal_summary"], decisions, study["surgeries"], confidence),
    }
    results = side_by_side({name: tables["decisions"] for name, tables in studies.items()})
    for name, tables in studies.items():
        results += failed_lines(tables["failures"], f"Failed trials on {data_label(name)}")
    return {
        "results": "\n".join(results),
        "reading": reading(margin_pp, confidence),
        "rule": rule(margin_pp, confidence),
        "phases": "\n".join(claims(studies, hypotheses, margin_pp)),
        **{name: "\n".join(f"- {sentence}" for sentence in sentences) for name, sentences in told.items()},
    }


def side_by_side(decisions: Mapping[str, pd.DataFrame]) -> list[str]:
    """The primary arms of several data sets as one Markdown table: verdicts, and differences in pp with intervals."""
    lines = [f"| phase | arm | {' | '.join(map(data_label, decisions))} |", "| --- |" + " --- |" * (1 + len(decisions))]
    rows = [_primary(table) for table in decisions.values()]
    for key in dict.fromkeys(key for table in rows for key in table):
        cells = [table.get(key, "") for table in rows]
        lines.append(f"| {phase_label(key[0])} | {escaped(key[1])} | {' | '.join(cells)} |")
    return lines


def reading(margin_pp: float, confidence: float) -> str:
    """How to read the table, in short; `tables.rule` has it all."""
    bound, full = f"{MINUS}{margin_pp:g} pp", "[the rule in full](docs/study.md#how-it-is-decided)"
    return (
        f"Test accuracy minus that of `{CONTROL}`, the same checkpoints trained as long with nothing added: means over "
        f"pairs of seeds, in percentage points, with {100 * confidence:g} % intervals. GO: the interval lies at or "
        f"above {bound}. NO-GO: it lies below. INCONCLUSIVE: neither ({full})."
    )


def speed(bench: pd.DataFrame) -> list[str]:
    """What `make bench` measured, as a Markdown table; a ratio above one means that ours takes less time."""
    lines = ["| case | threads | ours | limit's time / ours | best peer's time / ours |", "|" + " --- |" * 5]
    for row in rows_of(bench):
        limit = "" if pd.isna(row.ratio_to_limit) else f"{row.ratio_to_limit:.2f}"
        peer = "" if pd.isna(row.ratio_to_best_peer) else f"{row.ratio_to_best_peer:.2f} ({row.best_peer})"
        taken = f"{row.ours_ms:,.2f} ms" if row.ours_ms < 10_000 else f"{row.ours_ms / 1000:,.0f} s"
        lines.append(f"| {row.case} | {row.threads} | {taken} | {limit} | {escaped(peer)} |")
    return lines


def _primary(decisions: pd.DataFrame) -> dict[tuple[str, str], str]:
    """By phase and arm the verdict and the difference; of 7a, which is not on trial, the accuracy."""
    found = {}
    for row in rows_of(decisions):
        if row.phase == START:
            found[row.phase, row.arm] = f"{verdict(row)}: {interval(row.accuracy, row.accuracy_lo, row.accuracy_hi)} %"
        elif row.primary:
            difference = interval(row.delta_pp, row.delta_lo, row.delta_hi, signed=True)
            found[row.phase, row.arm] = f"**{verdict(row)}**: {difference} pp" + (
                ", it changed nothing" if changed_nothing(row) else ""
            )
    return found


def claims(studies: Mapping[str, Study], hypotheses: Mapping[str, str], margin_pp: float) -> Iterator[str]:
    """Each phase's hypothesis, and what came of it on every data set, as a Markdown list."""
    for phase in dict.fromkeys(phase for tables in studies.values() for phase in tables["decisions"]["phase"]):
        if phase == START:
            continue
        yield f"- **{phase_label(phase)}** {hypothesis(hypotheses, phase)}"
        for name, tables in studies.items():
            decisions = tables["decisions"]
            for row in rows_of(decisions[(decisions["phase"] == phase) & decisions["primary"].astype(bool)]):
                yield f"  - {data_label(name)}: {escaped(outcome(row, decisions, margin_pp))}"


def refreshed(text: str, written: Mapping[str, str]) -> str:
    """A document with its blocks written anew; it need not hold them all.

    Raises:
        ValueError: if a block has no end, stands there twice, or is not known.
    """
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
        parts = re.split(rf"^(<!-- /?{name} -->\n)", text, flags=re.MULTILINE)
        if len(parts) != 5 or name not in written:
            raise ValueError(f"the block {name} must be one of {', '.join(written)}, and begin and end once")
        text = "".join([*parts[:2], "\n", written[name], "\n\n", *parts[3:]])
    return text


def written(root: Path) -> dict[str, str]:
    """All blocks, from the committed results below `root`, the lock files of the runs that made them, and dvc.yaml."""
    now = load_params(root / "params.yaml")
    runs = [(folder, made_by(lock, now)) for folder, lock in studies_below(root)]
    params, studies = runs[0][1], dict[str, Study]()
    for folder, made in runs:
        if made.data.name not in studies:  # the workspace's own counts, where a folder has the same data set
            studies[made.data.name] = {table: read_table(folder / f"{table}.csv") for table in TABLES}
    hypotheses = {phase: claim.hypothesis for phase, claim in params.claims().items()}
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    return {
        **blocks(studies, hypotheses, params.decisions.margin_pp, params.decisions.confidence),
        "pipeline": f"```mermaid\n{mermaid(stages)}\n```",
        "speed": "\n".join(speed(pd.DataFrame(read_json(root / "reports/bench.json")))),
    }


if __name__ == "__main__":
    with told_by("docs"):
        texts = written(Path())
        for document in map(Path, DOCUMENTS):
            write_atomic(document, refreshed(document.read_text(), texts))
