"""Whatever is killed, stopped or fails: what was finished stays, the rest resumes, and no process is left behind."""

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

from phasegate.base import processes
from phasegate.base.errors import Diverged, UserError
from phasegate.records.trial_folder import FAILURE, Failure, read_failure, write_failure
from phasegate.training.killed_trials import SNAPSHOT
from phasegate.trials import store
from phasegate.trials.run import run_trials
from phasegate.trials.trial import Trial
from tests import chaos
from tests.small_study import PATH, ROOT, Checkout

WEIGHTS = "weights"
PATIENCE = 300  # seconds for what takes one or two, unless the machine is very busy
ENVIRONMENT = os.environ | {
    "PATH": PATH,
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore:resource_tracker",  # as `stage.run` sets it
    "PHASEGATE_WORKERS": "2",
    "PHASEGATE_PROGRESS": "0",
}
pytestmark = pytest.mark.usefixtures("own_store")


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
        if harm == "exits":
            sys.exit(0)
        if harm == "killed" and first:
            wait_for(lambda: len(list(log.parent.glob("store/trials/*/result.txt"))) >= kept)
            (folder / SNAPSHOT).write_text("a snapshot")
            os.kill(os.getpid(), signal.SIGKILL)
        if harm == "slow":
            (log.with_name("slow")).touch()
            time.sleep(2 * PATIENCE)
    (folder / "result.txt").write_text(f"seed {seed}, with{'' if (folder / SNAPSHOT).exists() else 'out'} a snapshot")


def wanted(folder: Path, seeds: int = 3, **arguments: Any) -> list[Trial]:
    """Trials of `record` with these arguments, each with an input file of its own."""
    starts = [folder / f"starts/seed-{seed}" for seed in range(seeds)]
    for start in starts:
        start.mkdir(parents=True, exist_ok=True)
        if not (start / FAILURE).exists():
            (start / "weights").write_text(WEIGHTS)
    shared = {"log": folder / "log", **arguments}
    return [Trial("p", "arm", s, record, {**shared, "seed": s}, (starts[s] / "weights",)) for s in range(seeds)]


def begun(folder: Path) -> list[int]:
    """The seeds whose trials began, in their order."""
    return [int(line) for line in (folder / "log").read_text().split()] if (folder / "log").exists() else []


def test_a_killed_workers_trial_resumes_and_finished_trials_are_not_repeated(
    tmp_path: Path, own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHASEGATE_WORKERS", "2")
    monkeypatch.setattr(store, "STORE", tmp_path / "first/trials")
    run_trials(wanted(tmp_path, seeds=2), tmp_path / "out")  # workers are there, and the kill hits but one
    monkeypatch.setattr(store, "STORE", own_store / "trials")
    (tmp_path / "log").unlink()
    with pytest.raises(UserError, match=r"^a worker of out was killed, .*`dvc repro` resumes"):
        run_trials(wanted(tmp_path, harm="killed", at=2, kept=2), tmp_path / "out")
    run_trials(wanted(tmp_path, harm="killed", at=2, kept=2), tmp_path / "out")
    assert sorted(begun(tmp_path)) == [0, 1, 2, 2]
    assert (tmp_path / "out/arm/seed-2/result.txt").read_text() == "seed 2, with a snapshot"
    assert not list((own_store / store.UNFINISHED).iterdir())


@pytest.mark.parametrize("other", ["argument", "input"])
def test_what_a_killed_trial_left_no_other_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.setenv("PHASEGATE_WORKERS", "2")
    with pytest.raises(UserError, match=r"^a worker of out was killed"):
        run_trials(wanted(tmp_path, harm="killed"), tmp_path / "out")
    if other == "input":
        monkeypatch.setattr("tests.test_reliability.WEIGHTS", "other weights")
    at = 9 if other == "argument" else 0
    run_trials(wanted(tmp_path, harm="killed", at=at), tmp_path / "out")
    assert (tmp_path / "out/arm/seed-0/result.txt").read_text() == "seed 0, without a snapshot"


def test_a_trial_that_diverges_fails_alone_and_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_trials(wanted(tmp_path, harm="diverges", at=1), tmp_path / "out")
    assert read_failure(tmp_path / "out/arm/seed-1") == Failure("p", "arm", 1, 210, "the loss is nan")
    assert not (tmp_path / "out/arm/seed-1/result.txt").exists()
    assert [(tmp_path / f"out/arm/seed-{seed}/result.txt").exists() for seed in range(3)] == [True, False, True]
    said = capfd.readouterr().err
    assert said.endswith("out: 1 of 3 trials failed, the first: p, arm, seed 1, step 210: the loss is nan\n")
    run_trials(wanted(tmp_path, harm="diverges", at=1), tmp_path / "out")
    assert begun(tmp_path) == [0, 1, 2]


def test_what_an_earlier_run_left_is_not_mixed_with_a_later_result(tmp_path: Path) -> None:
    for harm, seeds in (("diverges", {1}), ("", set()), ("diverges", {1})):
        run_trials(wanted(tmp_path, harm=harm, at=1), tmp_path / "out")
        for seed in range(3):
            files = {path.name for path in (tmp_path / f"out/arm/seed-{seed}").iterdir()}
            assert files == {"begun.txt", FAILURE if seed in seeds else "result.txt"}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bug_in_a_trial_keeps_its_traceback_and_no_trial_ends_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setenv("PHASEGATE_WORKERS", workers)
    with pytest.raises(RuntimeError, match=r"arm/seed-1 of p called sys.exit\(0\)"):
        run_trials(wanted(tmp_path, harm="exits", at=1), tmp_path / "out")
    bug = Trial("p", "arm", 0, record, {"log": 0, "seed": 0})
    with pytest.raises((RuntimeError, AttributeError), match="'int' object has no attribute 'open'") as caught:
        run_trials([bug], tmp_path / "out")
    if workers == "2":
        assert "in record\n    with log.open" in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_workers_begin_acts_when_they_have_begun(number: int) -> None:
    heard, before = list[int](), signal.signal(number, lambda number, _: heard.append(number))
    with processes._signals_later():
        signal.raise_signal(number)  # to this thread: another one would take what is sent to the process, a bit later
        assert not heard
    assert heard == [number] and signal.signal(number, before) != before


def test_a_trial_whose_start_failed_fails_too_and_does_not_begin(tmp_path: Path) -> None:
    start = tmp_path / "starts/seed-1"
    write_failure(start, Failure("p7a", "baseline", 1, 3, "the loss is inf"))
    run_trials(wanted(tmp_path), tmp_path / "out")
    reason = f"{start}, which it needs, failed: the loss is inf"
    assert read_failure(tmp_path / "out/arm/seed-1") == Failure("p", "arm", 1, 0, reason)
    assert begun(tmp_path) == [0, 2]
    (start / FAILURE).unlink()
    with pytest.raises(UserError, match="weights is missing: `dvc repro` runs the stage that writes it"):
        run_trials([*wanted(tmp_path, seeds=1), Trial("p", "arm", 9, record, {}, (start / "weights",))], tmp_path)


def test_when_every_trial_fails_the_stage_ends(tmp_path: Path) -> None:
    sentence = r"^every trial of out failed, the first: p, arm, seed 0, step 210: the loss is nan"
    for _ in range(2):
        with pytest.raises(UserError, match=sentence):
            run_trials(wanted(tmp_path, seeds=1, harm="diverges"), tmp_path / "out")
    run_trials(wanted(tmp_path, seeds=1, harm="diverges"), tmp_path / "out", all_may_fail=True)
    assert begun(tmp_path) == [0]


def test_what_a_killed_run_left_half_written_is_deleted(tmp_path: Path, own_store: Path) -> None:
    run_trials(wanted(tmp_path, seeds=1), tmp_path / "out")
    [kept] = (own_store / "trials").iterdir()
    half = kept.with_suffix(".tmp")
    half.mkdir()
    (half / "result.txt").write_text("half")
    long_ago = time.time() - 31 * 86_400
    for name, when in (("old", long_ago), ("new", time.time())):
        (own_store / store.UNFINISHED / name).mkdir(parents=True)
        os.utime(own_store / store.UNFINISHED / name, (when, when))
    run_trials(wanted(tmp_path, seeds=1), tmp_path / "out")
    assert list((own_store / "trials").iterdir()) == [kept]
    assert [path.name for path in (own_store / store.UNFINISHED).iterdir()] == ["new"]


STAGE = """
import sys
from pathlib import Path
from phasegate import stage
from phasegate.trials.run import run_trials
from tests.test_reliability import wanted
stage.load_params = lambda: None
stage.run(lambda _: run_trials(wanted(Path(), harm="slow", at=1), Path("out")))
"""


def run_code(code: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    (folder / "script.py").write_text(code)
    return subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=ENVIRONMENT | settings, capture_output=True, text=True,
        check=False, timeout=PATIENCE,
    )  # fmt: skip


def start(words: list[str], folder: Path, environment: dict[str, str] = ENVIRONMENT) -> psutil.Popen:
    """Start a program in a process group of its own, which hears Ctrl-C as in a terminal.

    What a shell starts in its background is deaf to Ctrl-C, and so would be all below it.
    """
    return psutil.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def start_slow(folder: Path) -> psutil.Popen:
    """Start a stage whose second trial is slow, and wait until that trial has begun."""
    stage = start([sys.executable, "-c", STAGE], folder)
    wait_for((folder / "slow").exists)
    return stage


def alive(process: psutil.Process) -> bool:
    """Whether a process still does anything; one that is dead may wait for a while to be noticed by init."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait until something holds. What is stopped would go on for longer than this waits."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < PATIENCE
        time.sleep(0.02)


LEAVES = """
import multiprocessing, psutil, time
from phasegate.base import processes
if __name__ == "__main__":
    running = processes.in_workers(bytes, [(0,), (1 << 28,)], 2, "{}")
    next(running)
    workers = multiprocessing.active_children()
    answers = lambda worker: psutil.Process(worker.pid).memory_info().rss > 1 << 28
    while not any(map(answers, workers)):
        time.sleep(0.02)
    print(*(worker.pid for worker in workers), flush=True)
    {}
"""  # a worker is in the middle of its answer, which nobody reads


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("processes.say_stopped()", 130, "script: stopped; `dvc repro` resumes it\n"),
        ("running.close()", 0, ""),
        ("max(workers, key=answers).kill(); next(running)", 1, "phasegate.base.processes.WorkerKilled\n"),
    ],
)
def test_who_does_not_wait_for_workers_ends_them_first_and_silently(
    tmp_path: Path, start_method: str, end: str, code: int, said: str
) -> None:
    done = run_code(LEAVES.format(start_method, end), tmp_path)
    workers = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == code and (done.stderr == said if code != 1 else done.stderr.endswith(said))
    assert len(workers) == 2
    wait_for(lambda: not any(psutil.pid_exists(pid) and alive(psutil.Process(pid)) for pid in workers))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_stage_ends_with_all_below_and_says_how_to_resume(tmp_path: Path, number: int) -> None:
    stage = start_slow(tmp_path)
    family = stage.children(recursive=True)
    assert len(family) >= 2
    for worker in chaos.workers(stage):
        worker.send_signal(signal.SIGINT)  # which only the stage hears
    time.sleep(0.5)
    assert stage.poll() is None and all(map(alive, family))
    os.killpg(stage.pid, number) if number == signal.SIGINT else stage.send_signal(number)  # Ctrl-C is for all
    wait_for(lambda: stage.poll() is not None and not any(map(alive, family)))
    assert stage.returncode == 130 and stage.communicate()[0] == "-c: stopped; `dvc repro` resumes it\n"


def test_a_stage_that_is_stopped_while_it_imports_says_how_to_resume(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    imports = "from pathlib import Path; import time; Path('slow').touch(); time.sleep(600)"
    (tmp_path / "stages/check.py").write_text(imports)
    for number in (signal.SIGINT, signal.SIGTERM):
        (tmp_path / "slow").unlink(missing_ok=True)
        stage = start([sys.executable, "-m", "stages.check"], tmp_path)
        wait_for((tmp_path / "slow").exists)
        stage.send_signal(number)
        assert stage.communicate(timeout=PATIENCE)[0] == "check: stopped; `dvc repro` resumes it\n"
        assert stage.returncode == 130


def kill_with_all_below(victim: psutil.Popen) -> None:
    """Kill a run, and check that no process outlives it."""
    family = victim.children(recursive=True)
    assert len(family) >= 2
    victim.kill()
    wait_for(lambda: not any(map(alive, family)))
    victim.communicate()


def test_no_process_outlives_a_killed_dvc(tmp_path: Path) -> None:
    command = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["check"]["cmd"]
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    (tmp_path / "stages/check.py").write_text(STAGE)
    code = f"import subprocess; subprocess.run({command!r}, shell=True)"
    dvc = start([sys.executable, "-c", code], tmp_path, ENVIRONMENT | {"DVC_STAGE": "check"})
    wait_for((tmp_path / "slow").exists)
    kill_with_all_below(dvc)


def test_no_process_outlives_a_killed_stage_and_a_second_run_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start_slow(tmp_path)
    with start([sys.executable, "-c", STAGE.replace('harm="slow", at=1', "seeds=1")], tmp_path) as second:
        assert second.stdout.readline() == f"{tmp_path}: another run is at work here; waiting until it ends\n"
        assert second.poll() is None
        kill_with_all_below(first)
        assert second.wait(PATIENCE) == 0
    monkeypatch.chdir(tmp_path)
    with processes.alone():  # and leaves the folder free
        pass


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        ("Path('gone').read_text()", 2, "script: gone: No such file or directory\n"),
        ("Path('.').read_text()", 2, "script: .: Is a directory\n"),
        ("(_ for _ in ()).throw(OSError(28, 'No space left'))", 2, "script: a file: No space left\n"),
        ("{}['gone']", 1, "Traceback"),
    ],
)
def test_what_the_machine_refuses_is_said_in_a_line_and_bugs_keep_their_traceback(
    tmp_path: Path, main: str, code: int, said: str
) -> None:
    imports = "from pathlib import Path; from phasegate import stage"
    done = run_code(f"{imports}; stage.load_params = dir; stage.run(lambda _: {main})", tmp_path)
    assert done.returncode == code and (done.stderr == said if code == 2 else done.stderr.startswith(said))


def test_a_full_disk_stops_the_stage_in_one_line_and_what_was_finished_stays(small_disk: Path) -> None:
    script = STAGE.replace('harm="slow", at=1', "seeds=6")  # each trial leaves four files of a page, of 20 there are
    subprocess.run(["mount", "-o", "remount,size=80k", str(small_disk)], check=True)
    done = run_code(script, small_disk, PHASEGATE_WORKERS="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr, done.stderr
    kept = [folder for folder in (small_disk / ".phasegate/trials").iterdir() if folder.suffix != ".tmp"]
    assert kept and all((folder / "result.txt").read_text().endswith("without a snapshot") for folder in kept)
    (small_disk / "log").unlink()
    shutil.rmtree(small_disk / "starts")
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert run_code(script, small_disk, PHASEGATE_WORKERS="1").returncode == 0
    assert len(begun(small_disk)) == 6 - len(kept)


def held(study: Checkout) -> Path:
    """A file that is not there: while it is, trials in this copy wait before their first step."""
    wait = "while os.path.exists('hold'):\n        time.sleep(0.02)"
    with (study.folder / "phasegate/training/loop.py").open("a") as file:
        file.write(f"\nimport os, time\n_fit = fit\ndef fit(*given):\n    {wait}\n    _fit(*given)\n")
    return study.folder / "hold"


def test_ctrl_c_ends_dvc_and_all_below_and_two_runs_do_no_harm(small_study: Path, tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study", of=small_study, PHASEGATE_WORKERS="2")
    hold, words = held(study), ["dvc", "repro", "references"]
    hold.touch()
    first = start(words, study.folder, study.environment)
    wait_for(lambda: chaos.find(first, "worker"))
    assert f"is busy, it is being blocked by:\n  (PID {first.pid})" in study.command(*words, ok=False)
    family = first.children(recursive=True)
    os.killpg(first.pid, signal.SIGINT)
    wait_for(lambda: first.poll() and not any(map(alive, family)))
    said = first.communicate()[0]
    assert said.count("references: stopped; `dvc repro` resumes it\n") == 1
    assert "Traceback" not in said and "Warning" not in said
    hold.unlink()
    study.command(*words)
    assert len(list((study.folder / "models/references").glob("*/*/checkpoint.json"))) == 4
