"""Signals and surgeries of one's own: files in `plugins/`, found by the names that `params.yaml` gives.

A file is run as it stands, in the process of every trial that uses it, and its content is among the inputs of that
trial: whoever edits it trains anew what rests on it, and nothing else.
"""

import ast
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phasegate.errors import UserError, one_line
from phasegate.sections import suggestion

FOLDER = Path("plugins")
Kind = Literal["signal", "operate"]
"""The function that a file must define."""


@dataclass(frozen=True)
class Plugin:
    """The file `plugins/<name>.py`, and the function of it that is wanted."""

    name: str
    kind: Kind

    @property
    def path(self) -> Path:
        """Where the file is."""
        return FOLDER / f"{self.name}.py"

    def check(self, key: str, built_in: Sequence[str] = ()) -> None:
        """Look at the file without running it; `key` is the parameter that names it, or could name a `built_in`.

        Raises:
            UserError: if there is no such file, it is not Python, it does not define the function, or it imports
                another file of the folder, whose content would be nobody's input.
        """
        if not self.path.is_file():
            known = [*built_in, *sorted(path.stem for path in FOLDER.glob("*.py"))]
            hint = suggestion(self.name, known) if known else f"{FOLDER} has no files"
            raise UserError(f"{key} is {self.name!r}, but there is no file {self.path}: {hint}")
        try:
            tree = ast.parse(self.path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{self.path}, which {key} names, is not Python: {one_line(error)}") from None
        if self.kind not in {name for statement in tree.body for name in _defined(statement)}:
            raise UserError(f"{self.path}, which {key} names, does not define the function {self.kind}")
        if any(_imports_neighbour(node) for node in ast.walk(tree)):
            raise UserError(f"{self.path}, which {key} names, imports from {FOLDER}: it must be a file by itself")

    def function(self) -> Any:
        """Run the file, and return its function. Errors in it are its author's, and keep their traceback."""
        specification = importlib.util.spec_from_file_location(f"{FOLDER.name}.{self.name}", self.path)
        assert specification and specification.loader, "a path with the suffix .py has a loader"
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return getattr(module, self.kind)


def _imports_neighbour(node: ast.AST) -> bool:
    """Whether a piece of a file is an import from its own folder."""
    match node:
        case ast.ImportFrom(module=module, level=level):
            return level > 0 or str(module).partition(".")[0] == FOLDER.name
        case ast.Import(names=names):
            return any(alias.name.partition(".")[0] == FOLDER.name for alias in names)
    return False


def _defined(statement: ast.stmt) -> list[str]:
    """The names that a statement at the top of a file defines."""
    match statement:
        case ast.FunctionDef(name=name):
            return [name]
        case ast.ImportFrom(names=names) | ast.Import(names=names):
            return [alias.asname or alias.name for alias in names]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []
