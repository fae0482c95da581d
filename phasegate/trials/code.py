"""Find and hash what a result depends on: data, and the modules that a file imports, directly or through others."""

import ast
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

import phasegate
from phasegate.base.files import sha256

ROOT = Path(phasegate.__file__).parent.parent
OUTSIDE = frozenset({"base", "params", "trials"})
"""Packages that cannot change a trial's result. The values of parameters are arguments of the trial."""


def dependencies(
    scripts: Iterable[Path], data: Iterable[Path] = (), without: Collection[str] = OUTSIDE
) -> dict[Path, str]:
    """Return the files that scripts depend on, with a hash of each: these data, and the code that the scripts can run.

    Comments, docstrings and the words of errors do not count in code.

    Args:
        without: packages of the library that are left out, with everything that only they import.
    """
    code = sorted(closure((path.resolve() for path in scripts), without))
    return {path: _meaning(path) for path in code} | {path: sha256(path) for path in data}


def closure(files: Iterable[Path], without: Collection[str] = ()) -> set[Path]:
    """Find the files of the repository that these files import, themselves included."""
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
    return sha256(ast.dump(_Meaning().visit(_parse(path))).encode())


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
