"""The pipeline as a whole: its dependencies are true, it runs, and it reruns just what a change concerns."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from phasegate.params import ARMS, load_params
from tests import chaos
from tests.small_study import ROOT, Checkout, closure, content

STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_modules_that_its_script_imports(stage: str) -> None:
    script = re.match(r"python -m stages\.(\w+)", STAGES[stage]["cmd"])
    assert script
    listed = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert listed == closure(ROOT / f"stages/{script[1]}.py")


def test_only_evaluation_depends_on_the_test_split() -> None:
    readers = {name for name, stage in STAGES.items() if "data/prepared/test.safetensors" in stage["deps"]}
    assert readers == {"evaluate"}


def test_tables_and_figures_are_made_without_torch() -> None:
    code = "import sys, stages.decide, stages.report, stages.headline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, below in value.items() for leaf in leaves(below, f"{path}.{key}" if path else key)]
    return [(path, value)]


def test_every_leaf_of_the_parameters_can_be_set_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    before = load_params(path)
    for key, value in leaves(yaml.safe_load(path.read_text())):
        apply_overrides(path, [f"{key}={json.dumps(value)}"])
    assert load_params(path) == before


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The small profile, run once from nothing."""
    checkout = Checkout(tmp_path_factory.mktemp("checkout"))
    ran = checkout.repro()
    assert {stage.split("@")[0] for stage in ran} == set(STAGES)
    return checkout


def test_a_second_run_runs_nothing(checkout: Checkout) -> None:
    assert checkout.repro() == set()


def test_every_phase_and_arm_gets_a_verdict(checkout: Checkout) -> None:
    decisions = checkout.table("decisions")
    verdicts = dict(zip(zip(decisions["phase"], decisions["arm"], strict=True), decisions["verdict"], strict=True))
    assert verdicts["p7a", "baseline"] == "BASELINE"
    assert verdicts["p7a", "continue"] == "CONTROL"
    arms = {("p7a", "baseline"), ("p7a", "continue"), *((phase, arm) for phase in ARMS for arm in ARMS[phase])}
    assert set(verdicts) == arms
    assert set(verdicts.values()) <= {"BASELINE", "CONTROL", "GO", "NO-GO", "INCONCLUSIVE"}
    assert decisions.groupby("phase")["primary"].sum().drop("p7a").eq(1).all()
    assert (checkout.table("trials").groupby(["phase", "arm"]).size() == 2).all()
    assert not checkout.table("surgeries").empty
    scored = checkout.table("signals").groupby("signal").size()
    assert len(scored) == 10 and (scored == 2).all()


def test_the_headline_is_a_row_of_the_decisions(checkout: Checkout) -> None:
    metrics = json.loads((checkout.folder / "metrics.json").read_text())
    row = checkout.table("decisions").query("phase == @metrics['phase'] and primary").iloc[0]
    assert metrics["phase"] == "p7b2"
    assert metrics["accuracy"] == pytest.approx(row["accuracy"])


def test_changing_a_phase_reruns_that_phase_and_what_depends_on_it(checkout: Checkout) -> None:
    before = checkout.table("decisions").set_index(["phase", "arm"])["accuracy"]
    checkout.change({"p7b2": {"entropy_weight": 5.0}})
    assert checkout.repro() == {"check", "p7b2", "evaluate@p7b2", "decide", "report", "headline"}
    after = checkout.table("decisions").set_index(["phase", "arm"])["accuracy"]
    changed = before.index[before != after]
    assert list(changed) == [("p7b2", "entropy_loss")]


def test_a_wrong_parameter_stops_before_any_result_is_touched(checkout: Checkout) -> None:
    results = {path: path.stat().st_mtime_ns for path in (checkout.folder / "reports").iterdir()}
    for override, sentence in {
        "p7b1.head_lr=-1": "check: p7b1.head_lr is -1: input should be greater than 0",
        "q2.candidates.top_1.top_k=99": "check: q2.candidates.top_1: top_k is 99: it must be at most n_routed = 12",
        "+p7b2.labels.growbelow=1": "check: p7b2.labels.growbelow is not a parameter; did you mean grow_below?",
    }.items():
        output = checkout.command("dvc", "exp", "run", "-S", override, ok=False)
        assert sentence in output
        assert "Traceback" not in output
        assert re.findall(r"Running stage '([^']+)'", output) == ["check"]
        checkout.command("git", "checkout", "-q", "params.yaml")
    output = checkout.command("dvc", "exp", "run", "-S", "p7b2.labels.growbelow=1", ok=False)
    assert "growbelow" in output
    assert "Running stage" not in output  # without the plus, DVC itself refuses a new key
    assert {path: path.stat().st_mtime_ns for path in (checkout.folder / "reports").iterdir()} == results


def test_the_dvc_commands_work(checkout: Checkout) -> None:
    assert "p7b2" in checkout.command("dvc", "dag")
    assert "metrics.json" in checkout.command("dvc", "metrics", "diff", "--all")
    assert "accuracy" in checkout.command("dvc", "exp", "show", "--csv")
    checkout.command("dvc", "plots", "show")
    assert (checkout.folder / "dvc_plots/index.html").exists()


def test_dvc_compares_phases_saved_as_experiments(checkout: Checkout) -> None:
    def save(*arms: str, ok: bool = True) -> str:
        return checkout.command("python", "-m", "phasegate.experiments", *arms, ok=ok)

    def references() -> list[str]:
        return checkout.command("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()

    checkout.repro()  # whatever a test above has left
    checkout.command("git", "add", "params.yaml", "dvc.lock", "metrics.json", "reports")
    checkout.command("git", "commit", "-qm", "results")
    rows = {(row["phase"], row["arm"]): row for row in checkout.table("decisions").to_dict("records")}
    old, new = rows["p7a", "baseline"], rows["p7b2", "clone"]
    assert save("p7a", "p7b2/clone").splitlines() == [
        f"phase-7a: baseline, BASELINE, {old['accuracy']:.2f} %",
        f"phase-7b2-clone: clone, {new['verdict']}, {new['accuracy']:.2f} %",
    ]
    for reference in (name for name in references() if "/phase-" in name):  # nothing else was made anew
        changed = checkout.command("git", "diff", "--name-only", "HEAD", reference).split()
        assert changed == ["dvc.lock", "metrics.json", "params.yaml"]

    pair = ("phase-7a", "phase-7b2-clone")
    metrics = json.loads(checkout.command("dvc", "metrics", "diff", "--json", *pair))["metrics.json"]
    assert metrics["accuracy"]["old"] == pytest.approx(old["accuracy"])
    assert metrics["accuracy"]["new"] == pytest.approx(new["accuracy"])
    params = json.loads(checkout.command("dvc", "params", "diff", "--json", *pair))["params.yaml"]
    assert params["headline.phase"] == {"old": "p7a", "new": "p7b2"}
    table = checkout.command("dvc", "exp", "show", "--md", "--only-changed")
    assert all(
        any(name in line and verdict in line for line in table.splitlines())
        for name, verdict in zip(pair, (old["verdict"], new["verdict"]), strict=True)
    )
    checkout.command("dvc", "plots", "diff", *pair)
    assert all(name in (checkout.folder / "dvc_plots/index.html").read_text() for name in pair)

    own = next(name for name in references() if name.endswith("/phase-7a")).replace("phase-7a", "own")
    checkout.command("git", "update-ref", own, "HEAD")
    checkout.change({"p7b2": {"entropy_weight": 9.0}})
    assert "params.yaml changed since the last commit" in save("p7a", ok=False)
    checkout.command("git", "commit", "-qam", "other parameters, the same results")
    assert "would start at stage p7b2" in save("p7a", ok=False)
    checkout.command("git", "revert", "--no-edit", "HEAD")
    assert "arm is 'clones', no arm of p7b2: did you mean clone?" in save("p7b2/clones", ok=False)
    save("p7a")
    assert own in references()
    assert json.loads(checkout.command("dvc", "metrics", "diff", "--json", *pair))["metrics.json"] == metrics


@pytest.mark.chaos
def test_a_study_killed_at_random_moments_ends_with_the_same_bits(checkout: Checkout, tmp_path: Path) -> None:
    checkout.repro()  # whatever a test above has left
    study = Checkout(tmp_path / "study", PHASEGATE_WORKERS="2", PHASEGATE_SNAPSHOT="0")
    shutil.copy(checkout.folder / "params.yaml", study.folder)
    done = chaos.chaos(study, chaos.results(checkout.folder), kills=25, seed=0)
    assert done["worker"] + done["stage"] + done["dvc"] == 25


def test_permuting_the_test_labels_changes_nothing_but_the_evaluation(checkout: Checkout) -> None:
    folder = checkout.folder
    checkout.repro()  # whatever a test above has left
    models, signals = content(folder / "models"), content(folder / "reports")["signals.csv"]
    accuracy = checkout.table("trials")["accuracy"]
    path = folder / "phasegate/prepare.py"
    honest, permuted = '"test": raw.test', '"test": Split(raw.test.x, np.random.default_rng(0).permutation(raw.test.y))'
    assert honest in path.read_text()
    path.write_text(path.read_text().replace(honest, permuted))
    shutil.rmtree(folder / ".phasegate")  # no kept trial is taken for a new one: everything is trained again
    assert {"prepare", "pretrain", "survey", "control_heads", "p7b4", "signals", "decide"} <= checkout.repro()
    assert content(folder / "models") == models
    assert content(folder / "reports")["signals.csv"] == signals
    after = checkout.table("trials")["accuracy"]
    assert (after < accuracy).mean() > 0.9 and abs(after.mean() - 10) < 3  # ten classes: chance
