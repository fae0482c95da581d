"""Read and write the tables that stages leave for each other, as CSV files."""

from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd

from phasegate.base.errors import UserError, one_line
from phasegate.base.files import refuse_special, write_atomic

NAMES = ("arm", "candidate", "class", "operation", "signal", "task")  # columns of names that people choose
COSTS = ["params_total", "params_active", "flops_per_example"]  # columns of what models cost
DECIMALS = 9  # accuracies are 100 * counts / N: smaller differences are rounding errors


def write_table(path: Path, table: pd.DataFrame, digits: int | None = 10) -> None:
    """Write a table, without its index; `digits` is the number of significant ones, None for all."""
    write_atomic(path, table.to_csv(index=False, float_format=None if digits is None else f"%.{digits}g"))


def read_table(path: Path, columns: Iterable[str] = ()) -> pd.DataFrame:
    """Return the table in a CSV file; `UserError` if the file is missing, is no table, or lacks one of `columns`."""
    refuse_special(path)
    try:
        table = parse_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `dvc repro` runs the stage that writes it") from None
    except (OSError, ValueError, OverflowError) as error:  # pandas' own are ValueErrors
        raise UserError(f"{path} is damaged ({one_line(error)}): `dvc repro` makes it again") from None
    if lacking := [column for column in columns if column not in table.columns]:
        raise UserError(f"{path} is damaged (it lacks the column {lacking[0]}): `dvc repro` makes it again")
    return table


def parse_table(source: Path | TextIO) -> pd.DataFrame:
    """Parse CSV: blank cells are missing, but "null", "NA" or "true" are names like any other."""
    return pd.read_csv(source, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=[""])


def check_numbers(table: pd.DataFrame, numbers: list[str], keys: list[str]) -> None:
    """Raise `UserError` for a missing column, a repeated key, or a number that isn't finite."""
    if missing := [column for column in [*keys, *numbers] if column not in table.columns]:
        raise UserError(f"the table lacks the column {missing[0]}: it has {', '.join(table.columns)}")
    repeated = table.duplicated(keys)
    if repeated.any():
        raise UserError(f"{_describe_key(table[repeated], keys)} is in the table twice")
    for column in numbers:
        bad = ~np.isfinite(table[column].to_numpy(dtype=np.float64))
        if bad.any():
            raise UserError(f"{column} of {_describe_key(table[bad], keys)} is {table[column][bad].iloc[0]}")


def _describe_key(rows: pd.DataFrame, keys: list[str]) -> str:
    return ", ".join(f"{key} {rows[key].iloc[0]}" for key in keys)
