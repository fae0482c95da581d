"""A trial that was trained is never trained again, unless something that its result depends on has changed."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from phasegate import durations, execution, trials
from phasegate.checkpoint import WEIGHTS
from phasegate.errors import UserError
from phasegate.model import ModelSpec
from phasegate.pretraining import pretraining
from phasegate.pretraining_params import Training
from phasegate.trials import OUTSIDE, Trial, run_trials
from tests.small_study import ROOT, closure


def write(folder: Path, *, log: Path, seed: int, lr: float) -> None:
    """A trial that leaves a file, and a line in a log of all that was ever run."""
    with log.open("a") as file:
        file.write(f"{seed}\n")
    (folder / "sub").mkdir()
    (folder / "sub/result.txt").write_text(f"seed {seed} lr {lr}")
    if lr < 0:
        raise UserError(f"lr is {lr}: it must be positive")


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own for every test, and no processes unless a test asks for them."""
    monkeypatch.setattr(trials, "STORE", tmp_path / "store")
    monkeypatch.setenv("PHASEGATE_WORKERS", "1")
    return tmp_path / "store"


class Study:
    """Trials of `write`, and the seeds that were really run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.input = folder, folder / "log", folder / "input"
        self.input.write_text("content")

    def run(self, seeds: int, **changed: Any) -> list[int]:
        """The seeds that this call had to run."""
        before = len(self.seeds_run())
        arguments = {"log": self.log, "lr": 0.1, **changed}
        run_trials(
            [Trial(f"arm/seed-{seed}", write, {**arguments, "seed": seed}, (self.input,)) for seed in range(seeds)],
            self.folder / "models",
            "test",
        )
        return self.seeds_run()[before:]

    def seeds_run(self) -> list[int]:
        """The seeds that were ever run."""
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    def results(self) -> list[str]:
        """What the trials left in the output, by seed."""
        return [path.read_text() for path in sorted((self.folder / "models").glob("arm/*/sub/result.txt"))]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


def test_what_was_trained_is_not_trained_again_and_more_seeds_train_only_the_new_ones(study: Study) -> None:
    assert study.run(2) == [0, 1]
    assert study.run(2) == []
    assert study.run(4) == [2, 3]
    assert study.run(1) == []
    assert study.results() == [f"seed {seed} lr 0.1" for seed in range(4)]


def test_results_come_back_from_the_store_when_the_output_is_gone(study: Study) -> None:
    study.run(1)
    path = study.folder / "models/arm/seed-0/sub/result.txt"
    path.unlink()
    assert study.run(1) == [] and path.read_text() == "seed 0 lr 0.1"


def test_a_changed_argument_or_input_trains_again(study: Study) -> None:
    study.run(2)
    assert study.run(2, lr=0.2) == [0, 1] and study.results()[1] == "seed 1 lr 0.2"
    assert study.run(2, lr=0.1) == [] and study.results()[1] == "seed 1 lr 0.1"
    study.input.write_text("other content")
    assert study.run(2) == [0, 1]
    study.input.write_text("content")
    assert study.run(2) == []


def test_what_all_trials_took_is_noted_kept_ones_included(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the record holds the parameters of the run
    for seeds in (2, 3):
        study.run(seeds)
        took = sum(float(path.read_text()) for path in study.folder.glob("models/arm/*/seconds.txt"))
        assert durations.recorded(study.folder, "mnist1d")["test"].seconds == pytest.approx(took, abs=1e-3)
    monkeypatch.chdir(study.folder)  # where no parameters are, nothing is noted, and nothing is wrong
    assert study.run(4) == [3]


def test_changed_code_trains_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.run(1)
    other = study.folder / "moe.py"
    other.write_text("x = 1")
    import phasegate.moe
    import phasegate.params

    monkeypatch.setattr(phasegate.params, "__file__", str(other))
    assert study.run(1) == []  # its values are arguments of the trial
    monkeypatch.setattr(phasegate.moe, "__file__", str(other))
    assert study.run(1) == [0]


def test_where_ray_is_missing_the_message_says_what_to_install(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHASEGATE_BACKEND", "ray")
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'phasegate\[cluster\]'$"):
        study.run(1)


def test_no_module_that_trains_or_measures_a_network_reaches_what_only_judges_trials() -> None:
    outside = {f"{module.replace('.', '/')}.py" for module in OUTSIDE}
    judges = {f"phasegate/{name}.py" for name in ("decisions", "statistics")}
    assert judges < outside and all((ROOT / module).exists() for module in outside)
    runs = [path for path in ROOT.glob("phasegate/*.py") if re.search("^(import|from) torch", path.read_text(), re.M)]
    assert len(runs) > 20 and {path.name: reached for path in runs if (reached := closure(path) & judges)} == {}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_error_of_a_failing_trial_comes_out_and_nothing_half_done_is_kept(
    study: Study, own_store: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setenv("PHASEGATE_WORKERS", workers)
    with pytest.raises(UserError, match=r"^lr is -1: it must be positive$"):
        study.run(1, lr=-1)
    assert not own_store.exists() and study.results() == []
    assert study.run(1, lr=1) == [0] and study.results() == ["seed 0 lr 1"]
    with pytest.raises(UserError, match=r"^lr is -1"):
        study.run(1, lr=-1)


def test_trials_unused_for_a_month_are_forgotten_but_those_wanted_now_are_kept(study: Study, own_store: Path) -> None:
    study.run(1, lr=0.1)
    study.run(1, lr=0.2)
    long_ago = time.time() - 31 * 86_400
    for folder in own_store.iterdir():
        os.utime(folder, (long_ago, long_ago))
    assert study.run(1, lr=0.1) in ([], [0]) and study.results() == ["seed 0 lr 0.1"]
    assert len(list(own_store.iterdir())) == 1
    assert study.run(1, lr=0.1) == [] and study.results() == ["seed 0 lr 0.1"]


def test_results_do_not_depend_on_the_number_of_workers(
    prepared: Path, spec: ModelSpec, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for workers in ("1", "2"):
        monkeypatch.setenv("PHASEGATE_WORKERS", workers)
        monkeypatch.setattr(trials, "STORE", tmp_path / "store" / workers)
        wanted = [pretraining(prepared, "p7a", "baseline", seed, spec, training, True) for seed in range(2)]
        run_trials(wanted, tmp_path / workers, "test")
        found.append([(tmp_path / workers / trial.name / WEIGHTS).read_bytes() for trial in wanted])
    assert found[0] == found[1] and found[0][0] != found[0][1]
