"""Collect the evaluations of all phases, reach verdicts, and write the tables."""

import pandas as pd

from phasegate.base.errors import UserError
from phasegate.base.files import write_atomic
from phasegate.base.paths import EVALUATED, MODELS, REPORTS, TABLES
from phasegate.params import Params
from phasegate.params.names import EVALUATED as FOLDERS
from phasegate.params.names import PLUGINS
from phasegate.params.reading import load_yaml
from phasegate.records.predictions import read_predictions
from phasegate.records.tables import read_table, write_table
from phasegate.stage import run
from phasegate.verdicts.arrival import PHASE as ARRIVAL
from phasegate.verdicts.arrival import arrival
from phasegate.verdicts.attribution import attribution
from phasegate.verdicts.decisions import decide
from phasegate.verdicts.growth import growth, mean_rates
from phasegate.verdicts.leaderboard import leaderboard, reference_rows
from phasegate.verdicts.repair import repair
from phasegate.verdicts.sampling import sampling
from phasegate.verdicts.signal_summary import signal_summary
from phasegate.verdicts.surgery_summary import surgery_summary
from phasegate.verdicts.wording import decisions_markdown

COLLECTED = ("trials", "failures", "tasks", "routing", "loads", "curves", "surgeries", "split_halves")


def main(params: Params) -> None:
    """Write `reports/tables/` and `reports/decisions.md`."""
    claims, confidence = params.claims(), params.decisions.confidence
    tables = {name: collect(name) for name in COLLECTED}
    tables |= {name: read_table(MODELS / f"{name}.csv") for name in ("signals", "in_a_row", "rates")}
    trials, failures = tables["trials"], tables["failures"]
    tables["sampling"] = sampling(EVALUATED, claims)
    decisions = decide(tables, claims, params.decisions)
    labels, predictions = read_predictions(EVALUATED / ARRIVAL)
    predictions |= read_predictions(EVALUATED / PLUGINS)[1]
    references = reference_rows(read_table(MODELS / "references.csv"), trials, tables["sampling"], confidence)
    tables |= {
        "decisions": decisions,
        "attribution": attribution(trials, failures, tables["surgeries"], confidence),
        "surgery_summary": surgery_summary(
            tables["surgeries"], tables["split_halves"], tables["curves"], decisions, confidence
        ),
        "growth": growth(tables, claims, confidence),
        "arrival": arrival(labels, predictions, claims, params.p7c2.classes, confidence),
        "repair": repair(tables, claims, params.p7c3.dead / params.p7a.n_routed, confidence),
        "rates": mean_rates(tables["rates"], confidence),
        "signal_summary": signal_summary(tables["signals"], confidence),
        "leaderboard_q1": leaderboard(*search("q1"), confidence, references),
        "leaderboard_q2": leaderboard(*search("q2"), confidence),
    }
    for name, table in tables.items():
        write_table(TABLES / f"{name}.csv", table)
    decisions = read_table(TABLES / "decisions.csv")  # rounded, as figures and documents have it
    write_atomic(REPORTS / "decisions.md", decisions_markdown(decisions, failures, claims, params.decisions))


def collect(name: str) -> pd.DataFrame:
    """Return one table of all phases; routing and loads, which are for looking at, only of the first seed."""
    parts = [read_table(EVALUATED / phase / f"{name}.csv") for phase in FOLDERS]
    table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    return table[table["seed"] == table["seed"].min()] if name in ("routing", "loads") else table


def search(name: str) -> tuple[pd.DataFrame, str, str]:
    """Return the trials of a search, the candidate that it chose, and its winner whatever the number of experts."""
    content = load_yaml(path := MODELS / f"{name}.yaml")
    if not isinstance(content, dict) or "candidate" not in content:
        raise UserError(f"{path} names no candidate: `dvc repro` makes it again")
    chosen = str(content["candidate"])
    return read_table(MODELS / f"{name}.csv"), chosen, str(content.get("winner", chosen))


if __name__ == "__main__":
    run(main)
