"""Write the blocks of results in README.md and docs/, from the committed tables: `make docs`.

A block stands between two markers, `<!-- results -->` and `<!-- /results -->`, each on its own line.
"""

import re
from collections.abc import Iterator, Mapping
from hashlib import md5
from pathlib import Path

import networkx as nx
import pandas as pd

from phasegate.base.errors import UserError, report_user_errors
from phasegate.base.files import read_json, write_atomic
from phasegate.base.paths import REPORTS, TABLES
from phasegate.params import Params, load_params
from phasegate.params.names import DATA_SETS, START
from phasegate.params.reading import load_yaml
from phasegate.records.tables import read_table
from phasegate.report import story
from phasegate.tools.command import output
from phasegate.verdicts import attribution, signal_summary, surgery_summary, wording

DOCUMENTS = ("README.md", "docs/study.md", "docs/architecture.md")
SPEED = ("case", "threads", "ours", "limit's time / ours", "best peer's time / ours")
NEEDED = ["decisions", "attribution", "surgery_summary", "signal_summary", "surgeries", "failures", "trials"]
NEEDED += story.CELLS_OF
Tables = Mapping[str, pd.DataFrame]
"""The tables of a study, by name; or the decisions of several studies, by data set."""


def written(root: Path) -> dict[str, str]:
    """Write all blocks, from dvc.yaml and committed results below `root`; `UserError` if other parameters made them."""
    studies, params = dict[str, Tables](), load_params(root / "params.yaml")
    for lock in (root / "dvc.lock", *sorted((root / REPORTS).glob("*/dvc.lock"))):
        path = lock.with_name("params.yaml")
        recorded = {each["path"]: each.get("md5") for each in load_yaml(lock)["stages"]["report"]["deps"]}
        if md5(path.read_bytes()).hexdigest() != recorded.get("params.yaml"):
            raise UserError(f"{path} was edited after the results beside it were made: `dvc repro` makes them anew")
        folder = root / TABLES if lock.parent == root else lock.parent / TABLES.name
        name = load_params(path).data.name
        if name not in studies:  # the workspace's own results come first
            studies[name] = {table: read_table(folder / f"{table}.csv") for table in NEEDED}
    return {
        **blocks(studies, params),
        "pipeline": f"```mermaid\n{flowchart(output('dvc', 'dag', '--mermaid', folder=root))}\n```",
        "speed": "\n".join(speed(pd.DataFrame(read_json(root / REPORTS / "bench.json")))),
    }


def blocks(studies: Mapping[str, Tables], params: Params) -> dict[str, str]:
    """Write every block of results from studies by data set: the findings are the first one's."""
    study, confidence = next(iter(studies.values())), params.decisions.confidence
    answer, *others = answers(studies, params)
    findings = {
        "attribution": attribution.attribution_findings(study["attribution"], confidence),
        "surgery": surgery_summary.surgery_finding(study["surgery_summary"]),
        "signals": signal_summary.signal_findings(
            study["signal_summary"], study["decisions"], study["surgeries"], confidence
        ),
    }
    decisions = {name: tables["decisions"] for name, tables in studies.items()}
    named = {DATA_SETS[name]: table for name, table in decisions.items()}
    results = wording.markdown_table(story.story_table(named, params))
    for name, tables in studies.items():
        results += wording.failed_lines(tables["failures"], f"Failed trials on {DATA_SETS[name]}")
    return {
        "answer": answer,
        "elsewhere": "\n\n".join(others),
        "results": "\n".join(results),
        "verdicts": "\n".join(side_by_side(decisions)),
        **{name: "\n".join(wording.markdown_table(cells(study[name]))) for name, cells in story.CELLS_OF.items()},
        "rule": wording.rule(study["decisions"], params.decisions),
        "phases": "\n".join(claims(decisions, params)),
        **{name: "\n".join(f"- {sentence}" for sentence in sentences) for name, sentences in findings.items()},
    }


def answers(studies: Mapping[str, Tables], params: Params) -> Iterator[str]:
    """Write the answer of every study as a Markdown list, a point for each question, below its data set."""
    for name, tables in studies.items():
        seeds = int(tables["decisions"]["n_seeds"].max())
        how = f"test accuracy in percentage points (pp), [{100 * params.decisions.confidence:g} % interval], (verdict):"
        head = f"**{DATA_SETS[name]}**, {seeds} seed{'s' * (seeds != 1)} per arm; differences of {how}\n"
        yield "\n".join([head, *(f"- {wording.escaped(paragraph)}" for paragraph in story.answer(tables, params))])


def side_by_side(decisions: Tables) -> list[str]:
    """Write the primary arms of several data sets as one Markdown table."""
    columns = {DATA_SETS[name]: primary_cells(table) for name, table in decisions.items()}
    rows = [
        {"phase": wording.phase_label(phase), "arm": arm}
        | {name: cells.get((phase, arm), "") for name, cells in columns.items()}
        for phase, arm in dict.fromkeys(key for cells in columns.values() for key in cells)
    ]
    return wording.markdown_table(rows)


def primary_cells(decisions: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Write by phase and arm the verdict and the difference; for 7a, which is not on trial, the accuracy."""
    found = {}
    for row, cells in zip(wording.rows_of(decisions), wording.decision_cells(decisions), strict=True):
        if row.phase == START:
            found[row.phase, row.arm] = f"{cells['verdict']}: {cells['accuracy, %']} %"
        elif row.primary:
            said = ", ".join(filter(None, [cells["word"], cells["difference, pp"]]))
            found[row.phase, row.arm] = f"**{cells['verdict']}**: {said} pp"
    return found


def claims(decisions: Tables, params: Params) -> Iterator[str]:
    """Write each phase's hypothesis, and its outcome on every data set, as a Markdown list."""
    primary = [(name, table, row) for name, table in decisions.items() for row in wording.headline_rows(table)]
    for phase in dict.fromkeys(row.phase for _, _, row in primary):
        yield f"- **{wording.phase_label(phase)}** {wording.verbatim(wording.stated(params.claims()[phase]))}"
        for name, table, row in primary:
            if row.phase == phase:
                yield f"  - {DATA_SETS[name]}: {wording.escaped(wording.outcome(row, table))}"


def flowchart(dag: str) -> str:
    """Redraw `dvc dag --mermaid`: stages of a matrix as one, no arrow where a longer way leads to the same stage."""
    names = {node: name.partition("@")[0] for node, name in re.findall(r'(\w+)\["([^"]+)"\]', dag)}
    arrows = nx.DiGraph((names[start], names[end]) for start, end in re.findall(r"(\w+)-->(\w+)", dag))
    return "\n".join(["flowchart LR", *(f"    {a} --> {b}" for a, b in sorted(nx.transitive_reduction(arrows).edges))])


def speed(bench: pd.DataFrame) -> list[str]:
    """Write what `make bench` measured as a Markdown table; a ratio above one means that ours takes less time."""
    rows = []
    for row in wording.rows_of(bench):
        ours = f"{row.ours_ms:,.2f} ms" if row.ours_ms < 10_000 else f"{row.ours_ms / 1000:,.0f} s"
        limit, peer = wording.number(row.ratio_to_limit), wording.number(row.ratio_to_best_peer)
        peer += f" ({row.best_peer})" if peer else ""
        rows.append(dict(zip(SPEED, (row.case, str(row.threads), ours, limit, peer), strict=True)))
    return wording.markdown_table(rows)


def refreshed(text: str, blocks: Mapping[str, str]) -> str:
    """Write the blocks of a document anew; raise UserError if one is unknown, or does not begin and end once."""
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
        parts = re.split(rf"^(<!-- /?{name} -->\n)", text, flags=re.MULTILINE)
        if len(parts) != 5 or name not in blocks:
            raise UserError(f"the block {name} must be one of {', '.join(blocks)}, and begin and end once")
        text = "".join([*parts[:2], "\n", blocks[name], "\n\n", *parts[3:]])
    return text


if __name__ == "__main__":
    with report_user_errors("docs"):
        texts = written(Path())
        for document in map(Path, DOCUMENTS):
            write_atomic(document, refreshed(document.read_text(encoding="utf-8"), texts))
