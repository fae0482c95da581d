"""Whether the tables of `reports/` are of the parameters as they are now: `make report` begins with it.

python -m phasegate.report.current
"""

from pathlib import Path

from phasegate.changes import differences
from phasegate.errors import UserError, told_by
from phasegate.estimates import made_by
from phasegate.params import load_params


def refuse_others(lock: Path, params: Path) -> None:
    """Raise UserError, naming a parameter, unless the page of the last run, which `lock` tells of, had these too."""
    now = load_params(params)
    made = made_by(lock, now)
    if changed := differences(made.model_dump(mode="json"), now.model_dump(mode="json"), "")[:1]:
        what = f"the tables in reports/ are of other parameters ({changed[0].removeprefix('.')})"
        raise UserError(f"{what}: `dvc repro` makes those of {params}")


if __name__ == "__main__":
    with told_by("report"):
        refuse_others(Path("dvc.lock"), Path("params.yaml"))
