"""Print what `dvc repro` would run and why, as `dvc status` and `dvc params diff` tell: `make plan`. Nothing is run.

How long each stage will take is guessed from `reports/timings.csv`: as long as it took here before.
"""

import json
import sys
from pathlib import Path

from phasegate.base import settings, timings
from phasegate.base.errors import UserError, report_user_errors, visible
from phasegate.base.paths import EVALUATED, MODELS, PREPARED, SCHEMA, TIMINGS
from phasegate.tools.command import output

MADE = (f"{MODELS}/", f"{PREPARED}/", f"{EVALUATED}/", str(SCHEMA))  # by stages


def stale(*options: str) -> dict[str, list[str]]:
    """Ask DVC which stages would run because of a change, and name for each what changed."""
    if not Path("dvc.yaml").exists():  # DVC says nothing
        raise UserError(f"there is no dvc.yaml in {Path.cwd()}: run this where the study is")
    status = json.loads(output("dvc", "status", "--json", *options))
    found = {stage: [name for entry in status[stage] for name in changed(entry)] for stage in sorted(status)}
    return {stage: names for stage, names in found.items() if names}


def changed(entry: str | dict[str, dict[str, object]]) -> list[str]:
    """Name the changed parameters and files in an entry of `dvc status`; files that are only absent did not change."""
    if isinstance(entry, str):
        return [entry]  # "changed command"
    states = [item for files in entry.values() for item in files.items() if item[1] not in ("deleted", "not in cache")]
    return [name for path, state in states for name in (state if isinstance(state, dict) else [path])]


def refuse_stale() -> None:
    """Raise UserError if the tables in `reports/` are not made by these parameters and this code."""
    for stage, names in stale("--with-deps", "decide").items():
        found = [name for name in names if not name.startswith(MADE)]  # an experiment's may lie there
        if found and stage != "check":  # which reads the headline's parameters, too
            changed_input = f"{found[0]}, which {stage} uses, changed"
            raise UserError(f"reports/ has tables of other parameters or code ({changed_input}): run `dvc repro`")


def estimate(stage: str, known: dict[str, dict[str, timings.Taken]]) -> str:
    """Tell how long a stage takes: its trials, all run by the workers that there are now; without trials, as before."""
    if stage not in known:
        return "time unknown"
    trials = [seconds for trial, (seconds, _) in known[stage].items() if trial]
    seconds = max(sum(trials) / settings.workers(), *trials) if trials else known[stage][""][0]
    return f"about {seconds:,.0f} s"


if __name__ == "__main__":
    with report_user_errors("report" if sys.argv[1:] else "plan"):
        if sys.argv[1:] == ["--refuse-stale"]:
            refuse_stale()
        elif found := stale():
            known = timings.read()
            lines = [f"  {stage} ({estimate(stage, known)}): {', '.join(names)}" for stage, names in found.items()]
            lines += [] if known else [f"There is no {TIMINGS}, which would tell how long stages take."]
            lines = ["Would run, and all after them:", *lines, "", output("dvc", "params", "diff")]
            print(visible("\n".join(lines)), end="")
        else:
            print("Nothing changed: `dvc repro` would only make data and models that are absent.")
