"""What README and docs say can be followed: links lead somewhere, commands exist, examples run."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import yaml
from dvc.cli import parse_args
from dvc.utils.hydra import apply_overrides

from phasegate.base.errors import UserError
from phasegate.base.paths import TIMINGS
from phasegate.params import Params, load_params
from phasegate.params.check import check
from phasegate.params.phases import Schedule
from phasegate.records.prepared import load_meta
from phasegate.records.tables import read_table
from phasegate.signals.plugin_arms import plugin_arms
from phasegate.surgery.continuation import run_arm
from phasegate.tools.documents import flowchart
from stages import prepare
from tests.small_study import ROOT, ended

MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = {"make", "dvc", "git", "python", "pip", "source", "export", "ray"}


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page, what sets variables before it left out."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[sum("=" in word for word in words[:1]) :] for words in found if words]


COMMANDS = {" ".join(words): words for page in PAGES for words in commands(page)}


def sections(page: Path) -> list[str]:
    """What links call the sections of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_figure_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    for link, section in links:
        target = page.parent / link if link else page
        assert target.exists() and (not section or section in sections(target)), (link, section)
    named = re.findall(r"`((?:phasegate|stages|tests|bench|docs|plugins|reports)/[\w/.]+\.\w+)`", page.read_text())
    made = ("plugins/", str(TIMINGS))  # by people, and by runs
    assert [path for path in named if not (ROOT / path).exists() and not path.startswith(made)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_there_is(command: str) -> None:
    match COMMANDS[command]:
        case ["make", *words]:
            targets = [word for word in words if "=" not in word]
            assert targets and all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)
            words = [word.replace("$PWD", "/here") for word in words]
            dry = ended("make", "--dry-run", "--old-file=.venv/.ready", *words, cwd=ROOT)
            given = [word.partition("=")[2] for word in words if "=" in word]
            assert dry.returncode == 0 and all(value in dry.stdout for value in given), dry
        case ["dvc", *rest]:
            parsed = parse_args(rest)
            for changes in product(*map(sweep, getattr(parsed, "set_param", None) or [])):
                changed(changes)
        case ["python", "-m", module, *_]:
            assert (ROOT / f"{module.replace('.', '/')}.py").exists() or (ROOT / module / "__main__.py").exists()
        case [program, *_]:
            assert program in PROGRAMS


def sweep(change: str) -> list[str]:
    """`a=1,2` as `a=1` and `a=2`, as DVC takes it."""
    key, sign, values = change.partition("=")
    return [f"{key}={value}" for value in values.split(",")] if sign and "{" not in values else [change]


def changed(changes: Sequence[str]) -> Params:
    """The parameters with changes as on DVC's command line, and with the plugin arm of docs/extending.md."""
    values = load_params(ROOT / "params.yaml").model_dump()
    values["plugins"]["arms"] = {"busiest": {"signal": "busiest", "grow_above": 1.5}}
    for change in changes:
        key, _, value = change.lstrip("+~").partition("=")
        place, (*path, leaf) = values, key.split(".")
        for part in path:
            place = place.setdefault(part, {}) if change[0] == "+" else place[part]
        assert change[0] == "+" or leaf in place
        place[leaf] = yaml.safe_load(value)
        if change[0] == "~":
            del place[leaf]
    return Params.model_validate(values)


def test_the_examples_of_signals_and_surgeries_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path, baselines: Path, schedule: Schedule
) -> None:
    page = ROOT / "docs/extending.md"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins").mkdir()
    names = re.findall(r"^`(plugins/\w+\.py)`:", page.read_text(), re.MULTILINE)
    for name, text in zip(names, blocks(page, "python"), strict=True):
        (tmp_path / name).write_text(text)
    written = load_params(ROOT / "params.yaml").model_dump()
    for block in blocks(page, "yaml"):
        plugins = written["plugins"] | yaml.safe_load(block)["plugins"]
        for plugin in plugins["arms"].values():
            plugin |= {"grow_above": 0.5, "prune_below": -0.5}  # the tiny model has five experts
        params = Params.model_validate(written | {"plugins": plugins})
        check(params)
        for name, arm in (plugin_arms(params, "p7b") | plugin_arms(params, "p7c3")).items():
            assert arm.treatment is not None
            files = arm.treatment.files(seed=0)
            folder, trial = tmp_path / f"{name}-{len(files)}", {"prepared": prepared, "start": baselines / "seed-0"}
            run_arm(folder, **trial, phase="plugins", name=name, arm=replace(arm, dead=1), seed=0, schedule=schedule)
            grown = {None: "remove", "split": "split"}.get(arm.treatment.grow, "small_clone")  # type: ignore[arg-type]
            assert {grown, "remove"} >= set(read_table(folder / "surgeries.csv")["operation"]) != set()
        for arm in plugin_arms(params, "p7c2", {"birth": 2.0}).values():
            assert (way := arm.treatment) == replace(way, grow="birth", prune=None, count=20, expert_rate=2.0)  # type: ignore[type-var]


def test_the_example_of_your_own_data_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, seen = ROOT / "docs/data.md", list[tuple[object, ...]]()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    [example] = blocks(page, "python")
    exec(example, {})
    for command in [words for words in commands(page) if "data.name=npz" in words]:  # the study, then in small
        shutil.copy(ROOT / "params.yaml", tmp_path)
        apply_overrides(tmp_path / "params.yaml", [word for word in command[3:] if word != "-S"])
        prepare.main(load_params())
    assert load_params().seeds.count == 3
    meta = load_meta(tmp_path / "data/prepared")
    assert meta.splits == {"train": 2000, "signal": 200, "gate": 200, "test": 500, "published": 0}
    assert meta.input_shape == (1, 8, 8) and meta.tasks == {"first": (1, 0, 0)}
    assert meta.class_names == ("ash", "beech", "oak") and "1 channel of 8 x 8" in capsys.readouterr().out
    monkeypatch.setattr(prepare, "refuse_too_large", lambda _, *known: seen.append(known))
    apply_overrides(tmp_path / "params.yaml", ["p7c2.classes=3"])
    said = r"^p7c2.classes is 3, and npz has 3: it must be lower, since the other classes"
    with pytest.raises(UserError, match=said):
        prepare.main(load_params())
    assert seen == [((1, 8, 8), 3, 2000)]


def test_the_readme_names_the_margin_and_the_confidence_of_the_parameters() -> None:
    decisions, words = load_params(ROOT / "params.yaml").decisions, (ROOT / "README.md").read_text().split()
    assert f"{100 * decisions.margin:g} % of the error" in " ".join(words)
    assert f"with {100 * decisions.confidence:g} % intervals" in " ".join(words)


def test_the_picture_of_the_pipeline_leaves_out_what_a_longer_way_says() -> None:
    nodes = {"node1": "data", "node2": "train", "node3": "evaluate@train", "node4": "evaluate@data", "node5": "decide"}
    arrows = ["node1-->node2", "node1-->node3", "node1-->node4", "node2-->node3", "node3-->node5", "node4-->node5"]
    lines = ["flowchart TD", *(f'\t{node}["{name}"]' for node, name in nodes.items()), *(f"\t{a}" for a in arrows)]
    shown = ["flowchart LR", "    data --> train", "    evaluate --> decide", "    train --> evaluate"]
    assert flowchart("\n".join(lines)).splitlines() == shown


def test_make_help_lists_every_target() -> None:
    output = subprocess.check_output(["make", "--silent", "help"], cwd=ROOT, text=True)
    [phony] = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)
    assert [line.split()[0] for line in output.splitlines()] == phony.split()
