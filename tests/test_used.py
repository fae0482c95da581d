"""What was used is what is recorded: an edit in the middle of a run leads to a refusal, never to a wrong result."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from phasegate.base import used
from phasegate.base.errors import UserError
from phasegate.params.plugins import Plugin
from phasegate.params.reading import load_yaml
from phasegate.records.prepared import load_splits
from phasegate.training.killed_trials import SNAPSHOT, Snapshots
from phasegate.trials import run as trials_run
from phasegate.trials import store
from phasegate.trials.run import run_trials
from phasegate.trials.trial import Trial
from tests import chaos
from tests.small_study import ROOT, Checkout
from tests.test_reliability import held, start, wait_for
from tests.tiny_data import write_tiny_data

MOMENTS = ("before workers start", "while they import", "while they train")
FILES = {"data": "data.txt", "checkpoint": "models/weights", "module": "module.py", "plugin": "plugins/mine.py"}
TEXT = {"data.txt": "{}", "models/weights": "{}", "module.py": "VALUE = '{}'\n"}
TEXT |= {"plugins/mine.py": "def signal():\n    return '{}'\n"}
INPUTS = tuple(map(Path, TEXT))
FILES |= {"parameter": "params.yaml", "stage": "stage.py"}  # read by the stage alone, which tells its trial
TEXT |= {"params.yaml": "{}", "stage.py": "VALUE = '{}'\n"}


def put(name: str, value: str) -> None:
    Path(name).write_text(TEXT[name].format(value))


def imported(name: str) -> str:
    spec = importlib.util.spec_from_file_location("module", name)
    assert spec and spec.loader
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return str(module.VALUE)


def train(folder: Path, *, told: dict[str, str], plugin: Plugin, moment: str, log: Path) -> None:
    """A trial that writes what it reads of all files, and waits for an edit at a moment."""

    def wait(now: str) -> None:
        if now == moment:
            log.touch()
            wait_for(lambda: not log.exists())

    wait(MOMENTS[1])
    found = {"module": imported("module.py"), "data": Path("data.txt").read_text(), "plugin": plugin.function()()}
    wait(MOMENTS[2])
    found |= {"checkpoint": Path("models/weights").read_text()} | told
    (folder / "result.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests, since workers stay where they began."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture
def project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a file of each kind, in which this process notes what it uses."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PHASEGATE_PROGRESS", "0")
    shutil.rmtree(store.STORE.parent, ignore_errors=True)
    for name in TEXT:
        Path(name).parent.mkdir(exist_ok=True)
        put(name, "old")
    yield
    used.end()


def run(moment: str = "") -> dict[str, str]:
    """Run the trial as a new stage would, and return what it read."""
    used.end()
    used.begin()
    told = {"parameter": load_yaml(Path("params.yaml")), "stage": imported("stage.py")}
    given = {"told": told, "plugin": Plugin("mine", "signal"), "moment": moment, "log": Path("waits").absolute()}
    run_trials([Trial("p", "", 0, train, given, INPUTS)], Path("out"))
    used.check()
    return dict(json.loads(Path("out/seed-0/result.json").read_text()))


CASES = [(kind, moment, back, "1") for kind in FILES for moment in MOMENTS for back in (False, True)]
CASES = [case for case in CASES if case[::2] != ("parameter", True)]  # compared by their content
CASES += [("module", moment, False, "2") for moment in MOMENTS]  # in processes, which take seconds to begin


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(("kind", "moment", "back", "workers"), CASES)
def test_an_edit_in_mid_run_is_refused_and_leaves_no_wrong_result(
    monkeypatch: pytest.MonkeyPatch, kind: str, moment: str, back: bool, workers: str
) -> None:
    monkeypatch.setenv("PHASEGATE_WORKERS", workers)

    def edit() -> None:
        was = Path(FILES[kind]).stat().st_mtime_ns
        put(FILES[kind], "new")
        if back:  # with its time, as far as a program can
            time.sleep(0.02)
            put(FILES[kind], "old")
            os.utime(FILES[kind], ns=(was, was))

    def edit_later() -> None:
        wait_for(Path("waits").exists)
        edit()
        Path("waits").unlink()

    with monkeypatch.context() as patch:
        if moment == MOMENTS[0]:
            results = trials_run._results

            def edited(*given: Any) -> Any:
                edit()
                return results(*given)

            patch.setattr("phasegate.trials.run._results", edited)
        else:
            threading.Thread(target=edit_later).start()
        with pytest.raises(UserError, match=rf"^{FILES[kind]} changed after it was read, so this result is not rec"):
            run(moment)
    assert len(list(store.STORE.glob("*"))) == (kind == "parameter")  # the trial is what it was told
    now = "old" if back else "new"
    for value in (now, "old", "new", now):
        put(FILES[kind], value)
        assert run() == dict.fromkeys(FILES, "old") | {kind: value}
    assert len(list(store.STORE.glob("*"))) == 2 + (kind == "parameter")


@pytest.mark.usefixtures("project")
def test_no_snapshot_is_written_once_a_file_has_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHASEGATE_SNAPSHOT", "0")
    used.begin()
    Path("data.txt").read_bytes()
    used.expect(used.states([Path("data.txt")]))
    model: Any = torch.nn.Linear(1, 1)
    snapshots = Snapshots(tmp_path, model, torch.optim.SGD(model.parameters()), {})
    snapshots.take(1)
    content = (tmp_path / SNAPSHOT).read_bytes()
    put("data.txt", "new")
    with pytest.raises(UserError, match=r"^data.txt changed after it was read"):
        snapshots.take(2)
    assert (tmp_path / SNAPSHOT).read_bytes() == content


@pytest.mark.usefixtures("project")
def test_parameters_that_are_written_again_are_the_same() -> None:
    path = Path("params.yaml")
    path.write_text("seeds: 2")
    used.begin()
    assert load_yaml(path) == {"seeds": 2}
    for text in ("seeds: 3", "seeds: 2"):  # as `dvc exp run --queue --set-param` does beside a run
        path.unlink()
        path.write_text(text)
    used.check()
    path.write_text("seeds: 3")
    assert load_yaml(path) == {"seeds": 3}
    with pytest.raises(UserError, match=r"^params.yaml changed after it was read"):
        used.check()


def read_other(folder: Path, *, way: str) -> None:
    """A trial that uses a file that is none of its inputs."""
    if way == "open":
        Path("other.py").read_bytes()
    else:
        importlib.import_module("other")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("way", ["open", "import"])
def test_a_trial_that_uses_more_than_its_inputs_is_refused(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    Path("other.py").write_text("")
    used.begin()
    with pytest.raises(UserError, match=r"^seed-0 of p used other.py, which is none of its inputs$"):
        run_trials([Trial("p", "", 0, read_other, {"way": way})], Path("out"))
    assert not list(store.STORE.glob("*"))


EDITED_WITHIN_A_SECOND = """
import os, sys
from pathlib import Path
from phasegate.base import used
source = Path("edited.py")
source.write_text("VALUE = 1")
import edited
when = os.stat(edited.__cached__).st_mtime
source.write_text("VALUE = 2")
os.utime(source, (when, when))
del sys.modules["edited"]
if sys.argv[1:]:
    used.begin()
import edited
print(edited.VALUE)
"""


def test_an_edit_in_the_second_of_the_last_one_is_not_missed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(EDITED_WITHIN_A_SECOND)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    for arguments, value in (([], "1"), (["begin"], "2")):  # Python itself runs the first
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        words = [sys.executable, "script.py", *arguments]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == value


@pytest.mark.usefixtures("project")
def test_prepared_arrays_count_as_used() -> None:
    path = write_tiny_data(Path("data/prepared")) / "test.safetensors"
    used.begin()
    load_splits(path)
    path.touch()
    with pytest.raises(UserError, match=r"^data/prepared/test.safetensors changed after it was read"):
        used.check()


def test_a_stage_notes_what_it_uses_from_its_first_import_on() -> None:
    code = "import sys; sys.argv = ['-m']; import stages; from phasegate.base import used; sys.exit(not used.begun())"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def recorded(study: Checkout) -> tuple[dict[str, Any], dict[Path, bytes]]:
    """What dvc.lock says of the stage, but for its outputs, which hold recorded times, and all weights."""
    stage = yaml.safe_load((study.folder / "dvc.lock").read_text())["stages"]["references"]
    weights = (study.folder / "models/references").rglob("weights.safetensors")
    return {key: stage[key] for key in ("deps", "params")}, {path: path.read_bytes() for path in weights}


SEEDS = (b"seeds:\n  first: 300\n  count: 2\n", b"seeds:\n  first: 300\n  count: 3\n")
IMPORTED = ("phasegate/training/loop.py", "stages/references.py")  # edited while workers import
READ = ("data/prepared/fit.safetensors", "params.yaml")  # edited while they train


def test_dvc_records_nothing_of_a_stage_whose_files_change(small_study: Path, tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study", of=small_study, PHASEGATE_WORKERS="2", PHASEGATE_SNAPSHOT="0")
    hold, run = held(study), ("dvc", "repro", "references")
    study.command(*run)
    before, kept, begun = recorded(study), study.folder / ".phasegate", f"{store.UNFINISHED}/*/{SNAPSHOT}"
    for name in (*IMPORTED, *READ):
        path = study.folder / name
        was = path.read_bytes()
        shutil.rmtree(kept)
        hold.touch()
        stage = start(["dvc", "repro", "--single-item", "--force", "references"], study.folder, study.environment)
        wait_for(partial(chaos.find, stage, "worker") if name in IMPORTED else lambda: len([*kept.glob(begun)]) > 1)
        path.unlink()
        path.write_bytes(was.replace(*SEEDS) if name == "params.yaml" else was + b"\n# edited\n")
        hold.unlink()
        said = stage.communicate()[0]
        assert stage.returncode and f"references: {name} changed after it was read, so this result is not" in said
        assert "Traceback" not in said and recorded(study)[0] == before[0]
        assert len([*kept.glob("trials/*")]) == (4 if name == "params.yaml" else 0)  # what is right is kept
        if name != "params.yaml":
            path.unlink()
            path.write_bytes(was)
    study.command(*run)
    now, weights = recorded(study)
    assert now["params"]["params.yaml"]["seeds"]["count"] == 3 and len(weights) == 6
    path.write_bytes(was)
    for words in (run, (*run, "--single-item", "--force")):
        study.command(*words)
        assert recorded(study) == before
