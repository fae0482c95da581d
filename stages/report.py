"""Draw the figures and write the page, from the tables of `reports/tables/` alone."""

import json
from importlib.metadata import version

import pandas as pd

from phasegate.base.files import write_atomic
from phasegate.base.paths import FIGURES, PREPARED, REPORTS, TABLES
from phasegate.params import Params
from phasegate.records.prepared import load_meta
from phasegate.records.tables import read_table
from phasegate.report import drawing, figures, page
from phasegate.stage import run

LIBRARIES = ("torch", "numpy", "scipy", "pandas", "dvc")


class Tables(dict[str, pd.DataFrame]):
    """The tables of `reports/tables/` by name, each read when it is first asked for."""

    def __missing__(self, name: str) -> pd.DataFrame:
        self[name] = read_table(TABLES / f"{name}.csv")
        return self[name]


def main(params: Params) -> None:
    """Write every figure as SVG and PNG, and `reports/report.html`."""
    tables = Tables()
    for name in figures.FIGURES:
        drawing.save(figures.draw(name, tables, params), FIGURES / name)
    drawn = {name: (FIGURES / f"{name}.svg").read_text(encoding="utf-8") for name in figures.FIGURES}
    text = page.render(tables, drawn, params, load_meta(PREPARED).name, provenance(params))
    write_atomic(REPORTS / "report.html", text)


def provenance(params: Params) -> dict[str, object]:
    """Return what the results came from: data hashes, parameters and versions."""
    meta = load_meta(PREPARED)
    return {
        "command": "dvc repro",
        "data": {"name": meta.name, "sha256": {name: array.sha256 for name, array in meta.arrays.items()}},
        "versions": {name: version(name).partition("+")[0] for name in LIBRARIES},  # torch adds where it came from
        "parameters": json.loads(params.model_dump_json(exclude={"headline"})),
    }


if __name__ == "__main__":
    run(main)
