"""The study in small: a checkout to run it in, and what it leaves."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from phasegate.base.files import sha256
from phasegate.model.kernels.compiled import PLACE
from phasegate.training.killed_trials import SNAPSHOT

REPLACED = ("candidates", "arms", "mnist1d")
FOLDERS = ("phasegate", "stages", "plugins")
FILES = (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml")
KEPT = ("data/none", "data/raw/.gitkeep")  # files that nothing reads
ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ROOT = Path(__file__).parent.parent
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
"""Where programs of this environment are found, whether or not it is activated."""


class Checkout:
    """A temporary copy of the project under the small profile, or of such a copy with all that was done in it."""

    def __init__(self, folder: Path, of: Path | None = None, **settings: str) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PATH": PATH,
            "NUMBA_CACHE_DIR": str(PLACE),  # else each copy would compile the kernels
            "GIT_CONFIG_GLOBAL": os.devnull,  # whoever runs the tests may sign commits
            "SHELL": "/bin/sh",  # with which dvc starts stages; dash stays between the two, unless told otherwise
            "PHASEGATE_WORKERS": "1",
            **settings,
        }
        if of:
            shutil.copytree(of, folder, symlinks=True)
            return
        for name in FOLDERS:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in (*FILES, *KEPT):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        self.change(yaml.safe_load((ROOT / "tests/small.yaml").read_text()))
        self.command("git", "init", "-q")
        self.command("git", "add", "-A")
        self.command("git", "config", "user.name", "tests")
        self.command("git", "config", "user.email", "tests@localhost")
        self.command("git", "commit", "-qm", "small profile")

    def command(self, *words: str, ok: bool = True) -> str:
        done = ended(*words, cwd=self.folder, env=self.environment)
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == ok, f"{' '.join(words)} ended with {done.returncode}:\n{output}"
        return output

    def change(self, changes: dict[str, Any]) -> None:
        path = self.folder / "params.yaml"
        merged = merge(yaml.safe_load(path.read_text()), changes)
        path.write_text(yaml.safe_dump(merged, sort_keys=False, allow_unicode=True))

    def repro(self, *targets: str) -> set[str]:
        """Run the pipeline, or these stages and what they need; returns the stages that ran."""
        return set(re.findall(r"Running stage '([^']+)'", self.command("dvc", "repro", *targets)))

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / f"reports/tables/{name}.csv")


def ended(*words: str, **where: Any) -> subprocess.CompletedProcess[str]:
    """How a command ended, whether well or not, and what it said."""
    return subprocess.run(words, capture_output=True, text=True, check=False, **where)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` merged in; candidates, arms and a data set's references are replaced."""
    merged = dict(base)
    for key, value in changes.items():
        deeper = isinstance(value, dict) and isinstance(base.get(key), dict) and key not in REPLACED
        merged[key] = merge(base[key], value) if deeper else value
    return merged


def content(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by name, snapshots apart."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SNAPSHOT)
    return {str(path.relative_to(folder)): sha256(path) for path in files}
