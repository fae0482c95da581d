"""The study in small: a checkout of its own to run it in, what it leaves, and what a file imports."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

REPLACED = ("candidates", "arms", "mnist1d")
FOLDERS = ("phasegate", "stages", "plugins")
FILES = (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml", "data/raw/.gitkeep")
ROOT = Path(__file__).parent.parent
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
"""Where programs of this environment are found, whether or not it is activated."""


def imported(path: Path) -> set[Path]:
    """The modules of the library that a file imports, packages on the way and its own included."""
    names = {path.parent.name}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = set()
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1) if parts[0] in ("phasegate", "stages") else ():
            module = ROOT.joinpath(*parts[:length])
            files |= {f for f in (module.with_suffix(".py"), module / "__init__.py") if f.exists()}
    return files


def closure(path: Path) -> set[str]:
    """A file and everything that it imports, transitively."""
    found: set[Path] = set()
    waiting = {path}
    while waiting:
        found |= waiting
        waiting = {module for file in waiting for module in imported(file)} - found
    return {str(file.relative_to(ROOT)) for file in found}


class Checkout:
    """A temporary copy of the project under the small profile, with settings for the environment.

    Args:
        of: another such folder, to copy with all that has been done in it.
    """

    def __init__(self, folder: Path, of: Path | None = None, **settings: str) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PATH": PATH,
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
        for name in FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        self.change(yaml.safe_load((ROOT / "tests/small.yaml").read_text()))
        self.command("git", "init", "-q")
        self.command("git", "add", "-A")
        self.command("git", "config", "user.name", "tests")
        self.command("git", "config", "user.email", "tests@localhost")
        self.command("git", "commit", "-qm", "small profile")

    def command(self, *words: str, ok: bool = True) -> str:
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == ok, f"{' '.join(words)} ended with {done.returncode}:\n{output}"
        return output

    def change(self, changes: dict[str, Any]) -> None:
        path = self.folder / "params.yaml"
        path.write_text(yaml.safe_dump(merge(yaml.safe_load(path.read_text()), changes), sort_keys=False))

    def repro(self) -> set[str]:
        """Run the pipeline; returns the stages that ran."""
        return set(re.findall(r"Running stage '([^']+)'", self.command("dvc", "repro")))

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / f"reports/{name}.csv")


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` merged in; candidates, arms of one's own and a data set's references are replaced."""
    merged = dict(base)
    for key, value in changes.items():
        deeper = isinstance(value, dict) and isinstance(base.get(key), dict) and key not in REPLACED
        merged[key] = merge(base[key], value) if deeper else value
    return merged


def content(folder: Path) -> dict[str, str]:
    """The files below a folder by name: tables without what they say of time, all else as it is."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "seconds.txt"):
        if path.suffix == ".csv":
            table = pd.read_csv(path)
            text = table.loc[:, ~table.columns.str.contains("seconds")].to_csv(index=False)
        else:
            text = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = text
    return found
