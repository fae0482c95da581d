"""The README's block of results, written from the committed tables: `python -m phasegate.report.readme`."""

import re
from pathlib import Path

import pandas as pd

from phasegate.report.tables import markdown_rows

COLUMNS = ["phase", "arm", "verdict", "accuracy, %", "difference, pp", "experts"]
BLOCK = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)


def refreshed(readme: str, decisions: pd.DataFrame) -> str:
    """The README's text with the block between its markers written anew.

    Raises:
        ValueError: if the markers are not there.
    """
    block = "\n".join(["", *markdown_rows(decisions, COLUMNS), "", ""])
    text, count = BLOCK.subn(lambda _: block, readme)
    if count != 1:
        raise ValueError("README.md must hold the markers <!-- results --> and <!-- /results --> once")
    return text


if __name__ == "__main__":
    path = Path("README.md")
    path.write_text(refreshed(path.read_text(), pd.read_csv("reports/decisions.csv")))
