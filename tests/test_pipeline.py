"""The pipeline as a whole: its dependencies are true, it runs, and it reruns just what a change concerns."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from phasegate.params import load_params
from phasegate.params.names import PHASES
from phasegate.trials.code import dependencies, package_of
from tests.small_study import ROOT, Checkout

STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SIGNALS = "survey heads p7b4 signals plugins"  # stages that need them, and p7c2 and p7c3
LATE = "p7c1 p7c2 p7c3"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_its_script_and_the_packages_that_the_script_imports(name: str) -> None:
    stage, script = STAGES[name], f"stages/{name}.py"
    assert re.match(rf"exec python -m stages\.{name}\b", stage["cmd"])
    code = [dep for dep in stage["deps"] if dep.startswith(("stages", "phasegate"))]
    packages = {package_of(path) for path in dependencies([ROOT / script], without=())} - {"", "base", "trials"}
    read = {f"stages/{phase}.py" for phase in PHASES if name == "check"}  # for the names of their arms
    root = {"phasegate/__init__.py"} if name != "check" else set()  # how numpy and torch round
    assert set(code) == {script, *read, *root, *(f"phasegate/{package}" for package in packages)} and len(code) <= 12


@pytest.mark.parametrize(
    ("path", "stages"),
    {
        "data/prepared/test.safetensors": "evaluate",
        "phasegate/base": "",
        "phasegate/trials": "",
        "phasegate/evaluation": "evaluate",
        "phasegate/model": f"references q1 q2 p7a early rates control p7b1 p7b2 p7b3 {SIGNALS} surgery {LATE} in_a_row "
        "evaluate",
        "phasegate/report": "report",
        "phasegate/signals": f"{SIGNALS} p7c2 p7c3",
        "phasegate/data_sets": "prepare",
        "phasegate/verdicts": "check decide report headline",
    }.items(),
)
def test_an_edit_concerns_few_stages(path: str, stages: str) -> None:
    assert [name for name, stage in STAGES.items() if path in stage["deps"]] == stages.split()


def test_the_pipeline_and_its_lock_stay_short_enough_to_read() -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 500
    assert (ROOT / "dvc.lock").stat().st_size <= 90_000
    assert "nfiles: 0\n" not in (ROOT / "dvc.lock").read_text()  # DVC warns of empty folders


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
    apply_overrides(path, [f"{key}={json.dumps(value)}" for key, value in leaves(yaml.safe_load(path.read_text()))])
    assert load_params(path) == before


def test_own_data_make_nothing_stale_where_they_lie_or_once_one_is_back(small_study: Path, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "study", of=small_study)
    lock, params = (checkout.folder / name for name in ("dvc.lock", "params.yaml"))
    before, written, x, y = lock.read_text(), params.read_text(), np.zeros((80, 1, 8)), np.arange(80) % 10
    np.savez(checkout.folder / "data/raw/mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert checkout.repro() == set()
    checkout.change(
        {"data": {"name": "npz", "path": "data/raw/mine.npz", "validation": 10, "tasks": {"npz": {"odd": [0, 1] * 5}}}}
    )
    assert checkout.repro("prepare") == {"check", "prepare"}
    params.write_text(written)
    assert checkout.repro() == set() and lock.read_text() == before
    checkout.command("sh", "-c", "git add -A && git commit -qm back")
    assert checkout.command("python", "-m", "phasegate.tools.experiments", "p7a").startswith("phase-7a: baseline, ")


def test_every_phase_and_arm_gets_a_verdict(checkout: Checkout) -> None:
    decisions = checkout.table("decisions")
    verdicts = dict(zip(zip(decisions["phase"], decisions["arm"], strict=True), decisions["verdict"], strict=True))
    assert verdicts["p7a", "baseline"] == "BASELINE" and verdicts["p7a", "continue"] == "CONTROL"
    arms = load_params(ROOT / "params.yaml").arms() | {"plugins": ("loudest", "quiet", "arriving")}
    assert set(verdicts) == {(phase, arm) for phase in arms for arm in arms[phase]}
    assert set(decisions.query("primary")["verdict"]) <= {"BASELINE", "GO", "NO-GO", "INCONCLUSIVE", "NO ASSAY"}
    assert decisions.query("phase != 'p7a' and verdict != 'CONTROL'")["word"].notna().all()
    assert decisions.groupby("phase")["primary"].sum().drop("p7a").eq(1).all()
    assert (checkout.table("trials").groupby(["phase", "arm"]).size() == 2).all()
    assert not checkout.table("surgeries").empty
    scored = checkout.table("signals").groupby("signal").size()
    assert len(scored) == 16 and (scored == 2).all() and "loudest" in scored
    metrics = json.loads((checkout.folder / "metrics.json").read_text())
    row = decisions.query("phase == 'p7b2' and primary").iloc[0]
    assert (metrics["phase"], metrics["accuracy"]) == ("p7b2", pytest.approx(row["accuracy"]))


def test_changing_a_phase_reruns_that_phase_and_what_depends_on_it(checkout: Checkout) -> None:
    before = checkout.table("decisions").set_index(["phase", "arm"])["accuracy"]
    checkout.change({"p7b2": {"entropy_weight": 5.0}})
    assert checkout.repro() == {"check", "p7b2", "evaluate@p7b2", "decide", "report", "headline"}
    after = checkout.table("decisions").set_index(["phase", "arm"])["accuracy"]
    assert list(before.index[before != after]) == [("p7b2", "entropy_loss")]


def test_a_signal_in_plugins_is_one_file_and_may_go_again(checkout: Checkout) -> None:
    loudest, quietest = (checkout.folder / f"plugins/{name}.py" for name in ("loudest", "quietest"))
    quietest.write_text(loudest.read_text().replace("loudness)", "-loudness)"))
    checkout.change({"plugins": {"arms": {name: {"signal": name} for name in ("quietest", "loudest")}}})
    concerned = {"check", "plugins", "evaluate@plugins", "signals", "decide", "headline"}  # and the page
    assert checkout.repro("headline") == concerned
    rows = checkout.table("decisions").query("phase == 'plugins'")
    assert rows["arm"].tolist() == ["quietest", "loudest"] and rows["primary"].tolist() == [True, False]
    checkout.change({"plugins": {"arms": {}}})
    assert checkout.repro("headline") == concerned
    assert "plugins" not in set(checkout.table("decisions")["phase"])
    assert len(checkout.table("signals").groupby("signal")) == 15


def test_a_wrong_parameter_stops_before_any_result_is_touched(checkout: Checkout) -> None:
    results = {path: path.stat().st_mtime_ns for path in (checkout.folder / "reports").iterdir()}
    for override, sentence in {
        "p7b1.head_lr=-1": "check: p7b1.head_lr is -1: input should be greater than 0",
        "q2.candidates.top_1.top_k=99": "check: q2.candidates.top_1: top_k is 99: it must be at most n_routed = 12",
        "decisions.phases.p7b2.arms=[split,clonee]": "decisions.phases.p7b2.arms has 'clonee': did you mean clone?",
        "+p7b2.labels.growbelow=1": "check: p7b2.labels.growbelow is not a parameter; did you mean grow_below?",
    }.items():
        output = checkout.command("dvc", "exp", "run", "-S", override, ok=False)
        assert sentence in output and "Traceback" not in output
        assert re.findall(r"Running stage '([^']+)'", output) == ["check"]
        checkout.command("git", "checkout", "-q", "params.yaml")
    output = checkout.command("dvc", "exp", "run", "-S", "p7b2.labels.growbelow=1", ok=False)
    assert "growbelow" in output and "Running stage" not in output  # without the plus, DVC itself refuses a new key
    assert {path: path.stat().st_mtime_ns for path in (checkout.folder / "reports").iterdir()} == results
