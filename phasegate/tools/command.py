"""Run the commands of git and DVC."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from phasegate.base.errors import UserError
from phasegate.base.files import read_bounded

UTF8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}  # DVC's output, whatever the terminal is


def output(*words: str, folder: Path = Path()) -> str:
    """Return what a command prints; raise UserError if there is no such command, or with its words if it fails."""
    env = os.environ | UTF8
    if folder != Path():  # a command elsewhere is not to act on this repository, which GIT_DIR may name
        here = output("git", "rev-parse", "--local-env-vars").split()
        env = {name: value for name, value in env.items() if name not in here}
    try:
        caught: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "check": False}
        done: subprocess.CompletedProcess[str] = subprocess.run(words, cwd=folder, env=env, **caught)
    except FileNotFoundError:
        raise UserError(f"there is no command {words[0]}: activate .venv, or use make") from None
    if done.returncode:
        refuse_conflicts(folder)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if re.match("error: |fatal: |ERROR: |'", line)), " ".join(lines[-1:]))
        raise UserError(f"{words[0]} {words[1]} failed: {re.sub('^(error|fatal): ', '', reason, flags=re.IGNORECASE)}")
    return done.stdout


def refuse_conflicts(folder: Path = Path()) -> None:
    """Raise UserError if git left the marks of a merge conflict in a file that DVC reads."""
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        if (path := folder / name).is_file():
            read_bounded(path)
