"""Collect the evaluations of all phases, reach verdicts, and write the tables."""

import pandas as pd

from phasegate.attribution import attribution
from phasegate.data import load_meta
from phasegate.decisions import decide, leaderboard, relabel_control
from phasegate.errors import UserError
from phasegate.files import write_atomic
from phasegate.params import Params
from phasegate.report.tables import decisions_markdown
from phasegate.sections import load_yaml
from phasegate.signal_summary import signal_summary
from phasegate.stage import EVALUATED, MODELS, PREPARED, REPORTS, run
from phasegate.study import EVALUATED_PHASES
from phasegate.surgery_summary import surgery_summary
from phasegate.table_files import read_table


def main(params: Params) -> None:
    """Write the tables of `reports/`."""
    claims = params.decisions
    names = ("trials", "classes", "tasks", "routing", "loads", "curves", "surgeries", "halves", "failures")
    tables = {name: collect(name) for name in names}
    primary = {phase: claim.primary for phase, claim in params.claims().items()}
    failures = relabel_control(tables["failures"])
    decisions = decide(tables["trials"], claims.margin_pp, claims.confidence, primary, failures)
    hypotheses = {phase: claim.hypothesis for phase, claim in params.claims().items()}
    for name, table in tables.items():
        write(name, relabel_control(table))
    summary = surgery_summary(tables["surgeries"], tables["halves"], tables["curves"], decisions, claims.confidence)
    write("decisions", decisions)
    write("attribution", attribution(tables["trials"], claims.confidence, failures))
    write("surgery_summary", summary)
    write("signal_summary", signal_summary(read_table(REPORTS / "signals.csv"), claims.confidence))
    write_atomic(REPORTS / "decisions.json", decisions.to_json(orient="records", indent=2) + "\n")
    markdown = decisions_markdown(decisions, failures, hypotheses, claims.margin_pp, claims.confidence)
    write_atomic(REPORTS / "decisions.md", markdown)
    references = params.references_of(load_meta(PREPARED).name)
    published = {name: model.published for name, model in references.items() if model.published is not None}
    write(
        "leaderboard_q1",
        leaderboard(results("q1"), chosen("q1"), claims.confidence, results("references"), tables["trials"], published),
    )
    write("leaderboard_q2", leaderboard(results("q2"), chosen("q2"), claims.confidence))


def collect(name: str) -> pd.DataFrame:
    """One table of all phases. Routing and loads are kept for one seed, the first that has any: for looking at."""
    parts = [read_table(EVALUATED / phase / f"{name}.csv") for phase in EVALUATED_PHASES]
    table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    return table[table["seed"] == table["seed"].min()] if name in ("routing", "loads") else table


def results(search: str) -> pd.DataFrame:
    """A search's trials."""
    return read_table(MODELS / f"{search}.csv")


def chosen(search: str) -> str:
    """The candidate that a search chose."""
    content = load_yaml(path := MODELS / f"{search}.yaml")
    if not isinstance(content, dict) or "candidate" not in content:
        raise UserError(f"{path} names no candidate: `dvc repro` makes it again")
    return str(content["candidate"])


def write(name: str, table: pd.DataFrame) -> None:
    """A table of `reports/`, to ten significant digits."""
    write_atomic(REPORTS / f"{name}.csv", table.to_csv(index=False, float_format="%.10g"))


if __name__ == "__main__":
    run(main)
