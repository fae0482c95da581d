"""Build the leaderboards of the searches, with the reference models below the candidates."""

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from phasegate.base.errors import UserError
from phasegate.params.names import REFERENCES
from phasegate.pretraining.ranking import n_failed, ranked
from phasegate.records.tables import COSTS
from phasegate.verdicts.decisions import of_arm
from phasegate.verdicts.statistics import column_names, interval_columns, mean_interval

COLUMNS = ["candidate", "kind", "rank", "chosen", "winner", "n_seeds", "n_failed", *column_names("accuracy")]
TEST = ["test_accuracy", "test_lo", "test_hi"]
COLUMNS += [*TEST, "published_accuracy", *COSTS, "settings"]


def leaderboard(
    search: pd.DataFrame, chosen: str, winner: str, confidence: float, references: Iterable[dict[str, Any]] = ()
) -> pd.DataFrame:
    """Return the winner of a search, the candidate that is chosen, the others, then the rows of the references.

    The two differ where the winner lacks the baseline's number of experts. Candidates that raced longer come before the
    others, and then those with a higher mean gate accuracy (percent).

    A candidate with a failed trial has no rank: it comes after the others, with the means of its finished trials.
    """
    for name in (chosen, winner):
        if name not in set(search["candidate"]):
            raise UserError(f"the chosen candidate {name} isn't in the search")
    rows = [
        {"kind": "search", "rank": None if n_failed(runs) else rank, "chosen": name == chosen, "winner": name == winner}
        | _describe(name, runs, confidence)
        for rank, (name, runs) in enumerate(ranked(search, (winner, chosen)), start=1)
    ]
    table = pd.DataFrame([*rows, *references]).reindex(columns=COLUMNS)
    return table.astype({"rank": "Int64", "published_accuracy": float})


def reference_rows(
    search: pd.DataFrame, trials: pd.DataFrame, sampling: pd.DataFrame, confidence: float
) -> Iterator[dict[str, Any]]:
    """Yield the reference models as rows, by mean gate accuracy, from `search`; test accuracies are from `trials`.

    Their intervals include what another draw of test examples would change, by `sampling`.
    """
    for name, runs in ranked(search):
        row = {"kind": "reference", "chosen": False, "winner": False} | _describe(name, runs, confidence)
        row["published_accuracy"] = runs["published_accuracy"].iloc[0]
        test = of_arm(trials, REFERENCES, name)["accuracy"]
        further = float(of_arm(sampling, REFERENCES, name)["accuracy_se"].sum())
        measured = mean_interval(test, confidence, further) if len(test) else ()
        yield row | dict(zip(TEST, measured, strict=False))


def _describe(name: str, runs: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """Return a candidate's columns: means over the seeds that finished, blank if none did."""
    done = runs[runs["failure"].isna()]
    row = {"candidate": name, "n_seeds": len(done), "n_failed": n_failed(runs), "settings": runs["settings"].iloc[0]}
    row |= {column: float(done[column].mean()) for column in COSTS}
    return row | (interval_columns("accuracy", done["accuracy"], confidence) if len(done) else {})
