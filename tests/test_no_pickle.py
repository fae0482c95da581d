"""Nothing that is loaded can run code."""

import ast
from pathlib import Path

import pytest

from tests.small_study import ROOT

UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = {
    "torch.load",
    "torch.export.load",
    "np.load",
    "numpy.load",
    "joblib.load",
    "pd.read_pickle",
    "pandas.read_pickle",
}
UNSAFE_CALLS |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "full_load_all")}
UNSAFE_CALLS |= {"eval", "exec", "compile", "__import__"}
SOURCES = sorted(path for folder in ("phasegate", "stages", "bench") for path in (ROOT / folder).rglob("*.py"))


def unsafe(code: str) -> list[str]:
    """What could run code that it reads, as line and name."""
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
        found += [f"{node.lineno}: {name}" for name in modules if name in UNSAFE_CALLS or name in UNSAFE_MODULES]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_loads_a_pickle(path: Path) -> None:
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "import os, dill", "from pickle import loads", "from torch import load", "torch.load(f)"),
        *("torch.export.load(f)", "from torch.export import load"),
        *("np.load(f)", "np.load(f, allow_pickle=True)", "yaml.load(f, Loader)", "yaml.unsafe_load(f)", "eval('1')"),
        *("pd.read_pickle(f)", "joblib.load(f)", "exec(code)"),
    ],
)
def test_what_loads_a_pickle_is_found(code: str) -> None:
    assert unsafe(code)
    assert not unsafe("model.eval(); np.load(f, allow_pickle=False); yaml.safe_load(f); safetensors.torch.load(f)")
