"""Thirty splits leave the function as it was; thirty clones do not."""

from pathlib import Path

import pandas as pd
import pytest

from phasegate.surgery.in_a_row import in_a_row
from phasegate.training.batches import Examples
from phasegate.training.checkpoint import load
from phasegate.training.predictions import correct


@pytest.mark.parametrize("operation", ["split", "clone"])
def test_splits_in_a_row_keep_the_function_and_clones_do_not(
    operation: str, prepared: Path, baselines: Path, gate: Examples
) -> None:
    table = in_a_row(prepared, baselines / "seed-0", 3, operation, 30)
    assert table.columns.tolist() == ["seed", "operation", "done", "output_change", "accuracy"]
    assert table["done"].tolist() == list(range(1, 31))
    assert (table["seed"] == 3).all() and (table["operation"] == operation).all()
    if operation == "split":
        accuracy = 100 * correct(load(baselines / "seed-0", gate).model, gate) / len(gate)
        assert (table["output_change"] == 0).all() and (table["accuracy"] == accuracy).all()
    else:
        assert (table["output_change"] > 1e-2).all() and table["accuracy"].between(0, 100).all()
    again = in_a_row(prepared, baselines / "seed-0", 3, operation, 5)  # a count only ends the rows
    pd.testing.assert_frame_equal(again, table[:5], check_exact=True)


def test_another_seed_clones_other_experts(prepared: Path, baselines: Path) -> None:
    one, other = (in_a_row(prepared, baselines / "seed-0", seed, "clone", 5) for seed in (3, 4))
    assert not one["output_change"].equals(other["output_change"])
