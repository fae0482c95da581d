"""What people do with a finished study: compare phases, follow the recipes, kill it, permute its test labels."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from dvc.repo import Repo

from phasegate.base.errors import UserError
from phasegate.base.paths import TABLES
from phasegate.data_sets.prepare import load_source
from phasegate.data_sets.raw import Raw
from phasegate.params import load_params
from phasegate.params.names import START
from phasegate.params.phases import Headline
from phasegate.records.prepared import Split
from phasegate.records.tables import read_table
from phasegate.tools import experiments
from phasegate.tools.command import output
from phasegate.tools.plan import changed, refuse_stale
from stages import headline
from tests import chaos
from tests.one_process import run_all
from tests.small_study import ASCII, ROOT, Checkout, content
from tests.test_docs import commands

TRAINING = (["dvc", "queue", "start"], ["dvc", "exp", "run"])


@pytest.fixture(scope="module")
def checkout(small_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A copy of the small study, committed as a folder of a larger repository, under an ASCII locale."""
    study = Checkout(tmp_path_factory.mktemp("larger") / "my project's", of=small_study, **ASCII)
    shutil.copy(ROOT / "Makefile", study.folder)
    shutil.move(study.folder / ".git", study.folder.parent)
    (study.folder.parent / "notes.txt").touch()
    study.command("git", "add", "-A", "..")
    study.command("git", "commit", "-qm", "results")
    return study


def make(study: Checkout, *words: str) -> str:
    """What a target of the Makefile prints, in the environment of the tests."""
    return study.command("make", "--silent", "--old-file=.venv/.ready", *words)


def test_a_plan_names_changes_and_not_what_is_only_absent() -> None:
    deps: dict[str, object] = {"models/p7a": "deleted", "phasegate/model": "new", "params.yaml": {"p7b": "modified"}}
    assert changed("changed command") == ["changed command"]
    assert changed({"changed deps": deps}) == ["phasegate/model", "p7b"]
    assert changed({"changed outs": {"models/p7b1": "not in cache"}}) == []


def test_tables_of_other_data_than_there_are_now_are_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"prepare": ["data/prepared/dataset.json", "models/p7a"]}
    monkeypatch.setattr("phasegate.tools.plan.stale", lambda *_: found)
    refuse_stale()
    found["prepare"].append("data/raw/mine.npz")
    with pytest.raises(UserError, match=r"\(data/raw/mine.npz, which prepare uses, changed\): run `dvc repro`"):
        refuse_stale()


def test_a_command_that_fails_or_is_missing_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^git status failed: not a git repository"):
        output("git", "status", folder=tmp_path)
    with pytest.raises(UserError, match=r"^there is no command dvcc: activate \.venv, or use make"):
        output("dvcc", "status")


def test_a_plan_without_stages_to_read_is_refused(tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study")
    plan = partial(study.command, sys.executable, "-m", "phasegate.tools.plan", ok=False)
    (study.folder / "dvc.yaml").write_text("stages: [\n")
    assert plan() == "plan: dvc status failed: './dvc.yaml' is invalid.\n"
    (study.folder / "dvc.yaml").unlink()
    assert plan() == f"plan: there is no dvc.yaml in {study.folder}: run this where the study is\n"


@pytest.mark.parametrize(
    "words",
    [
        "clone --quiet --depth=1 {url}",
        "clone --quiet --config=core.autocrlf=true {url}",
        "worktree add --quiet --detach",
        "-C {outer} -c protocol.file.allow=always submodule --quiet add {url}",
    ],
)
def test_every_kind_of_checkout_has_the_bytes_that_were_hashed(words: str, tmp_path: Path) -> None:
    study, folder = Checkout(tmp_path / "study"), tmp_path / "my copy's"
    shutil.copy(ROOT / ".gitattributes", study.folder)
    study.command("dvc", "repro", "check")
    study.command("git", "add", "-A")
    study.command("git", "commit", "-qm", "one stage")
    study.command("git", "init", "-q", str(tmp_path))
    study.command("git", *words.format(url=f"file://{study.folder}", outer=tmp_path).split(), str(folder))
    study.folder = folder
    said = study.command(sys.executable, "-m", "phasegate.tools.plan")
    assert "  prepare (" in said and "  check (" not in said


def test_make_study_refuses_where_experiments_in_a_copy_fail(tmp_path: Path) -> None:
    for folder, shallow in (("größer", False), ("study", True)):
        study = Checkout(tmp_path / folder)
        shutil.copy(ROOT / "Makefile", study.folder)
        if shallow:
            (study.folder / ".git/shallow").write_text(study.command("git", "rev-parse", "HEAD"))
        said = study.command("make", "--old-file=.venv/.ready", "study", "DATA=fashion_mnist", ok=False)
        assert "a whole clone (git fetch --unshallow) in a folder with an ASCII path" in said.splitlines()[0]


def test_dvc_compares_phases_saved_as_experiments(checkout: Checkout, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "größer", of=checkout.folder.parent)
    checkout.folder /= "my project's"
    (checkout.folder.parent / ".git/shallow").write_text(checkout.command("git", "rev-parse", "HEAD"))
    checkout.command("git", "init", "-q", "--separate-git-dir", str(tmp_path / "modules"), "..")  # as of a submodule,
    checkout.command("git", "config", "core.worktree", str(checkout.folder.parent))  # which has this setting, too
    for setting in ("protocol.allow=never", "transfer.hideRefs=refs/exps", "fetch.fsckObjects=true"):
        checkout.command("git", "config", *setting.split("="))
    save = partial(checkout.command, "python", "-m", "phasegate.tools.experiments")
    plan = partial(checkout.command, "python", "-m", "phasegate.tools.plan")

    def references() -> list[str]:
        return checkout.command("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()

    rows = {(row["phase"], row["arm"]): row for row in checkout.table("decisions").to_dict("records")}
    old, new = rows["p7a", "baseline"], rows["p7b2", "clone"]
    assert save("p7a", "p7b2/clone").splitlines() == [
        f"phase-7a: baseline, BASELINE, {old['accuracy']:.2f} %",
        f"phase-7b2-clone: clone, {new['word']}, {new['accuracy']:.2f} %",
    ]
    for reference in (name for name in references() if "/phase-" in name):  # nothing else was made anew
        files = checkout.command("git", "diff", "--name-only", "--relative", "HEAD", reference).split()
        curve = ["reports/headline_curve.csv"] if "/phase-7a" in reference else files[3:]  # two arms may share theirs
        assert files == ["dvc.lock", "metrics.json", "params.yaml", *curve]

    pair = ("phase-7a", "phase-7b2-clone")
    metrics = json.loads(checkout.command("dvc", "metrics", "diff", "--json", *pair))["metrics.json"]
    assert [metrics["accuracy"][side] for side in ("old", "new")] == pytest.approx([old["accuracy"], new["accuracy"]])
    written = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("dvc exp show"))
    table = checkout.command(*shlex.split(written, comments=True), "--md")
    assert "params.yaml" not in table.splitlines()[0] and "/" not in table.splitlines()[0]
    for name, verdict in zip(pair, (old["verdict"], new["word"]), strict=True):
        assert any(name in line and verdict in line for line in table.splitlines())
    own = next(name for name in references() if name.endswith("/phase-7a")).replace("phase-7a", "own")
    checkout.command("git", "update-ref", own, "HEAD")
    checkout.change({"p7b2": {"entropy_weight": 9.0}})
    assert "my project's/params.yaml changed since the last commit" in save("p7a", ok=False)
    checkout.command("git", "commit", "-qam", "other parameters, the same results")
    there = references()
    assert "other parameters or code (p7b2, which p7b2 uses, changed): run `dvc repro`" in save("p7a", ok=False)
    assert references() == there  # the refusal came first
    assert "has tables of other parameters or code" in plan("--refuse-stale", ok=False)
    assert re.search(r"\n  p7b2 \(about \d+ s\): p7b2\n", plan())
    checkout.command("git", "revert", "--no-edit", "HEAD")
    for left in ("phasegate/surgery/probe.py~", "plugins/Thumbs.db", "models/p7a/.DS_Store", "data/raw/mine.npz"):
        (checkout.folder / left).touch()
    assert plan("--refuse-stale") == ""
    assert plan().startswith("Nothing changed: ")
    assert "arm is 'clones', no arm of p7b2: did you mean clone?" in save("p7b2/clones", ok=False)
    there, head = references(), checkout.command("git", "rev-parse", "HEAD").strip()
    lock = tmp_path / f"modules/refs/exps/{head[:2]}/{head[2:]}/phase-7a.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert "git update-ref failed: " in save("p7a", ok=False) and references() == there
    lock.unlink()
    save("p7a")
    assert own in references() and sum(name.endswith("/phase-7a") for name in references()) == 1
    assert json.loads(checkout.command("dvc", "metrics", "diff", "--json", *pair))["metrics.json"] == metrics


def test_every_phase_may_be_the_headline_and_is_saved_unless_some_are_named(
    small_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(name: str, choice: Headline, place: Path) -> Any:
        headline.main(params.model_copy(update={"headline": choice}))
        return json.loads(Path("metrics.json").read_text())

    shutil.copytree(small_study / TABLES, tmp_path / TABLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiments"])
    for name, pretended in {"save": save, "share": Path, "output": lambda *_: "", "refuse_stale": lambda: None}.items():
        monkeypatch.setattr(experiments, name, pretended)
    params = load_params(small_study / "params.yaml")
    experiments.main(params)
    primary = read_table(TABLES / "decisions.csv").query("primary").to_dict("records")
    for row, line in zip(primary, capsys.readouterr().out.splitlines(), strict=True):
        assert re.fullmatch(rf"phase-{row['phase'].removeprefix('p')}: {row['arm']}, .*{row['accuracy']:.2f} %", line)
    assert {row["phase"] for row in primary} == {START, *params.claims()}


def test_the_recipes_work_one_after_the_other(checkout: Checkout, tmp_path: Path) -> None:
    checkout.command("git", "init", "-q", "--bare", str(tmp_path / "origin"))
    checkout.command("git", "remote", "add", "origin", str(tmp_path / "origin"))
    checkout.command("git", "push", "-q", "origin", "HEAD:refs/exps/aa/bb/phase-7b1")
    checkout.command("dvc", "exp", "run", "-n", "gutsy-seat", "-S", "headline.phase=p7c1", "-s", "headline")
    models, metrics, git = (checkout.folder / name for name in ("models/p7b2", "metrics.json", "../.git"))
    said, trained = dict[str, str](), content(models)
    for words in commands(ROOT / "docs/recipes.md"):
        if words == ["make", "phases"]:  # which would make an environment
            where = ("env", f"GIT_DIR={git}", f"GIT_WORK_TREE={git.parent}")  # as git sets them for an alias
            words = [*where, sys.executable, "-m", "phasegate.tools.experiments", "p7a", "p7b1", "p7b2", "p7b3"]
        elif "--queue" not in words and (words[0] == "make" or words[:3] in TRAINING):
            continue  # it would train for minutes; test_docs.py looks at what it sets
        words = [word.replace("/mnt/shared/phasegate", str(tmp_path / "remote")) for word in words]
        if "HEAD" in words:
            checkout.change({"headline": {"phase": "p7c1"}})
            metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"phase": "p7c1"}))
            (checkout.folder / "reports/decisions.md").write_text("GO\n")
        if words == ["dvc", "pull"]:  # as in another clone
            shutil.rmtree(models)
            shutil.move(checkout.folder / ".dvc/cache/files", tmp_path)
        printed = checkout.command(*words)
        if words[1] == "plots":
            printed = (checkout.folder / "dvc_plots/index.html").read_text()
        said[" ".join(words[1:])] = printed if "apply" not in words else metrics.read_text()
        checkout.command("git", "checkout", "-q", "--", "params.yaml", "dvc.lock", "metrics.json", "reports")
    assert said["diff HEAD -- reports/decisions.md"].endswith("+GO\n")
    assert re.search(r"metrics.json +phase +p7b2 +p7c1", said["metrics diff HEAD"])
    assert re.search(r"params.yaml +headline.phase +p7b2 +p7c1", said["params diff HEAD"])
    assert all(f'"rev": "{name}"' in said["plots diff HEAD"] for name in ("HEAD", "workspace"))
    assert json.loads(said["exp apply longer"])["phase"] == "p7c1"
    kept = checkout.command("git", "show", "longer-training:./metrics.json")
    assert json.loads(kept)["phase"] == "p7c1" and "/longer\n" not in checkout.command("git", "for-each-ref")
    assert re.search(r"metrics.json +phase +p7a +p7b2", said["metrics diff phase-7a phase-7b2"])
    phases = ("phase-7b1", "phase-7b2", "phase-7b3")
    assert all(f'"rev": "{name}"' in said[f"plots diff {' '.join(phases)}"] for name in phases)
    assert "Gate accuracy of the headline arm" in said["plots show"]
    assert said["queue status"].count("Queued") == 3
    assert content(models) == trained and "Pushed" in said["exp push origin phase-7b2"]
    assert (tmp_path / "origin/refs/exps/aa/bb/phase-7b1").is_file()  # an experiment of that name, but not from here


def test_a_study_on_other_data_fills_a_folder_of_its_own(checkout: Checkout) -> None:
    assert make(checkout, "report").endswith(f"the page: {checkout.folder}/reports/report.html\n")
    assert "Ran experiment(s): mnist1d" in make(checkout, "study", "DATA=mnist1d")
    own, whole = checkout.folder / "reports/mnist1d", checkout.folder / "reports"
    found, there = ({path.name for path in folder.iterdir()} for folder in (own, whole))
    assert found == there - {"mnist1d", "timings.csv"} | {"metrics.json", "params.yaml", "dvc.lock"}
    assert content(own / "tables") == content(whole / "tables")
    checkout.command("git", "add", "reports")
    checkout.command("git", "commit", "-qm", "the same on the same data")
    for folder in (own, whole):
        (folder / "decisions.md").write_text("GO − é\n")
    said = make(checkout, "verdicts", "BASE=HEAD")
    assert re.fullmatch(r"```diff\ndiff --git a/reports/decisions.md (.*\n\+GO − é\n){2}```\n", said, re.DOTALL)


@pytest.mark.chaos
def test_a_study_killed_at_random_moments_ends_with_the_same_bits(checkout: Checkout, tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study", PHASEGATE_WORKERS="2", PHASEGATE_SNAPSHOT="0")
    shutil.copy(checkout.folder / "params.yaml", study.folder)
    done = chaos.chaos(study, chaos.results(checkout.folder), kills=25, seed=0)
    assert done.kills.total() == 25 and len(done.places) > 4, done


def test_what_a_killed_dvc_left_half_written_costs_no_training(small_study: Path, tmp_path: Path) -> None:
    study = Checkout(tmp_path / "study", of=small_study)
    lock, aside = study.folder / "dvc.lock", study.folder / ".dvc/tmp"

    repair, whole = partial(study.command, "python", "-m", "phasegate.tools.repair"), lock.read_bytes()
    assert repair() == ""
    for half in (b"", whole[: whole.rindex(b"path: ") + 3]):
        lock.write_bytes(half)
        assert "dvc.lock" in study.command("dvc", "repro", ok=False)
        assert repair().startswith("dvc.lock was cut off")
        assert not lock.exists() and (aside / "dvc.lock.damaged").read_bytes() == half
    for half in (b"", b'{"read": {'):
        (aside / "rwlock").write_bytes(half)
        assert "rwlock" in study.command("dvc", "repro", ok=False)
        assert repair().startswith(".dvc/tmp/rwlock was cut off")
    assert study.repro() == {"decide", "report", "headline"}  # their outputs are not in DVC's cache
    made, before = (yaml.safe_load(text) for text in (lock.read_bytes(), whole))  # in whichever order stages ran
    assert made == before and chaos.results(study.folder) == chaos.results(small_study)
    lock.write_bytes(b"")
    with Repo(study.folder).lock:  # DVC is at work, and may be writing the file
        assert repair() == "" and lock.exists()


def test_permuting_the_test_labels_changes_nothing_but_the_evaluation(
    small_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def permuted(*source: Any) -> Raw:
        raw = load_source(*source)
        return replace(raw, test=Split(raw.test.x, np.random.default_rng(0).permutation(raw.test.y)))

    monkeypatch.setattr("phasegate.data_sets.prepare.load_source", permuted)
    (tmp_path / "plugins").symlink_to(ROOT / "plugins")
    (tmp_path / "data/raw").mkdir(parents=True)
    run_all(load_params(small_study / "params.yaml"), tmp_path, monkeypatch, without="report")
    assert content(tmp_path / "models") == content(small_study / "models")  # nor does it matter which process trains
    honest, other = (content(folder / "reports/tables")["signals.csv"] for folder in (small_study, tmp_path))
    assert honest == other
    before, after = (pd.read_csv(f / "reports/tables/trials.csv")["accuracy"] for f in (small_study, tmp_path))
    assert (after < before).mean() > 0.9 and abs(after.mean() - 10) < 3  # ten classes: chance
