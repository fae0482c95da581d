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

from phasegate.params import load_params
from phasegate.study import ARMS
from tests.small_study import ROOT, Checkout, closure

STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_modules_that_its_script_imports(stage: str) -> None:
    script = re.match(r"exec python -m stages\.(\w+)", STAGES[stage]["cmd"])
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


def test_a_second_run_runs_nothing(checkout: Checkout) -> None:
    assert checkout.command("python", "-m", "phasegate.plan").startswith("Nothing would run: ")
    assert checkout.repro() == set()


def test_every_phase_and_arm_gets_a_verdict(checkout: Checkout) -> None:
    decisions = checkout.table("decisions")
    verdicts = dict(zip(zip(decisions["phase"], decisions["arm"], strict=True), decisions["verdict"], strict=True))
    assert verdicts["p7a", "baseline"] == "BASELINE"
    assert verdicts["p7a", "continue"] == "CONTROL"
    arms = {("p7a", "baseline"), ("p7a", "continue"), *((phase, arm) for phase in ARMS for arm in ARMS[phase])}
    assert set(verdicts) == arms | {("own", "loudest")}
    assert set(verdicts.values()) <= {"BASELINE", "CONTROL", "GO", "NO-GO", "INCONCLUSIVE"}
    assert decisions.groupby("phase")["primary"].sum().drop("p7a").eq(1).all()
    assert (checkout.table("trials").groupby(["phase", "arm"]).size() == 2).all()
    assert not checkout.table("surgeries").empty
    scored = checkout.table("signals").groupby("signal").size()
    assert len(scored) == 11 and (scored == 2).all() and "loudest" in scored


def test_the_headline_is_a_row_of_the_decisions(checkout: Checkout) -> None:
    metrics = json.loads((checkout.folder / "metrics.json").read_text())
    row = checkout.table("decisions").query("phase == @metrics['phase'] and primary").iloc[0]
    assert metrics["phase"] == "p7b2"
    assert metrics["accuracy"] == pytest.approx(row["accuracy"])


def test_changing_a_phase_reruns_that_phase_and_what_depends_on_it(checkout: Checkout) -> None:
    before = checkout.table("decisions").set_index(["phase", "arm"])["accuracy"]
    checkout.change({"p7b2": {"entropy_weight": 5.0}})
    planned = checkout.command("python", "-m", "phasegate.plan")
    assert "p7b2.entropy_weight 0.1 → 5.0" in planned and "1: what their trials last took on this machine" in planned
    ran = checkout.repro()
    assert set(re.findall(r"^  ([\w@]+)  ", planned, re.MULTILINE)) == ran
    assert ran == {"check", "p7b2", "evaluate@p7b2", "decide", "report", "headline"}
    after = checkout.table("decisions").set_index(["phase", "arm"])["accuracy"]
    changed = before.index[before != after]
    assert list(changed) == [("p7b2", "entropy_loss")]


def test_a_signal_of_ones_own_is_one_file_and_needs_not_be_there(checkout: Checkout) -> None:
    (checkout.folder / "plugins/quietest.py").write_text(
        (checkout.folder / "plugins/loudest.py").read_text().replace("loudness)", "-loudness)")
    )
    checkout.change({"own": {"arms": {name: {"signal": name} for name in ("quietest", "loudest")}}})
    later = {"signals", "decide", "report", "headline"}
    assert checkout.repro() == {"check", "own", "evaluate@own"} | later
    rows = checkout.table("decisions").query("phase == 'own'")
    assert rows["arm"].tolist() == ["quietest", "loudest"] and rows["primary"].tolist() == [True, False]
    checkout.change({"own": {"arms": {}}})
    assert checkout.repro() == {"check", "own", "evaluate@own"} | later
    assert "own" not in set(checkout.table("decisions")["phase"])
    assert len(checkout.table("signals").groupby("signal")) == 10


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
