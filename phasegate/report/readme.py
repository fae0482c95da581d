"""The README's block of results, written from the committed tables: `python -m phasegate.report.readme`."""

import re
from pathlib import Path

import pandas as pd

from phasegate.params import load_params
from phasegate.report.tables import markdown_rows, rule

COLUMNS = ["phase", "arm", "verdict", "accuracy, %", "difference, pp", "experts"]
BLOCK = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)


def refreshed(readme: str, decisions: pd.DataFrame, margin_pp: float, confidence: float) -> str:
    """The README's text with the block between its markers written anew.

    Raises:
        ValueError: if the markers are not there.
    """
    block = "\n".join(["", *markdown_rows(decisions, COLUMNS), "", rule(margin_pp, confidence), "", ""])
    text, count = BLOCK.subn(lambda _: block, readme)
    if count != 1:
        raise ValueError("README.md must hold the markers <!-- results --> and <!-- /results --> once")
    return text


if __name__ == "__main__":
    path, claims = Path("README.md"), load_params().decisions
    decisions = pd.read_csv("reports/decisions.csv")
    path.write_text(refreshed(path.read_text(), decisions, claims.margin_pp, claims.confidence))
