"""Phases as named DVC experiments, so that DVC's own commands compare them.

    python -m phasegate.experiments                         phase-7a, phase-7b1, ..., phase-surgery
    python -m phasegate.experiments p7b2/clone p7b1/noise   phase-7b2-clone, phase-7b1-noise

Such an experiment is the last commit with another `headline`: its params.yaml, dvc.lock, metrics.json and
reports/headline_curve.csv differ, no more. Nothing is trained and no cache is needed, since DVC works in temporary
clones and runs the stage headline alone.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from phasegate.errors import UserError
from phasegate.params import Params
from phasegate.phase_params import Headline
from phasegate.sections import parse
from phasegate.stage import run
from phasegate.study import PRIMARY, START

UNTRAINED = {"check", "headline"}  # stages that depend on `headline`


def main(params: Params) -> None:
    """Save the arms that the command line names, else the primary arm of every phase, and say what each came to."""
    wanted = list(dict.fromkeys(headline(name, params) for name in sys.argv[1:] or (START, *params.claims())))
    workspace = Path()
    refuse_uncommitted(workspace)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        plan = pool.submit(refuse_stale, workspace, Path(folder) / "plan")
        saved = [pool.submit(save, choice, workspace, Path(folder) / experiment_name(choice)) for choice in wanted]
        plan.result()
        for choice, reference in zip(wanted, saved, strict=True):
            publish(experiment_name(choice), reference.result(), workspace, Path(folder) / experiment_name(choice))
            row = json.loads(_output(workspace, "git", "show", f"{reference.result()}:metrics.json"))
            print(f"{experiment_name(choice)}: {came_to(row)}", flush=True)


def headline(name: str, params: Params) -> Headline:
    """`p7b2/clone` parsed; `p7b2` is its primary arm. Raises UserError for a phase or an arm that isn't known."""
    phase, _, arm = name.partition("/")
    chosen = parse(Headline, {"phase": phase, "arm": arm or PRIMARY}, "headline")
    params.check_headline(chosen)
    return chosen


def experiment_name(choice: Headline) -> str:
    """`phase-7b2` for the primary arm, `phase-7b2-clone` for another."""
    name = f"phase-{choice.phase.removeprefix('p')}"
    return name if choice.arm == PRIMARY else f"{name}-{choice.arm}"


def came_to(row: dict[str, Any]) -> str:
    """What a headline says in a few words."""
    accuracy = f"{row['accuracy']:.2f} %" if row["n_seeds"] else "no trial finished"
    return f"{row['arm']}, {row['verdict']}, {accuracy}"


def refuse_uncommitted(workspace: Path) -> None:
    """Raises UserError if parameters or results aren't those of the last commit."""
    changed = _output(workspace, "git", "status", "--porcelain", "--", "params.yaml", "dvc.lock").splitlines()
    if changed:
        names = " and ".join(line[3:] for line in changed)
        raise UserError(f"{names} changed since the last commit, from which experiments start: commit first")


def refuse_stale(workspace: Path, clone: Path) -> None:
    """Raises UserError if what is committed isn't what the committed parameters and code produce."""
    _clone(workspace, clone)
    plan = _run(clone, "dvc", "repro", "--dry", "--allow-missing")
    named = re.findall(r"(?:Running stage|failed to reproduce) '([^']+)'", plan.stdout + plan.stderr)
    stale = [stage for stage in named if stage not in UNTRAINED]
    if stale:
        raise UserError(
            "the committed results are not those of the committed parameters and code: run `dvc repro`, which would "
            f"start at stage {stale[0]}, and commit what it changes"
        )


def save(choice: Headline, workspace: Path, clone: Path) -> str:
    """Save one experiment in a clone of its own; returns its git reference."""
    name = experiment_name(choice)
    values = [f"--set-param=headline.{key}={value}" for key, value in choice]
    _clone(workspace, clone)
    _output(clone, "dvc", "exp", "run", "--allow-missing", "--single-item", "headline", "--name", name, *values)
    [reference] = _references(clone, name)
    return reference


def publish(name: str, reference: str, workspace: Path, clone: Path) -> None:
    """Fetch an experiment from its clone, in place of those of its name that start from any commit."""
    for old in _references(workspace, name):  # DVC refuses a name that experiments of several commits have
        _output(workspace, "git", "update-ref", "-d", old)
    _output(workspace, "git", "fetch", "--quiet", "--no-tags", str(clone), f"{reference}:{reference}")


def _clone(workspace: Path, clone: Path) -> None:
    _output(workspace, "git", "clone", "--quiet", "--shared", ".", str(clone))


def _references(folder: Path, name: str) -> list[str]:
    """The git references of the experiments of that name."""
    return _output(folder, "git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}").split()


def _output(folder: Path, *words: str) -> str:
    """What a command says. Raises UserError with its own words if it fails."""
    done = _run(folder, *words)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith(("fatal: ", "ERROR: "))), " ".join(lines[-1:]))
        raise UserError(f"{words[0]} {words[1]} failed: {reason.removeprefix('fatal: ').removeprefix('ERROR: ')}")
    return done.stdout


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"there is no command {words[0]}: activate .venv, or use `make phases`") from None


if __name__ == "__main__":
    run(main)
