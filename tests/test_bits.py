"""Every x86-64 processor with AVX2 gives the same bits, since numpy and torch are told how to compute."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import phasegate
from phasegate.base import processor
from tests.bits import COMMITTED, digests
from tests.small_study import ROOT, ended

promised = pytest.mark.skipif(not phasegate.PROMISED, reason="bits are promised on x86-64 processors with AVX2 alone")
CLEAN = {name: value for name, value in os.environ.items() if name not in phasegate.PINNED}


def python(code: str, folder: Path = ROOT, *options: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that nobody has told anything."""
    return ended(sys.executable, *options, "-c", code, cwd=folder, env=CLEAN | {"PYTHONPATH": str(ROOT)})


@promised
def test_every_kind_of_training_leaves_the_committed_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHASEGATE_DEVICE", "cpu")
    assert dict(digests(tmp_path)) == json.loads(COMMITTED.read_text()), "`python -m tests.bits --write`, if it should"


@promised
def test_numpy_and_torch_compute_as_on_a_processor_with_avx2_without_a_warning() -> None:
    code = (
        "import phasegate, sys; assert not {'numpy', 'torch'} & sys.modules.keys() and not phasegate.UNPINNED;"
        "import numpy, torch; from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__;"
        "print(torch.backends.cpu.get_cpu_capability(), [n for n in __cpu_dispatch__ if __cpu_features__[n]])"
    )
    done = python(code, ROOT, "-W", "error")
    assert (done.stderr, done.stdout) == ("", "AVX2 ['X86_V3']\n")


@promised
def test_who_imports_torch_first_is_told(tmp_path: Path, baselines: Path) -> None:
    said = "numpy and torch came before phasegate, so bits may differ between processors: import phasegate first"
    stage = "import torch, sys; sys.argv = ['p7a']; from phasegate.stage import run; run(print)"
    done = python(stage, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"p7a: {said}\n")
    loaded = python(f"import torch, phasegate; phasegate.load({str(baselines / 'seed-0')!r}, None); print('loaded')")
    assert loaded.stdout == "loaded\n" and f"UserWarning: {said}\n" in loaded.stderr
    pinned = {**CLEAN, **phasegate.PINNED}  # as in a worker, which inherits the environment
    subprocess.run([sys.executable, "-W", "error", "-c", stage.split(";")[0] + "; import phasegate; "
                    "assert not phasegate.UNPINNED"], cwd=ROOT, env=pinned, check=True)  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "listed", "promised"),
    [
        ("x86_64", "flags\t\t: fpu avx avx2 fma sse4_2\n", True),
        ("x86_64", "flags\t\t: fpu avx sse4_2\n", False),
        ("x86_64", None, True),
        ("aarch64", "Features\t: fp asimd\n", False),
    ],
)
def test_nothing_is_promised_without_avx2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, listed: str | None, promised: bool
) -> None:
    monkeypatch.setattr(processor, "LISTED", tmp_path / "cpuinfo")
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    if listed:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: One of Them\n{listed}")
    assert processor.has_avx2() == promised
    assert processor.name() == f"{'One of Them' if listed else machine}, {os.cpu_count()} cores"
