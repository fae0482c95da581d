"""Whatever is wrong around the pipeline is said in one sentence, with exit code 2; locks whose owner is gone go."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from dvc.repo import Repo

from phasegate.base.errors import UserError
from phasegate.params import Params
from phasegate.tools.repair import is_cut_off, repair
from phasegate.training import device
from stages import check as check_stage
from tests.small_study import ASCII, ROOT, Checkout, ended

Break = Callable[[Checkout, Path], object]


def fill_the_disk_of_caches(study: Checkout, disk: Path) -> None:
    study.environment["DVC_SITE_CACHE_DIR"] = str(disk / "dvc")
    (disk / "full").write_bytes(bytes(60 << 10))  # of 64 KiB


def make_read_only(study: Checkout, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    study.folder = shutil.copytree(study.folder, disk / "study")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


WRONG: list[tuple[str, Break]] = [
    ("not a git repository", lambda study, _: shutil.rmtree(study.folder / ".git")),
    ("not inside of a DVC repository", lambda study, _: shutil.rmtree(study.folder / ".dvc")),
    ("config file error: Invalid line", lambda study, _: (study.folder / ".dvc/config").write_text("[core")),
    ("database or disk is full", fill_the_disk_of_caches),
    ("Read-only file system", make_read_only),
]


@pytest.mark.parametrize(("words", "wrong"), WRONG, ids=[words for words, _ in WRONG])
def test_what_is_wrong_around_is_told(words: str, wrong: Break, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    study, needs_disk = Checkout(tmp_path / "study"), wrong in (fill_the_disk_of_caches, make_read_only)
    wrong(study, request.getfixturevalue("small_disk") if needs_disk else tmp_path)
    for program in ("repair", "plan", "experiments"):  # with which make's repro, study, plan, report and phases begin
        done = ended(sys.executable, "-m", f"phasegate.tools.{program}", cwd=study.folder, env=study.environment)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        known = words in done.stderr or (program == "experiments" and "changed since the last commit" in done.stderr)
        assert known and done.stderr.startswith(f"{program}: ")


def test_make_says_in_one_line_that_it_may_not_write(small_disk: Path) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for target in ("clean", "lock", "repro"):  # which makes the environment
        done = ended("make", target, cwd=small_disk)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.splitlines()[0] == f"{small_disk} can't be written" and done.stderr.count("\n") == 2


def test_verdicts_need_a_commit_to_compare_with(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for _ in range(2):
        done = ended("make", "verdicts", cwd=tmp_path, env=environment)
        assert done.returncode == 2 and done.stdout == ""
        assert "verdicts: there is no commit origin/main to compare with: set BASE" in done.stderr
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)


def test_a_stream_that_is_not_utf8_gets_escapes() -> None:
    code = "from phasegate.base.errors import *\nwith report_user_errors('x'): print('−1'); raise UserError('é')"
    for encoding in ("ascii", "latin-1"):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
        assert done.returncode == 2 and done.stdout == b"\\u22121\n", done.stderr
        assert done.stderr == b"x: " + "é".encode(encoding, "backslashreplace") + b"\n"


def test_whatever_the_locale_programs_and_stages_say_the_same(tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study")
    study.change({"plugins": {"hypothesis": "Größer − “é”\u202e."}})  # the last turns what follows
    check = ("python", "-m", "stages.check")
    assert r"hypothesis: 'Größer − “é”\u202e.' has the control character" in study.command(*check, ok=False)
    study.environment |= ASCII
    assert r"Gr\xf6\xdfer \u2212 \u201c\xe9\u201d\u202e." in study.command("python", "-m", "phasegate.tools.plan")
    said = study.command(*check, ok=False)
    assert said.startswith(r"check: plugins.hypothesis: 'Gr\xf6\xdfer \u2212 \u201c\xe9\u201d\u202e.' has the control")
    study.change({"plugins": {"hypothesis": "Größer"}})
    assert r"\xb1" in study.command("dvc", "repro", "check")
    assert study.command("python", "-m", "phasegate.tools.repair") == ""


def test_what_make_starts_escapes_what_the_terminal_cannot_show() -> None:
    rule = f"show:\n\t@{sys.executable} -c 'print(chr(0x2212))'"
    for encoding in ("ascii", "ascii:strict", ":strict"):
        environment = os.environ | ASCII | {"PYTHONIOENCODING": encoding}
        done = ended("make", "--eval", rule, "show", cwd=ROOT, env=environment)
        assert done.stdout == "\\u2212\n", done.stderr


def test_what_acts_on_a_terminal_is_escaped_in_plans_and_errors(tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study")
    study.change({"plugins": {"hypothesis": "\x1b[2J\u202e\x9b"}})
    for program in ("phasegate.tools.plan", "stages.check"):
        said = study.command("python", "-m", program, ok=program != "stages.check")
        assert r"\u202e\x9b" in said and not {"\x1b", "\u202e", "\x9b"} & {*said}


def test_an_arm_that_another_repeats_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    repeated = {phase: check_stage.repeated_arm(phase) for phase in ("p7b1", "p7b2", "p7b3", "p7b4", "p7c2", "p7c3")}
    arms = {"p7b1": "noise_acting", "p7b2": "split", "p7b3": None, "p7b4": "frequency", "p7c2": None, "p7c3": "oracle"}
    assert repeated == arms
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    claim = values["decisions"]["phases"]["p7c3"]
    claim |= {"arms": [arm for arm in claim["arms"] if arm != "oracle"], "primary": "frequency"}
    with pytest.raises(UserError, match=r"^decisions.phases.p7c3.arms lacks 'oracle', whose operations yoked repeats"):
        check_stage.main(Params.model_validate(values))


def test_locks_go_if_their_owner_is_gone_and_stay_if_it_lives(tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study")
    study.command("dvc", "status", "check")  # makes .dvc/tmp
    path, models = study.folder / ".dvc/tmp/rwlock", str(study.folder / "data/params.schema.json")
    mine = {"pid": os.getpid(), "cmd": " ".join(sys.orig_argv[1:])}
    other, dead = mine | {"cmd": " ".join(["/bin/dvc", *sys.orig_argv[2:]])}, {"pid": 2**22, "cmd": "dvc repro"}
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet buried
    unburied = {"pid": child.pid, "cmd": "true"}
    path.write_text(json.dumps({"write": {models: other}, "read": {"x": [mine, dead], "y": [dead, unburied]}}))
    assert f"blocked by:\n  (PID {os.getpid()}): {other['cmd']}" in study.command("dvc", "repro", "check", ok=False)
    assert repair(study.folder) == []
    assert json.loads(path.read_text()) == {"write": {}, "read": {"x": [mine]}} and child.wait() == 0
    study.command("dvc", "repro", "check")
    path.write_text(json.dumps({"write": {models: mine}, "read": {}}))
    assert repair(study.folder) == [] and json.loads(path.read_text())["write"] == {models: mine}
    assert "is busy" in study.command("dvc", "repro", "--force", "check", ok=False)


def test_only_a_lock_file_that_was_cut_off_is_put_aside(tmp_path: Path) -> None:
    whole = (ROOT / "dvc.lock").read_text()
    assert all(is_cut_off(whole[:length]) for length in (0, 10, 16, 30, whole.index("  prepare:") + 30))
    spoilt = whole.replace("    cmd: exec python -m stages.prepare\n", "    cmd: [\n", 1)
    later = whole.replace("schema: '2.0'", "schema: '3.0'")
    assert spoilt != whole and not any(map(is_cut_off, (spoilt, "- 1\n", later)))
    study = Checkout(tmp_path / "study")
    (study.folder / "dvc.lock").write_text(spoilt)
    assert repair(study.folder) == [] and (study.folder / "dvc.lock").read_text() == spoilt


def test_arms_that_accounts_compare_are_asked_for_first(tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study")
    arms = yaml.safe_load((ROOT / "params.yaml").read_text())["decisions"]["phases"]["p7b1"]["arms"]
    study.change({"decisions": {"phases": {"p7b1": {"arms": [arm for arm in arms if arm != "noise"]}}}})
    said = study.command("python", "-m", "stages.check", ok=False)
    assert said == "check: decisions.phases.p7b1.arms lacks 'noise', with which other arms are compared: add it\n"


LITTER = [".DS_Store", "._a.py", "Thumbs.db", "desktop.ini", ".a.py.swp", ".a.py.swo", "a.py~", "#a.py#", ".#a.py"]
LITTER += ["a.py.bak", "a.py.orig", "a.py.rej", ".nfs0001", ".~lock.a.csv#", ".a.py.1f.tmp", ".mypy_cache/a.py"]
LITTER += ["__pycache__/a.cpython-311.pyc", ".ipynb_checkpoints/a-checkpoint.py", ".idea/a.py"]


def test_dvc_sees_what_git_keeps_of_the_code_and_nothing_that_tools_leave() -> None:
    ignores = Repo(ROOT).dvcignore.is_ignored_file
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    used = {path for stage in stages for path in (*stage["deps"], *stage["outs"]) if isinstance(path, str)}
    folders = [path for path in sorted(used) if "." not in path and "$" not in path]
    assert {"plugins", "phasegate/model", "models/p7a"} <= {*folders}
    kept = subprocess.check_output(["git", "ls-files", "-z", *folders, "stages"], cwd=ROOT, text=True).split("\0")[:-1]
    assert len(kept) > 100 and [path for path in kept if ignores(str(ROOT / path))] == []
    left = [str(ROOT / folder / name) for folder in (*folders, "phasegate/model/kernels") for name in LITTER]
    assert [path for path in left if not ignores(path)] == []


@pytest.mark.parametrize("name", ["dvc.lock", "dvc.yaml", "params.yaml"])
def test_the_marks_of_a_merge_conflict_are_recognised_and_the_file_stays(name: str, tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study")
    for kept in ("dvc.lock", "Makefile"):
        shutil.copy(ROOT / kept, study.folder)
    head, *rest = (study.folder / name).read_text().splitlines(keepends=True)
    conflict = "".join(["<<<<<<< HEAD\n=======\n", head, ">>>>>>> other\n", *rest])
    for text in (conflict, conflict.replace("<<<<<<< HEAD\n", "").replace(">>>>>>> other\n", "")):
        (study.folder / name).write_text(text)
        for program, target in {"repair": "repro", "plan": "plan"}.items():
            said = study.command("make", "--silent", "--old-file=.venv/.ready", target, ok=False)
            assert said.count("\n") == 2, said  # the second is make's own
            assert said.startswith(f"{program}: {name} has the marks of a merge conflict: keep one side, as `git ")
        assert (study.folder / name).read_text() == text
    assert not [*(study.folder / ".dvc/tmp").glob("*.damaged")]


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cpu"])
def test_a_gpu_that_cannot_compute_is_none_and_that_is_said(
    wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def empty(*size: int, **where: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    monkeypatch.setenv("PHASEGATE_DEVICE", wanted)
    monkeypatch.setenv("PHASEGATE_WORKERS", "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", empty)
    why = "The NVIDIA driver on your system is too old (found version 11040)."
    if wanted == "cuda":
        with pytest.raises(UserError) as refusal:
            device.device()
        assert str(refusal.value) == f"PHASEGATE_DEVICE is cuda, but the GPU here can't be used: {why}"
    else:
        assert device.device().type == "cpu" and device.device().type == "cpu" and device.workers() == 5
        said = f"the GPU here can't be used, so trials run on the CPU: {why}\n"
        assert capsys.readouterr().err == (said if wanted == "auto" else "")
        assert os.environ["PHASEGATE_DEVICE"] == "cpu"


@pytest.mark.parametrize(("free", "most"), [(0, 1), (3 << 30, 3), (1 << 40, 8)])
def test_trials_on_a_gpu_are_as_many_as_its_memory_holds(free: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHASEGATE_DEVICE", "auto")
    monkeypatch.setenv("PHASEGATE_WORKERS", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 41))
    monkeypatch.setattr(device, "find_failure", lambda name: "")
    assert device.device().type == "cuda" and device.workers() == most
