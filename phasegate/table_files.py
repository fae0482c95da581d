"""Tables that one stage leaves for another, as CSV files."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from phasegate.errors import UserError, one_line
from phasegate.files import refuse_special


def read_table(path: Path, columns: Iterable[str] = ()) -> pd.DataFrame:
    """A CSV file as a table, which must have these columns.

    Raises:
        UserError: if the file is missing, is no table, or lacks a column.
    """
    refuse_special(path)
    try:
        table = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `dvc repro` runs the stage that writes it") from None
    except (OSError, ValueError, OverflowError) as error:  # pandas' own are ValueErrors
        raise UserError(f"{path} is damaged ({one_line(error)}): `dvc repro` makes it again") from None
    if lacking := [column for column in columns if column not in table.columns]:
        raise UserError(f"{path} is damaged (it lacks the column {lacking[0]}): `dvc repro` makes it again")
    return table
