"""The whole pipeline in this process: without DVC, whose part is tested elsewhere, and without starting processes."""

import importlib
import sys
from pathlib import Path

import pytest
import yaml

from phasegate.params import Params
from phasegate.training.batches import load_examples
from tests.small_study import ROOT


def run_all(params: Params, folder: Path, monkeypatch: pytest.MonkeyPatch, without: str = "") -> None:
    """Every stage of dvc.yaml in its order but for one, with one worker, which is this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PHASEGATE_WORKERS", "1")
    monkeypatch.setenv("PHASEGATE_PROGRESS", "0")
    load_examples.cache_clear()
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in (stages[name] for name in stages if name != without):
        [values] = stage.get("matrix", {"": [""]}).values()
        for value in values:
            module, *arguments = stage["cmd"].removeprefix("exec python -m ").split()
            monkeypatch.setattr(sys, "argv", [module, *(word.replace("${item.phase}", value) for word in arguments)])
            importlib.import_module(module).main(params)
    load_examples.cache_clear()
