"""The project works on a Mac, in another shell, with a log file for a terminal, and on a code host's runner."""

import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import yaml

from tests.small_study import PATH, ROOT, ended

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
HOOKED = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
HOOKS = [hook for repo in HOOKED for hook in repo["hooks"]]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PATH": PATH, "PHASEGATE_PROGRESS": "1"}
LINUX_ONLY = re.compile(r"/proc/|/sys/|prctl|sched_getaffinity|PR_SET_PDEATHSIG|epoll|inotify|os\.fork\b")
GUARDED = {
    "phasegate/base/processor.py": "if LISTED.exists() else",
    "phasegate/base/memory.py": "except (OSError, ValueError):",
    "tests/damage.py": '"/proc/self/mem")',  # elsewhere it leads nowhere, which is damage too
    "tests/test_portable.py": "LINUX_ONLY",
}
"""Files that name what only Linux has, and what makes that harmless elsewhere."""


def test_what_only_linux_has_is_guarded() -> None:
    found = {name for name in TRACKED if name.endswith(".py") and LINUX_ONLY.search((ROOT / name).read_text())}
    assert found <= GUARDED.keys()
    assert all(guard in (ROOT / name).read_text() for name, guard in GUARDED.items())


def test_no_two_files_differ_in_case_alone() -> None:
    assert len({name.lower() for name in TRACKED}) == len(TRACKED)


def test_the_makefile_needs_nothing_that_make_3_81_or_bsd_tools_lack() -> None:
    assert re.search(r"^SHELL := (?!/bin/sh$)", MAKEFILE, re.MULTILINE)  # else 3.81 ignores the PATH exported here
    assert not re.search(r"^\.ONESHELL|\$\(file |!=|&:", MAKEFILE, re.MULTILINE)
    lacking = r"sed -[iEr]|grep -P|readlink -f|xargs -r|date -d|--exclude=|cp -a|stat -c|mktemp|tar -x(?! -f -)"
    assert re.findall(rf"^\t.*(?:{lacking}).*", MAKEFILE, re.MULTILINE) == []


def test_an_environment_behind_a_link_is_not_emptied(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "precious").touch()
    (tmp_path / ".venv").symlink_to(".")
    done = ended("make", "lint", cwd=tmp_path)
    assert done.returncode and ".venv is a link" in done.stderr
    assert (tmp_path / "precious").exists()


def test_make_clean_keeps_data_models_and_reports_and_a_study_needs_data(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept, gone = ("data", "models", "reports", ".dvc/cache"), (".venv", ".phasegate", "phasegate/__pycache__")
    for name in (*kept, *gone):
        (tmp_path / name).mkdir(parents=True)
    done = ended("make", "--old-file=.venv/.ready", "study", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("study: DATA is empty: name a data set, as in make study")
    assert ended("make", "clean", cwd=tmp_path).returncode == 0
    assert [name for name in (*kept, *gone) if (tmp_path / name).exists()] == [*kept]


def test_the_workflow_runs_commands_that_exist_with_few_rights() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    triggers = workflow[True]  # YAML 1.1 takes the key `on` for a truth value
    assert set(triggers) == {"push", "pull_request"} and triggers["push"] == {"branches": ["main"]}
    jobs = workflow["jobs"]
    assert workflow["permissions"] == {"contents": "read"} and all("timeout-minutes" in job for job in jobs.values())
    assert jobs["verdicts"]["permissions"] == {"contents": "read", "pull-requests": "write"}
    steps = [step for job in jobs.values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    made = {command.split()[1] for command in commands if command.startswith("make ")}
    assert made == {"test", "verdicts"} and made <= TARGETS
    assert all(command.split()[0] in ("make", "cat", "gh") for command in commands)
    caches = [step["with"] for step in steps if step.get("uses", "").startswith("actions/setup-python@")]
    assert caches and all((ROOT / cache["cache-dependency-path"]).exists() for cache in caches)


def test_the_hooks_need_no_network_and_run_what_exists() -> None:
    assert [repo["repo"] for repo in HOOKED] == ["local"]
    assert {hook["language"] for hook in HOOKS} <= {"system", "pygrep"}
    made = [hook["entry"].split()[1] for hook in HOOKS if hook["entry"].startswith("make ")]
    assert made == ["lint"] and set(made) <= TARGETS


def test_the_hook_for_parameters_says_what_is_wrong(tmp_path: Path) -> None:
    [hook] = [hook for hook in HOOKS if hook["id"] == "parameters"]
    watched = ["params.yaml", "plugins/loudest.py", "phasegate/params/phases.py"]
    assert all(re.search(hook["files"], name) for name in watched)
    shutil.copytree(ROOT / "plugins", tmp_path / "plugins")
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    wrong = r"check: plugins\.arms\.mine\.signal is 'lowdest', but .*: did you mean loudest\?\n"
    for name, code, sentence in (("lowdest", 2, wrong), ("loudest", 0, "")):
        values["plugins"]["arms"] = {"mine": {"signal": name}}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
        done = ended(*hook["entry"].split(), cwd=tmp_path, env=ENVIRONMENT)
        assert (done.returncode, done.stdout) == (code, "") and re.fullmatch(sentence, done.stderr)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml", "plugins"]


BAR = "from phasegate.trials.run import _with_progress as show; list(show(iter(range(3)), 3, 'label'))"


def test_a_terminal_gets_a_bar_without_colours() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    words, written = [sys.executable, "-c", BAR], b""
    with subprocess.Popen(words, stdout=theirs, stderr=theirs, stdin=theirs, env=ENVIRONMENT) as process:
        os.close(theirs)
        with suppress(OSError):  # how Linux says that the other side is closed
            while more := os.read(ours, 1 << 16):
                written += more
    os.close(ours)
    assert process.returncode == 0 and b"3/3" in written and b"\r" in written
    assert not re.search(rb"\x1b\[[0-9;]*m", written)


def test_what_is_no_terminal_gets_whole_lines() -> None:
    done = subprocess.run([sys.executable, "-c", BAR], env=ENVIRONMENT, capture_output=True, check=True)
    assert done.stdout == b"" and done.stderr == b"label: 3 of 3 trials, about 0 s left\n"
