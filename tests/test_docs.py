"""What README and docs say can be followed: links lead somewhere, commands exist, examples run."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.cli import parse_args
from dvc.utils.hydra import apply_overrides

from phasegate.check import check
from phasegate.data import load_meta
from phasegate.own import arms
from phasegate.params import Params, load_params
from phasegate.phase import run_arm
from phasegate.phase_params import Schedule
from phasegate.table_files import read_table
from stages import prepare
from tests.documents import PAGES, blocks, commands
from tests.small_study import ROOT

PROGRAMS = {"make", "dvc", "git", "python", "pip", "source", "export", "ray"}


COMMANDS = {" ".join(words): (page.name, words) for page in PAGES for words in commands(page)}


def ids(value: Any) -> str:
    return value if isinstance(value, str) else ""


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
    named = re.findall(r"`((?:phasegate|stages|tests|docs|plugins|reports)/[\w/.]+\.\w+)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists() and "plugins/" not in path] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_there_is(command: str) -> None:
    _, words = COMMANDS[command]
    match words:
        case ["make", *targets]:
            targets = [word for word in targets if "=" not in word]
            makefile = (ROOT / "Makefile").read_text()
            assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
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
    if not sign:
        return [change]
    return [f"{key}={value}" for value in (values.split(",") if "{" not in values else [values])]


def changed(changes: Sequence[str]) -> Params:
    """The parameters with changes as on DVC's command line; arms of one's own are those of docs/extending.md."""
    values = load_params(ROOT / "params.yaml").model_dump()
    values["own"]["arms"] = {"busiest": {"signal": "busiest", "grow_above": 1.5}}
    for change in changes:
        adds, removes = change.startswith("+"), change.startswith("~")
        key, _, value = change.lstrip("+~").partition("=")
        place, (*path, leaf) = values, key.split(".")
        for part in path:
            place = place.setdefault(part, {}) if adds else place[part]
        assert adds or leaf in place
        if removes:
            del place[leaf]
        else:
            place[leaf] = yaml.safe_load(value)
    return Params.model_validate(values)


def test_the_examples_of_own_signals_and_surgeries_run_as_written(
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
        own = written["own"] | yaml.safe_load(block)["own"]
        for plugin in own["arms"].values():
            plugin |= {"grow_above": 0.5, "prune_below": -0.5}  # the tiny model has five experts
        params = Params.model_validate(written | {"own": own})
        check(params)
        [arm] = arms(params)
        assert arm.treatment is not None
        files = arm.treatment.files(seed=0)
        folder = tmp_path / f"arm-{len(files)}"
        run_arm(folder, prepared=prepared, start=baselines / "seed-0", phase="own", arm=arm, seed=0, schedule=schedule)
        grown = "small_clone" if len(files) == 2 else "split"
        assert {grown, "remove"} >= set(read_table(folder / "surgeries.csv")["operation"]) != set()


def test_the_example_of_ones_own_data_is_prepared_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs/data.md"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    [example] = blocks(page, "python")
    exec(example, {})
    [command] = [words for words in commands(page) if "data.name=npz" in words]
    apply_overrides(tmp_path / "params.yaml", [word for word in command[3:] if word != "-S"])
    prepare.main(load_params())
    meta = load_meta(tmp_path / "data/prepared")
    assert meta.splits == {"train": 1600, "signal": 200, "gate": 200, "test": 500}
    assert meta.input_shape == (20, 1) and meta.tasks == {"first": (1, 0, 0)}


def test_the_picture_of_the_pipeline_says_what_dvc_dag_says() -> None:
    def reached(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
        more = {(a, d) for a, b in edges for c, d in edges if b == c} - edges
        return reached(edges | more) if more else edges

    drawn = set(re.findall(r"(\w+) --> (\w+)", (ROOT / "README.md").read_text()))
    said = subprocess.run(["dvc", "dag", "--mermaid"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {node: name.split("@")[0] for node, name in re.findall(r'(\w+)\["([^"]+)"\]', said)}
    assert reached(drawn) == reached({(names[a], names[b]) for a, b in re.findall(r"(\w+)-->(\w+)", said)})


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    output = subprocess.run(
        ["make", "--silent", "help"], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    ).stdout
    [phony] = re.findall(r"^\.PHONY: (.*)", makefile, re.MULTILINE)
    assert [line.split()[0] for line in output.splitlines()] == phony.split()
