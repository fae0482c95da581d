"""Find and hash the code that a result depends on: the modules that a file imports, directly or through others."""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import phasegate

ROOT = Path(phasegate.__file__).parent.parent
OUTSIDE = frozenset({"base", "params", "trials"})
"""Packages that cannot change a trial's result. The values of parameters are arguments of the trial."""


def code_hash(files: Iterable[Path]) -> str:
    """Hash the code that the functions of these files can run, except the packages `OUTSIDE`.

    Comments, docstrings and the words of errors do not count.
    """
    parts = [_meaning(path) for path in sorted(closure(files, OUTSIDE))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def closure(files: Iterable[Path], without: Iterable[str] = ()) -> set[Path]:
    """Find the files of the library and of `stages/` that these files import, themselves included.

    Args:
        without: packages of the library that are left out, with everything that only they import.
    """
    found, waiting = set[Path](), list(files)
    while waiting:
        path = waiting.pop()
        if path not in found and package_of(path) not in without:
            found.add(path)
            waiting += _imports(path)
    return found


def package_of(path: Path) -> str:
    """Return the package of the library that a file lies in; "" for other files."""
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else ()
    return parts[1] if len(parts) > 2 and parts[0] == "phasegate" else ""


@cache
def _imports(path: Path) -> frozenset[Path]:
    """Find the files that a file imports itself, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(_Imports().visit(_parse(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = set[Path]()
    for parts in (name.split(".") for name in names):
        if parts[0] in ("phasegate", "stages"):  # the packages above a module run, too
            files |= {ROOT.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1)}
            files.add(ROOT.joinpath(*parts).with_suffix(".py"))
    return frozenset(filter(Path.exists, files))


@cache
def _meaning(path: Path) -> str:
    return ast.dump(_Meaning().visit(_parse(path)))


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


class _Imports(ast.NodeTransformer):
    """Drop from a syntax tree the imports that only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


class _Meaning(ast.NodeTransformer):
    """Drop from a syntax tree what only people read: docstrings and the words of errors that end a run."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        match node.exc:
            case ast.Call(func=ast.Name(id="UserError" | "SurgeryRefused")):
                node.exc = node.exc.func
        return node
