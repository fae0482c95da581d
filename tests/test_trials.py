"""A trial that was trained is never trained again, unless something that its result depends on has changed."""

import ast
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from phasegate.base import settings, timings, used
from phasegate.base.errors import Diverged, UserError
from phasegate.model.classifier import ModelSpec
from phasegate.params import load_params
from phasegate.params.fields import Seeds
from phasegate.params.pretraining import Training
from phasegate.pretraining.pretrain import pretraining
from phasegate.records.trial_folder import read_failure
from phasegate.surgery import continuation
from phasegate.training.checkpoint import WEIGHTS
from phasegate.trials import code, run, store
from phasegate.trials.run import run_trials
from phasegate.trials.trial import Trial
from stages import control, p7b1, p7b2, p7b3, p7b4
from tests.small_study import ROOT

Edit = Callable[[str, Callable[[str], str]], None]
pytestmark = pytest.mark.usefixtures("own_store")


def write(folder: Path, *, log: Path, seed: int, lr: float) -> None:
    """A trial that leaves a file, and a line in a log of all that was ever run."""
    with log.open("a") as file:
        file.write(f"{seed}\n")
    (folder / "sub").mkdir()
    (folder / "sub/result.txt").write_text(f"seed {seed} lr {lr}")
    if lr < 0:
        raise UserError(f"lr is {lr}: it must be positive")


def write_or_fail(folder: Path, *, seed: int) -> None:
    if seed:
        raise Diverged("the loss is nan", 3)
    (folder / "text").write_text(str(seed))


def read(folder: Path, *, path: Path) -> None:
    (folder / "text").write_text(f"{path.read_text()}, read")


class Study:
    """Trials of `write`, and the seeds that were really run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.input = folder, folder / "log", folder / "input"
        self.input.write_text("content")

    def run(self, seeds: int, **changed: Any) -> list[int]:
        """The seeds that this call had to run."""
        before = len(self.seeds_run())
        arguments = {"log": self.log, "lr": 0.1, **changed}
        trials = [Trial("p", "arm", s, write, {**arguments, "seed": s}, (self.input,)) for s in range(seeds)]
        run_trials(trials, self.folder / "models")
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


def test_more_seeds_train_only_the_new_ones(study: Study) -> None:
    assert study.run(2) == [0, 1]
    assert study.run(2) == []
    assert study.run(4) == [2, 3]
    assert study.run(1) == []
    assert study.results() == [f"seed {seed} lr 0.1" for seed in range(4)]


def test_a_trial_that_reads_anothers_folder_runs_after_it_and_fails_with_it(
    study: Study, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study.folder)
    monkeypatch.setattr(store, "STORE", Path(".kept/trials"))  # hidden, as the real one: what it holds is not noted
    first = [Trial("p", "first", seed, write_or_fail, {"seed": seed}) for seed in (0, 1)]
    texts = [Path(f"models/{trial.name}/text") for trial in first]
    later = [Trial("p", "later", seed, read, {"path": path}, (path,)) for seed, path in enumerate(texts)]
    for _ in range(2):  # the second run finds all of them kept
        used.begin()
        run_trials([*later, *first], Path("models"))
        used.check()  # what a trial read was not written again
        used.end()
        assert Path("models/later/seed-0/text").read_text() == "0, read"
        failure = read_failure(Path("models/later/seed-1"))
        assert failure and failure.reason == "models/first/seed-1, which it needs, failed: the loss is nan"
        assert "models: 2 of 4 trials failed" in capfd.readouterr().err
    assert set(timings.read()["models"]) == {"first/seed-0", "first/seed-1", "later/seed-0"}


def test_trials_in_a_chain_run_one_after_the_other_and_a_failed_one_ends_its_chain(
    study: Study, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study.folder)
    trials = [Trial("p", "a", seed, write_or_fail, {"seed": seed}) for seed in (0, 1)]
    for seed in (0, 1):
        for before, arm in pairwise("abcd"):
            path = Path(f"models/{before}/seed-{seed}/text")
            trials.append(Trial("p", arm, seed, read, {"path": path}, (path, study.input)))
    run_trials(trials[::-1], Path("models"))
    assert Path("models/d/seed-0/text").read_text() == "0" + 3 * ", read"
    said = "the loss is nan"
    for before, arm in pairwise("abcd"):
        said = f"models/{before}/seed-1, which it needs, failed: {said}"
        failure = read_failure(Path(f"models/{arm}/seed-1"))
        assert failure and (failure.arm, failure.reason) == (arm, said)
        assert [path.name for path in Path(f"models/{arm}/seed-1").iterdir()] == ["failure.json"]
    assert "models: 4 of 8 trials failed" in capfd.readouterr().err


def test_results_come_back_from_the_store_when_the_output_is_gone(study: Study) -> None:
    study.run(1)
    path = study.folder / "models/arm/seed-0/sub/result.txt"
    path.unlink()
    assert study.run(1) == [] and path.read_text() == "seed 0 lr 0.1"


def test_a_result_that_is_there_stays_as_it_is_and_a_changed_one_does_not(study: Study) -> None:
    study.run(1)
    path = study.folder / "models/arm/seed-0/sub/result.txt"
    before = path.stat().st_ino, path.stat().st_ctime_ns
    assert study.run(2) == [1] and (path.stat().st_ino, path.stat().st_ctime_ns) == before
    (path.parent / "other").write_text("of an earlier run")
    assert study.run(2) == [] and not (path.parent / "other").exists()


def test_a_changed_argument_or_input_trains_again(study: Study) -> None:
    study.run(2)
    assert study.run(2, lr=0.2) == [0, 1] and study.results()[1] == "seed 1 lr 0.2"
    assert study.run(2, lr=0.1) == [] and study.results()[1] == "seed 1 lr 0.1"
    study.input.write_text("other content")
    assert study.run(2) == [0, 1]
    study.input.write_text("content")
    assert study.run(2) == []


def test_a_moved_path_trains_nothing_again(prepared: Path, spec: ModelSpec, training: Training, tmp_path: Path) -> None:
    def kept(folder: Path) -> dict[str, Path]:
        return store.kept_folders([pretraining(folder, "p7a", "baseline", 0, spec, training)], "cpu")

    moved = Path(shutil.copytree(prepared, tmp_path / "moved"))
    assert kept(moved) == kept(prepared)
    (moved / "fit.safetensors").write_text("other content")
    assert kept(moved) != kept(prepared)


def test_another_device_trains_again(study: Study) -> None:
    trial = Trial("p", "arm", 0, write, {}, (study.input,))
    assert store.kept_folders([trial], "cpu") != store.kept_folders([trial], "cuda")


def test_where_ray_is_missing_the_message_says_what_to_install(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHASEGATE_BACKEND", "ray")
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[cluster\]'$"):
        study.run(1)


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """Have a file of the library read as if it were edited."""
    edited: dict[Path, str] = {}

    def edit(name: str, change: Callable[[str], str]) -> None:
        path = ROOT / "phasegate" / f"{name}.py"
        edited[path] = change(path.read_text())
        assert edited[path] != path.read_text()
        forget()

    def forget() -> None:
        code._imports.cache_clear()
        code._meaning.cache_clear()

    monkeypatch.setattr(code, "_parse", lambda path: ast.parse(edited.get(path) or path.read_text()))
    yield edit
    forget()


def test_an_edit_retrains_the_arms_that_can_run_it(
    edit: Edit, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared, "data/prepared")
    phases: dict[str, list[Trial]] = {}
    for module in (continuation, control):
        monkeypatch.setattr(module, "run_trials", lambda trials, output: phases.update({output.name: trials}))
    for stage in (control, p7b1, p7b2, p7b3, p7b4):
        stage.main(load_params(ROOT / "params.yaml").model_copy(update={"seeds": Seeds(first=0, count=1)}))
    for path in (path for trials in phases.values() for trial in trials for path in trial.inputs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def fingerprints() -> dict[str, str]:
        kept = {phase: store.kept_folders(trials, "cpu") for phase, trials in phases.items()}
        return {f"{phase}/{Path(name).parent}": kept[phase][name].name for phase in kept for name in kept[phase]}

    before = fingerprints()
    assert len(set(before.values())) == len(before)
    policies = {"p7b4/counterfactual_head", "p7b4/oracle"}  # the arms whose policies are in signals/
    for names, retrained in {
        "base/errors params/phases trials/run verdicts/statistics": set(),
        "signals/predictor signals/ground_truth": policies,
        "surgery/controllers training/loop model/experts records/prepared": set(before),
    }.items():
        for name in names.split():
            edit(name, lambda text: f"{text}\nEDITED = True\n")
            after = fingerprints()
            assert {arm for arm in before if before[arm] != after[arm]} == retrained, name
            before = after


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"(?m)^([a-zA-Z].*)$", r"\1  # a comment"),
        (r'"""(?=[A-Z])', '"""In other words: '),
        (r'raise UserError\(f?"', 'raise UserError("in other words" f"'),
    ],
)
def test_other_words_for_people_retrain_nothing(edit: Edit, pattern: str, words: str) -> None:
    name = ROOT / "phasegate/training/checkpoint.py"
    before = code.dependencies([name])
    edit("training/checkpoint", lambda text: re.sub(pattern, words, text))
    assert code.dependencies([name]) == before
    edit("training/checkpoint", lambda text: text.replace('raise ValueError(f"', 'raise ValueError(f"in other words '))
    assert code.dependencies([name]) != before  # `load` catches this error


def test_another_kind_of_error_counts_since_others_may_catch_it(edit: Edit) -> None:
    name = ROOT / "phasegate/surgery/operations.py"
    before = code.dependencies([name])
    edit("surgery/operations", lambda text: text.replace("raise SurgeryRefused(", "raise UserError("))
    assert code.dependencies([name]) != before


def test_code_that_only_a_plugin_imports_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Edit) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("from phasegate.signals.forks import removals\n")
    trial = Trial("plugins", "mine", 0, continuation.run_arm, {}, (Path("mine.py"),))
    before = store.kept_folders([trial], "cpu")
    edit("signals/forks", lambda text: f"{text}\nEDITED = True\n")
    assert store.kept_folders([trial], "cpu") != before


def test_imports_inside_functions_count_but_not_those_for_type_checkers() -> None:
    found = {str(path.relative_to(ROOT)) for path in code.closure([ROOT / "phasegate/trials/run.py"])}
    assert {"phasegate/trials/cluster.py", "phasegate/__init__.py", "phasegate/trials/__init__.py"} < found
    assert "phasegate/inference.py" not in found


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_error_of_a_trial_comes_out_and_nothing_half_done_is_kept(
    study: Study, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setenv("PHASEGATE_WORKERS", workers)
    with pytest.raises(UserError, match=r"^lr is -1: it must be positive$"):
        study.run(1, lr=-1)
    assert not store.STORE.exists() and study.results() == []
    assert study.run(1, lr=1) == [0] and study.results() == ["seed 0 lr 1"]
    with pytest.raises(UserError, match=r"^lr is -1"):
        study.run(1, lr=-1)


def test_trials_unused_for_a_month_are_forgotten(study: Study) -> None:
    study.run(1, lr=0.1)
    study.run(1, lr=0.2)
    long_ago = time.time() - 31 * 86_400
    for folder in store.STORE.iterdir():
        os.utime(folder, (long_ago, long_ago))
    assert study.run(1, lr=0.1) == [] and study.results() == ["seed 0 lr 0.1"]
    assert len(list(store.STORE.iterdir())) == 1


@pytest.mark.parametrize("harm", ["altered", "missing", "added", "another's", "no manifest"])
def test_a_kept_trial_that_is_damaged_is_dropped_and_trained_again(
    study: Study, capfd: pytest.CaptureFixture[str], harm: str
) -> None:
    study.run(2)
    first, second = store.STORE.iterdir()
    result = first / "sub/result.txt"
    seed, content = int(result.read_text().split()[1]), result.read_text()
    match harm:
        case "altered":
            result.write_text(content.replace("0.1", "0.2"))
        case "missing":
            result.unlink()
        case "added":
            (first / "more").touch()
        case "another's":
            shutil.rmtree(first)
            shutil.copytree(second, first)
        case "no manifest":
            (first / store.MANIFEST).unlink()
    assert study.run(2) == [seed] and result.read_text() == content
    assert f"models: arm/seed-{seed} runs again, since {first}/" in capfd.readouterr().err
    assert study.run(2) == [] and not list((study.folder / "models").rglob(store.MANIFEST))


def test_a_kept_trial_that_changes_meanwhile_is_not_copied(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.run(1)
    [kept], results = store.STORE.iterdir(), run._results
    result = kept / "sub/result.txt"
    with monkeypatch.context() as patch:
        patch.setattr(run, "_results", lambda *given: result.write_text("seed 0 lr 0.2") and results(*given))
        with pytest.raises(UserError, match=r"/sub/result.txt changed after it was kept: `dvc repro` trains that"):
            study.run(2)
    assert study.run(2) == [0]


def test_results_do_not_depend_on_the_number_of_workers(
    prepared: Path, spec: ModelSpec, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for workers in ("1", "2"):
        monkeypatch.setenv("PHASEGATE_WORKERS", workers)
        monkeypatch.setattr(store, "STORE", tmp_path / "store" / workers)
        wanted = [pretraining(prepared, "p7a", "baseline", seed, spec, training, True) for seed in range(2)]
        run_trials(wanted, tmp_path / workers)
        found.append([(tmp_path / workers / trial.name / WEIGHTS).read_bytes() for trial in wanted])
    assert found[0] == found[1] and found[0][0] != found[0][1]
