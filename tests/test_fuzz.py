"""Every file is read or refused in one sentence: a few cases of `python -m tests.fuzz`."""

import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phasegate.base.errors import UserError
from tests import fuzz
from tests.fuzz import Case, failures


@pytest.mark.parametrize(("kind", "cases"), [("params", 100), ("checkpoints", 120), ("data", 100)])
def test_damaged_files_are_read_or_refused_in_one_sentence(kind: str, cases: int) -> None:
    assert list(failures(kind, range(cases))) == []


def refuse(sentence: str, cause: Exception | None = None) -> Any:
    raise UserError(sentence) from cause


BAD: dict[str, Callable[[], object]] = {
    "KeyError": lambda: BAD["a"],
    "SystemExit": lambda: sys.exit(3),
    "not one printable line": lambda: refuse("a\nb"),
    "characters": lambda: refuse("x" * 3000),
    "takes more than": lambda: refuse("too large", MemoryError()),
    "warns: 'careful'": lambda: warnings.warn("careful", stacklevel=1),
    "took longer": lambda: time.sleep(30),
    **({"MemoryError": lambda: np.ones(1 << 28)} if sys.platform == "linux" else {}),  # where it can be bounded
    "changed its input": lambda: Path("file").write_text("other"),
    "accepts damage": lambda: None,
}


@pytest.mark.parametrize("wrong", BAD)
def test_what_is_wrong_with_a_case_is_said(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "LONGEST", 1)
    Path("file").write_text("content")
    signal.signal(signal.SIGALRM, fuzz._too_long)
    assert wrong in (fuzz._verdict(Case((BAD[wrong],), harmful=wrong == "accepts damage"), tmp_path) or "")
    assert fuzz._verdict(Case((lambda: refuse("sentence"),), harmful=True), tmp_path) is None


def test_a_case_that_kills_its_process_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/fuzz_deadly.py").write_text(
        "import os; from tests.fuzz import Case\n"
        "def originals(folder): return None\n"
        "def case(state, draw, folder): return Case((lambda: os._exit(66),))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert list(failures("deadly", range(4, 6))) == [f"deadly {n}: the process died with exit code 66" for n in (4, 5)]
