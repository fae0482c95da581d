"""Find and check people's own signals and surgeries: files in `plugins/`, by the names that `params.yaml` gives.

A file runs in every trial that uses it, and its content is an input of that trial: an edit retrains nothing else. So
it may not import another file of the folder. It is read once, and all workers run the bytes that were read.
"""

import ast
import symtable
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.abc import SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import decode_source, module_from_spec
from pathlib import Path
from typing import Any, Literal

from phasegate.base.errors import UserError, one_line
from phasegate.params.fields import suggestion

FOLDER = Path("plugins")
LIBRARY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Plugin:
    """Name the file `plugins/<name>.py`, and the function that it must define."""

    name: str
    kind: Literal["signal", "operate"]
    source: bytes = field(init=False, repr=False)  # empty where the file is missing

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.path.read_bytes() if self.path.is_file() else b"")

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.py"

    def check(self, key: str, built_in: Sequence[str] = ()) -> None:
        """Inspect the file without running it; `UserError` names `key`, which names the file or one of `built_in`."""
        if not self.path.is_file():
            known = [*built_in, *sorted(path.stem for path in FOLDER.glob("[!.]*.py"))]
            hint = suggestion(self.name, known) if known else f"{FOLDER} has no files"
            raise UserError(f"{key} is {self.name!r}, but there is no file {self.path}: {hint}")
        try:
            text, path = decode_source(self.source), str(self.path)
            nodes, top = list(ast.walk(ast.parse(text, path))), symtable.symtable(text, path, "exec")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise UserError(f"{self.path}, which {key} names, is not Python: {one_line(error)}") from None
        if self.kind not in {each.get_name() for each in top.get_symbols() if each.is_assigned() or each.is_imported()}:
            raise UserError(f"{self.path}, which {key} names, does not define the function {self.kind}")
        modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        modules += [f"{'.' * node.level}{node.module or ''}" for node in nodes if isinstance(node, ast.ImportFrom)]
        for module in modules:
            package, _, rest = module.partition(".")
            if package in ("", FOLDER.name):
                raise UserError(f"{self.path}, which {key} names, imports from {FOLDER}: it must be a file by itself")
            imported = LIBRARY / rest.replace(".", "/")
            if package == LIBRARY.name and not (imported.is_dir() or imported.with_suffix(".py").is_file()):
                said = f"imports {module}, which does not exist: import what you need from phasegate.plugin"
                raise UserError(f"{self.path}, which {key} names, {said}")

    def function(self) -> Any:
        """Run the source anew, and return its function. Errors in it keep their traceback."""
        loader = _Source(self)
        module = module_from_spec(ModuleSpec(f"{FOLDER}.{self.name}", loader, origin=str(self.path)))
        sys.modules[module.__name__] = module  # where dataclasses look for theirs
        loader.exec_module(module)
        return getattr(module, self.kind)


class _Source(SourceLoader):
    """Import a plugin from the bytes that were read: without path statistics, Python looks for no bytecode."""

    def __init__(self, plugin: Plugin) -> None:
        self.plugin = plugin

    def get_filename(self, fullname: str) -> str:
        return str(self.plugin.path)

    def get_data(self, path: object) -> bytes:
        return self.plugin.source
