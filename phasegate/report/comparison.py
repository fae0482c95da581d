"""The verdicts of a branch beside those of its base, as Markdown for a pull request.

    python -m phasegate.report.comparison origin/main > verdicts.md

Both sides are committed tables: the base's come from git, so no model and no cache is needed.
"""

import io
import subprocess
import sys
from pathlib import Path

import pandas as pd

from phasegate.errors import UserError, told_by
from phasegate.report.tables import escaped, markdown_rows, number, phase_label, rows_of, verdict
from phasegate.table_files import read_table

TABLE = "reports/decisions.csv"
COLUMNS = ["phase", "arm", "verdict", "accuracy, %", "difference, pp", "seeds", "experts"]
SAME = 0.005  # pp or percent that a table of two decimals doesn't show


def comparison(base: pd.DataFrame | None, head: pd.DataFrame, base_name: str) -> str:
    """What changed in the decisions, and all of them: Markdown that ends in a newline.

    Args:
        base: the decisions of the base; None if it has none.
        head: the decisions of the branch.
    """
    lines = ["## Verdicts", ""]
    if base is None:
        lines.append(f"{base_name} has no decisions to compare with.")
    elif changed := changes(base, head):
        lines += [f"Against {base_name}:", "", "| phase | arm | verdict | accuracy, % | difference, pp |"]
        lines += ["|" + " --- |" * 5, *changed]
    else:
        lines.append(f"No verdict and no number differs from {base_name}.")
    primary = head[head["primary"].astype(bool)]
    lines += ["", "Primary arms:", "", *markdown_rows(primary, COLUMNS)]
    lines += ["", "<details><summary>All arms</summary>", "", *markdown_rows(head, COLUMNS), "", "</details>"]
    return "\n".join(lines) + "\n"


def changes(base: pd.DataFrame, head: pd.DataFrame) -> list[str]:
    """A row of Markdown for every arm that is new, gone, or not as it was; a changed verdict is bold."""
    base = base.reindex(columns=head.columns).fillna({"n_failed": 0}).astype({"n_failed": int})  # older ones lack some
    before, after = ({(row.phase, row.arm): row for row in rows_of(table)} for table in (base, head))
    lines = []
    for key in dict.fromkeys([*after, *before]):
        old, new = before.get(key), after.get(key)
        name = f"| {phase_label(key[0])} | {escaped(key[1])} |"
        if old is None or new is None:
            [row] = [row for row in (old, new) if row is not None]
            lines.append(f"{name} {'**new**' if old is None else '**gone**'}: {verdict(row)} |  |  |")
            continue
        said = [verdict(old), verdict(new)]
        numbers = [_moved(getattr(old, column), getattr(new, column), signed) for column, signed in _NUMBERS.items()]
        if said[0] != said[1] or any(numbers):
            words = said[1] if said[0] == said[1] else f"**{said[0]} → {said[1]}**"
            lines.append(f"{name} {words} | {' | '.join(numbers)} |")
    return lines


_NUMBERS = {"accuracy": False, "delta_pp": True}
"""What is compared, and whether it has a sign."""


def _moved(old: float, new: float, signed: bool) -> str:
    """`83.62 → 83.70`; blank if it stayed."""
    if (pd.isna(old) and pd.isna(new)) or abs(old - new) < SAME:
        return ""
    return " → ".join("none" if pd.isna(value) else number(value, signed=signed) for value in (old, new))


def at(revision: str) -> pd.DataFrame | None:
    """The decisions of a revision; None if it has none.

    Raises:
        UserError: if there is no such revision here.
    """
    known = subprocess.run(["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], capture_output=True)
    if known.returncode:
        raise UserError(f"git knows no revision {revision!r} here: fetch it first")
    shown = subprocess.run(["git", "show", f"{revision}:{TABLE}"], capture_output=True, text=True)
    return None if shown.returncode else pd.read_csv(io.StringIO(shown.stdout))


def main() -> None:
    """Compare the tables here with those of the revision that the command line names."""
    if len(sys.argv) != 2:
        raise UserError("one revision to compare with is needed, as origin/main")
    print(comparison(at(sys.argv[1]), read_table(Path(TABLE)), f"`{sys.argv[1]}`"), end="")


if __name__ == "__main__":
    with told_by("comparison"):
        main()
