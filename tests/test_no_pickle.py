"""Nothing that is loaded can run code."""

import ast
from pathlib import Path

import pytest

from tests.small_study import ROOT

UNSAFE = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "eval", "exec", "compile", "__import__"}
UNSAFE |= {"torch.load", "torch.export.load", "np.load", "numpy.load", "joblib.load", "pd.read_pickle"}
UNSAFE |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "full_load_all")}
SOURCES = sorted(path for folder in ("phasegate", "stages", "bench") for path in (ROOT / folder).rglob("*.py"))


def unsafe(code: str) -> list[str]:
    """Return what could run code that it reads, as line and name."""
    found = []
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                modules = [module, *(f"{module}.{alias.name}" for alias in names)]
            case ast.Call(func=function, keywords=keywords):
                safe = any(ast.unparse(keyword) == "allow_pickle=False" for keyword in keywords)
                modules = [] if safe else [ast.unparse(function)]
            case _:
                continue
        found += [f"{node.lineno}: {name}" for name in modules if name in UNSAFE]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_loads_a_pickle(path: Path) -> None:
    assert unsafe(path.read_text()) == []


FOUND = ["import pickle", "import os, dill", "from pickle import loads", "from torch.export import load", "np.load(f)"]
FOUND += ["torch.load(f)", "np.load(f, allow_pickle=True)", "joblib.load(f)", "yaml.load(f, Loader)", "eval('1')"]


@pytest.mark.parametrize("code", FOUND)
def test_what_loads_a_pickle_is_found(code: str) -> None:
    assert unsafe(code)
    assert not unsafe("model.eval(); np.load(f, allow_pickle=False); yaml.safe_load(f); safetensors.torch.load(f)")
