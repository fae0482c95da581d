"""Thirty splits leave the function as it was; thirty clones do not."""

from pathlib import Path

import pandas as pd
import pytest

from phasegate.checkpoint import load
from phasegate.preservation import in_a_row
from phasegate.training import Examples, correct

COUNT = 30


@pytest.fixture(scope="module")
def rows(prepared: Path, baselines: Path) -> dict[str, pd.DataFrame]:
    return {
        operation: in_a_row(prepared, baselines / "seed-0", 3, operation, COUNT) for operation in ("split", "clone")
    }


@pytest.mark.parametrize("operation", ["split", "clone"])
def test_there_is_a_row_per_operation(operation: str, rows: dict[str, pd.DataFrame]) -> None:
    table = rows[operation]
    assert table.columns.tolist() == ["seed", "operation", "done", "output_change", "accuracy"]
    assert table["done"].tolist() == list(range(1, COUNT + 1))
    assert (table["seed"] == 3).all() and (table["operation"] == operation).all()
    assert table["accuracy"].between(0, 100).all()


def test_splits_in_a_row_keep_the_function(rows: dict[str, pd.DataFrame], baselines: Path, gate: Examples) -> None:
    assert (rows["split"]["output_change"] <= 1e-6).all()
    start = load(baselines / "seed-0", gate).model
    assert (rows["split"]["accuracy"] == 100 * correct(start, gate) / len(gate)).all()


def test_clones_in_a_row_do_not(rows: dict[str, pd.DataFrame]) -> None:
    assert (rows["clone"]["output_change"] > 1e-2).all()


@pytest.mark.parametrize("operation", ["split", "clone"])
def test_a_seed_gives_the_same_rows_and_a_count_only_ends_them(
    operation: str, rows: dict[str, pd.DataFrame], prepared: Path, baselines: Path
) -> None:
    again = in_a_row(prepared, baselines / "seed-0", 3, operation, 5)
    pd.testing.assert_frame_equal(again, rows[operation][:5], check_exact=True)


def test_another_seed_clones_other_experts(rows: dict[str, pd.DataFrame], prepared: Path, baselines: Path) -> None:
    other = in_a_row(prepared, baselines / "seed-0", 4, "clone", 5)
    assert not other["output_change"].equals(rows["clone"]["output_change"][:5])
