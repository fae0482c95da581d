"""Whatever is killed, stopped or fails: what was finished stays, what was not goes on, and nobody is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from phasegate import processes, trials
from phasegate.errors import Diverged, UserError
from phasegate.failure import FAILURE, Failure, read_failure
from phasegate.snapshots import SNAPSHOT
from phasegate.trials import SECONDS, UNFINISHED, Trial, run_trials
from tests import chaos
from tests.small_study import PATH, ROOT, Checkout

WEIGHTS = "weights"
SLOW_REFERENCES = {
    "cnn": {"channels": [8, 8], "steps": 1_500, "batch": 100, "lr": 0.02, "weight_decay": 0.1, "published": 94.0}
}
PATIENCE = 60  # seconds for what takes one or two on a busy machine


def record(folder: Path, *, log: Path, seed: int, harm: str = "", at: int = 0, kept: int = 0) -> None:
    """A trial that writes its seed to a log and leaves a file; the one of seed `at` comes to harm."""
    with log.open("a") as file:
        file.write(f"{seed}\n")
    (folder / "begun.txt").write_text("x" * 1000)
    if seed == at and harm:
        first = not (harmed := log.with_name("harmed")).exists()
        harmed.touch()
        if harm == "diverges":
            raise Diverged("the loss is nan", 210)
        if harm == "killed" and first:
            wait_for(lambda: len(list(log.parent.glob("store/trials/*/result.txt"))) >= kept)
            (folder / SNAPSHOT).write_text("a snapshot")
            os.kill(os.getpid(), signal.SIGKILL)
        if harm == "slow":
            (log.with_name("slow")).touch()
            time.sleep(PATIENCE)
    (folder / "result.txt").write_text(f"seed {seed}, with{'' if (folder / SNAPSHOT).exists() else 'out'} a snapshot")


def wanted(folder: Path, seeds: int = 3, **arguments: Any) -> list[Trial]:
    """Trials of `record` with these arguments, which read a file of their own start."""
    starts = {seed: folder / f"starts/seed-{seed}" for seed in range(seeds)}
    for start in starts.values():
        start.mkdir(parents=True, exist_ok=True)
        if not (start / FAILURE).exists():
            (start / "weights").write_text(WEIGHTS)
    shared = {"log": folder / "log", **arguments}
    return [Trial(f"arm/seed-{s}", record, {**shared, "seed": s}, (starts[s] / "weights",)) for s in starts]


def begun(folder: Path) -> list[int]:
    """The seeds whose trials began, in their order."""
    return [int(line) for line in (folder / "log").read_text().split()] if (folder / "log").exists() else []


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trials, "STORE", tmp_path / "store/trials")
    monkeypatch.setenv("PHASEGATE_WORKERS", "1")
    return tmp_path / "store"


def test_the_trial_of_a_killed_worker_goes_on_and_finished_ones_are_not_repeated(
    tmp_path: Path, own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHASEGATE_WORKERS", "2")
    monkeypatch.setattr(trials, "STORE", tmp_path / "first/trials")
    run_trials(wanted(tmp_path, seeds=2), tmp_path / "out", "test")  # workers are there, and the kill hits but one
    monkeypatch.setattr(trials, "STORE", own_store / "trials")
    (tmp_path / "log").unlink()
    with pytest.raises(UserError, match=r"^a worker of test was killed, .*`dvc repro` goes on where it was"):
        run_trials(wanted(tmp_path, harm="killed", at=2, kept=2), tmp_path / "out", "test")
    run_trials(wanted(tmp_path, harm="killed", at=2, kept=2), tmp_path / "out", "test")
    assert sorted(begun(tmp_path)) == [0, 1, 2, 2]
    assert (tmp_path / "out/arm/seed-2/result.txt").read_text() == "seed 2, with a snapshot"
    assert not list((own_store / UNFINISHED).iterdir())


@pytest.mark.parametrize("other", ["argument", "input"])
def test_what_a_killed_trial_left_is_never_used_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setenv("PHASEGATE_WORKERS", "2")
    with pytest.raises(UserError, match=r"^a worker of test was killed"):
        run_trials(wanted(tmp_path, harm="killed"), tmp_path / "out", "test")
    if other == "input":
        monkeypatch.setattr("tests.test_reliability.WEIGHTS", "other weights")
    at = 9 if other == "argument" else 0
    run_trials(wanted(tmp_path, harm="killed", at=at), tmp_path / "out", "test")
    assert (tmp_path / "out/arm/seed-0/result.txt").read_text() == "seed 0, without a snapshot"


def test_a_trial_that_diverges_fails_alone_and_is_not_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_trials(wanted(tmp_path, harm="diverges", at=1), tmp_path / "out", "p7b1")
    assert read_failure(tmp_path / "out/arm/seed-1") == Failure("p7b1", "arm", 1, 210, "the loss is nan")
    assert (tmp_path / "out/arm/seed-1" / SECONDS).exists() and not (tmp_path / "out/arm/seed-1/result.txt").exists()
    assert [(tmp_path / f"out/arm/seed-{seed}/result.txt").exists() for seed in range(3)] == [True, False, True]
    said = capfd.readouterr().err
    assert said.endswith("p7b1: 1 of 3 trials failed, as p7b1, arm, seed 1, step 210: the loss is nan\n")
    run_trials(wanted(tmp_path, harm="diverges", at=1), tmp_path / "out", "p7b1")
    assert begun(tmp_path) == [0, 1, 2]


def test_what_an_earlier_run_left_in_a_folder_is_not_mixed_with_what_a_later_one_does(tmp_path: Path) -> None:
    for harm, seeds in (("diverges", {1}), ("", set()), ("diverges", {1})):
        run_trials(wanted(tmp_path, harm=harm, at=1), tmp_path / "out", "test")
        for seed in range(3):
            files = {path.name for path in (tmp_path / f"out/arm/seed-{seed}").iterdir()}
            assert files == {"begun.txt", SECONDS, FAILURE if seed in seeds else "result.txt"}


def test_a_trial_whose_start_failed_fails_too_and_does_not_begin(tmp_path: Path) -> None:
    start = tmp_path / "starts/seed-1"
    start.mkdir(parents=True)
    (start / FAILURE).write_text(json.dumps(Failure("p7a", "baseline", 1, 3, "the loss is inf").__dict__))
    run_trials(wanted(tmp_path), tmp_path / "out", "p7b1")
    reason = f"its start {start} failed: the loss is inf"
    assert read_failure(tmp_path / "out/arm/seed-1") == Failure("p7b1", "arm", 1, 0, reason)
    assert begun(tmp_path) == [0, 2]
    (start / FAILURE).unlink()
    with pytest.raises(UserError, match="weights is missing: `dvc repro` runs the stage that writes it"):
        run_trials([*wanted(tmp_path, seeds=1), Trial("arm/seed-9", record, {}, (start / "weights",))], tmp_path, "x")


def test_when_every_trial_fails_the_stage_ends(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"^every trial of p7a failed, as p7a, arm, seed 0, step 210: the loss is nan"
        ):
            run_trials(wanted(tmp_path, seeds=1, harm="diverges"), tmp_path / "out", "p7a")
    assert begun(tmp_path) == [0]


def test_what_a_killed_run_left_half_written_goes(tmp_path: Path, own_store: Path) -> None:
    run_trials(wanted(tmp_path, seeds=1), tmp_path / "out", "test")
    [kept] = (own_store / "trials").iterdir()
    half = kept.with_suffix(".tmp")
    half.mkdir()
    (half / "result.txt").write_text("half")
    long_ago = time.time() - 31 * 86_400
    for name, when in (("old", long_ago), ("new", time.time())):
        (own_store / UNFINISHED / name).mkdir(parents=True)
        os.utime(own_store / UNFINISHED / name, (when, when))
    run_trials(wanted(tmp_path, seeds=1), tmp_path / "out", "test")
    assert list((own_store / "trials").iterdir()) == [kept]
    assert [path.name for path in (own_store / UNFINISHED).iterdir()] == ["new"]


STAGE = """
import sys
from pathlib import Path
from phasegate import stage
from phasegate.trials import run_trials
from tests.test_reliability import wanted
stage.load_params = lambda: None
stage.run(lambda _: run_trials(wanted(Path(), harm="slow", at=1), Path("out"), "test"))
"""


def start(folder: Path, until: Callable[[psutil.Popen], bool] | None = None) -> psutil.Popen:
    """A stage whose second trial is slow, in two workers; returns when that trial has begun, or `until` holds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PHASEGATE_WORKERS": "2", "PHASEGATE_PROGRESS": "0"}
    stage = psutil.Popen(
        [sys.executable, "-c", STAGE],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=hear_interrupts,
        text=True,
    )
    wait_for(lambda: until(stage) if until else (folder / "slow").exists())
    return stage


def hear_interrupts() -> None:
    """As in a terminal: what a shell starts in its background is deaf to Ctrl-C, and so would be all below it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def alive(process: psutil.Process) -> bool:
    """Whether a process still does anything; one that is dead may wait for a while to be noticed by init."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Any) -> float:
    """Wait until something holds; returns after how many seconds it did."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < PATIENCE
        time.sleep(0.02)
    return time.monotonic() - begin


LEAVES = """
import time, joblib, multiprocessing
from phasegate import processes
if __name__ == "__main__":
    tasks = [joblib.delayed(time.sleep)(60) for _ in range(2)]
    running = joblib.Parallel(n_jobs=2, return_as="generator", backend="loky")(tasks)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    processes.leave(3)
"""


def test_who_leaves_ends_its_workers_first_and_silently(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:resource_tracker"}  # as `run` does
    words = [sys.executable, str(tmp_path / "leaves.py")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE / 2, check=False)
    workers = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == 3 and done.stderr == "" and len(workers) == 2
    assert not any(psutil.pid_exists(pid) and alive(psutil.Process(pid)) for pid in workers)


STOPPED = """
import time
from pathlib import Path
from phasegate import trials
if __name__ == "__main__":
    some = [trials.Trial(f"split/seed-{seed}", time.sleep, {}) for seed in range(2)]
    trials._results(some, {trial.name: Path("trials") / trial.name for trial in some}, "p7b2").close()
"""


def test_trials_that_are_not_waited_for_end_silently(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PHASEGATE_WORKERS": "2"}
    words = [sys.executable, "stopped.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "UserWarning" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_stage_ends_within_three_seconds_children_included_and_says_how_to_go_on(
    tmp_path: Path, number: int
) -> None:
    stage = start(tmp_path)
    family = stage.children(recursive=True)
    assert len(family) >= 2
    for worker in chaos.workers(stage):
        worker.send_signal(signal.SIGINT)  # which only the stage hears
    time.sleep(0.5)
    assert stage.poll() is None and all(map(alive, family))
    os.killpg(stage.pid, number) if number == signal.SIGINT else stage.send_signal(number)  # Ctrl-C is for all
    seconds = wait_for(lambda: stage.poll() is not None and not any(map(alive, family)))
    assert stage.returncode == 130 and seconds < 3
    assert stage.communicate()[0] == "-c: stopped; `dvc repro` goes on where it was\n"


def test_a_stage_that_is_stopped_while_it_imports_says_how_to_go_on(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    imports = "from pathlib import Path; import time; Path('slow').touch(); time.sleep(60)"
    (tmp_path / "stages/check.py").write_text(imports)
    words = [sys.executable, "-m", "stages.check"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for number in (signal.SIGINT, signal.SIGTERM):
        (tmp_path / "slow").unlink(missing_ok=True)
        stage = psutil.Popen(
            words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
        )
        wait_for((tmp_path / "slow").exists)
        stage.send_signal(number)
        assert stage.communicate(timeout=3)[1] == "check: stopped; `dvc repro` goes on where it was\n"
        assert stage.returncode == 130


def test_workers_whose_stage_is_killed_before_they_have_imported_anything_begin_nothing(tmp_path: Path) -> None:
    stage = start(tmp_path, until=lambda stage: len(chaos.workers(stage)) == 2)
    family = stage.children(recursive=True)
    stage.kill()
    stage.communicate()
    wait_for(lambda: not any(map(alive, family)))
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("parent", ["stage", "dvc"])
def test_nobody_outlives_a_killed_run(tmp_path: Path, parent: str) -> None:
    if parent == "stage":
        victim = start(tmp_path)
        family = victim.children(recursive=True)
    else:
        command = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["check"]["cmd"]
        shutil.copytree(ROOT / "stages", tmp_path / "stages")
        (tmp_path / "stages/check.py").write_text(STAGE)
        code = f"import subprocess; subprocess.run({command!r}, shell=True)"
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PHASEGATE_WORKERS": "2",
            "DVC_STAGE": "check",
            "PATH": PATH,
        }
        victim = psutil.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
        wait_for(lambda: (tmp_path / "slow").exists())
        family = victim.children(recursive=True)
    assert len(family) >= 2
    victim.kill()
    victim.communicate()
    assert wait_for(lambda: not any(map(alive, family))) < 3


def test_a_second_run_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path)
    code = STAGE.replace('harm="slow", at=1', "seeds=1")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:resource_tracker"}  # as `run` does
    second = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    with second:
        assert second.stderr is not None
        assert second.stderr.readline() == f"{tmp_path}: another run is at work here; waiting until it ends\n"
        assert second.poll() is None
        first.kill()
        first.communicate()
        assert second.wait(PATIENCE) == 0
    monkeypatch.chdir(tmp_path)
    with processes.alone():  # and leaves the folder free
        pass


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        ("Path('gone').read_text()", 2, "-c: gone: No such file or directory\n"),
        ("Path('.').read_text()", 2, "-c: .: Is a directory\n"),
        ("(_ for _ in ()).throw(OSError(28, 'No space left on device'))", 2, "-c: a file: No space left on device\n"),
        ("{}['gone']", 1, "Traceback"),
    ],
)
def test_what_the_machine_refuses_is_said_in_a_line_and_bugs_keep_their_traceback(
    tmp_path: Path, main: str, code: int, said: str
) -> None:
    script = (
        f"from pathlib import Path; from phasegate import stage; stage.load_params = dir; stage.run(lambda _: {main})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:resource_tracker"}  # as `run` does
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code and (done.stderr == said if code == 2 else done.stderr.startswith(said))


def test_a_full_disk_stops_the_stage_in_one_line_and_what_was_finished_stays(small_disk: Path) -> None:
    script = STAGE.replace('harm="slow", at=1', "seeds=6")  # each trial leaves three files of a page, of 16 there are
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PHASEGATE_WORKERS": "1", "PHASEGATE_PROGRESS": "0"}
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=small_disk, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr, done.stderr
    kept = [folder for folder in (small_disk / ".phasegate/trials").iterdir() if folder.suffix != ".tmp"]
    assert kept and all((folder / "result.txt").read_text().endswith("without a snapshot") for folder in kept)
    (small_disk / "log").unlink()
    shutil.rmtree(small_disk / "starts")
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert subprocess.run(words, cwd=small_disk, env=environment, check=False).returncode == 0
    assert len(begun(small_disk)) == 6 - len(kept)


def test_ctrl_c_ends_dvc_and_all_below_and_two_runs_at_once_do_no_harm(tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study", PHASEGATE_WORKERS="2")
    study.change({"references": {"mnist1d": SLOW_REFERENCES}})
    words = ["dvc", "repro", "references"]

    def repro() -> psutil.Popen:
        run = psutil.Popen(
            words, cwd=study.folder, env=study.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, text=True, preexec_fn=hear_interrupts,
        )  # fmt: skip
        wait_for(lambda: chaos.find(run, "worker"))
        return run

    first = repro()
    second = study.command(*words, ok=False)
    assert f"is busy, it is being blocked by:\n  (PID {first.pid})" in second
    family = first.children(recursive=True)
    os.killpg(first.pid, signal.SIGINT)
    assert wait_for(lambda: first.poll() and not any(map(alive, family))) < 3
    said = first.communicate()[0]
    assert "train_references: stopped; `dvc repro` goes on where it was\n" in said and "Traceback" not in said
    study.command(*words)
    assert len(list((study.folder / "models/references").glob("*/*/checkpoint.json"))) == 2
