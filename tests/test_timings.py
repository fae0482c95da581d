"""Times and machines go to a file that git and DVC ignore, and to nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from phasegate.base import processor, timings
from phasegate.base.paths import TIMINGS
from phasegate.tools.plan import estimate
from phasegate.trials.run import run_trials
from phasegate.trials.trial import Trial
from tests.small_study import ROOT, content

HEADER = "stage,trial,seconds,machine\n"


def write(folder: Path, *, seed: int) -> None:
    """A trial that leaves a file."""
    (folder / "result.txt").write_text(f"{seed}\n")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timings, "TIMINGS", TIMINGS)
    monkeypatch.setenv("PHASEGATE_WORKERS", "2")
    monkeypatch.setenv("PHASEGATE_PROGRESS", "1")


def trials(*seeds: int) -> list[Trial]:
    return [Trial("p", "arm", seed, write, {"seed": seed}) for seed in seeds]


def test_trials_of_workers_and_kept_ones_have_rows_and_their_results_no_times(tmp_path: Path) -> None:
    run_trials(trials(0, 1, 2), tmp_path / "out")
    before = timings.read()["out"]
    assert list(before) == ["arm/seed-0", "arm/seed-1", "arm/seed-2"]
    assert all(seconds >= 0 and machine == processor.name() for seconds, machine in before.values())
    assert list(content(tmp_path / "out")) == [f"arm/seed-{seed}/result.txt" for seed in range(3)]
    (tmp_path / TIMINGS).unlink()
    run_trials(trials(1, 2), tmp_path / "out")
    assert timings.read() == {"out": {name: before[name] for name in list(before)[1:]}}


def test_a_stage_and_its_trials_replace_their_own_rows_alone() -> None:
    timings.record("b", {"seed-0": (1.5, "one, 2 cores"), "seed-1": (2.5, 'a "machine"')})
    timings.record("b", {"": (3.25, "one, 2 cores")})
    timings.record("a", {"": (1.0, "another")})
    timings.record("b", {"seed-1": (0.5, "another")})
    trained = {"": (3.25, "one, 2 cores"), "seed-1": (0.5, "another")}
    assert timings.read() == {"a": {"": (1.0, "another")}, "b": trained}
    assert TIMINGS.read_text().splitlines()[:2] == ["stage,trial,seconds,machine", "a,,1.000,another"]


@pytest.mark.parametrize("text", ["", "nothing\n1\n", HEADER + "a,b\n", HEADER + "a,b,c,d\n"])
def test_a_damaged_file_is_written_anew(text: str) -> None:
    TIMINGS.parent.mkdir()
    TIMINGS.write_text(text)
    assert timings.read() == {}
    timings.record("a", {"": (1.0, "x")})
    assert timings.read() == {"a": {"": (1.0, "x")}}


def test_the_plan_tells_how_long_stages_took(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = {f"seed-{seed}": (30.0, "x") for seed in range(4)}
    for whole in (0.2, 120.0):  # kept trials made the last run short, or one worker made it long
        assert estimate("p7a", {"p7a": {"": (whole, "x"), **trials}}) == "about 60 s"
    assert estimate("p7a", {"p7a": {"": (0.2, "x"), "seed-0": (30.0, "x")}}) == "about 30 s"  # workers share no trial
    known = {"decide": {"": (3.0, "x")}}
    assert estimate("decide", known) == "about 3 s" and estimate("report", known) == "time unknown"


def test_a_stage_tells_how_long_it_took(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    code = "import sys; sys.argv = ['p7a']; from phasegate.stage import run; run(lambda params: None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("p7a: 0.0 s on ") and list(timings.read()) == ["p7a"]


def test_git_and_dvc_do_not_know_the_file() -> None:
    assert subprocess.run(["git", "check-ignore", "-q", TIMINGS], cwd=ROOT, check=False).returncode == 0
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        for entry in (*stage["deps"], *stage["outs"]):
            assert not any(TIMINGS.is_relative_to(name) for name in ([entry] if isinstance(entry, str) else entry))
