"""Every arm of 7b starts from its 7a checkpoint, does what its name says, and can be repeated to the bit."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import Tensor

from phasegate.checkpoint import RECORD, WEIGHTS, load
from phasegate.model import Model
from phasegate.multitask import add_tasks
from phasegate.params import ARMS, Schedule, load_params
from phasegate.training import Examples
from phasegate.trials import Trial
from stages import continue_7a, phase_7b1, phase_7b2, phase_7b3

SCHEDULE = Schedule(
    steps=60, lr_scale=0.5, act_every=4, settle=12, cooldown=8, min_experts=4, max_experts=7,
    eval_every=4, split_direction="principal", hyperplanes="fixed",
)  # fmt: skip
STAGES = {"continue": continue_7a, "p7b1": phase_7b1, "p7b2": phase_7b2, "p7b3": phase_7b3}
OPERATIONS = {
    "noise_acting": {"reinit", "remove"},
    "random_acting": {"reinit", "remove"},
    "split": {"split", "remove"},
    "split_thresholds": {"split", "remove"},
    "clone": {"clone", "remove"},
    "reinit": {"reinit", "remove"},
}
ARM_NAMES = ["continue", *(arm for arms in ARMS.values() for arm in arms)]


def trials_of(stage: ModuleType, prepared: Path, baselines: Path, **schedule: Any) -> dict[str, Trial]:
    """The trials that a stage would run on the tiny study, by arm."""
    found: list[Trial] = []
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    params = params.model_copy(update={"seeds": 1, "p7b": SCHEDULE.model_copy(update=schedule)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "PREPARED", prepared)
        patch.setattr(stage, "BASELINES", baselines)
        patch.setattr(stage, "run_trials", lambda trials, output, label: found.extend(trials))
        stage.main(params)
    return {trial.name.removesuffix("/seed-0"): trial for trial in found}


@pytest.fixture(scope="module")
def trials(prepared: Path, baselines: Path) -> dict[str, Trial]:
    return {arm: trial for stage in STAGES.values() for arm, trial in trials_of(stage, prepared, baselines).items()}


@pytest.fixture(scope="module")
def ended(trials: dict[str, Trial], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that the trials leave, by arm."""
    return {arm: run(trial, tmp_path_factory.mktemp(arm)) for arm, trial in trials.items()}


def run(trial: Trial, folder: Path) -> Path:
    trial.run(folder, **trial.arguments)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_stages_run_the_declared_arms(trials: dict[str, Trial]) -> None:
    assert list(trials) == ARM_NAMES


@pytest.mark.parametrize("arm", ARM_NAMES)
def test_every_arm_starts_at_the_accuracy_of_its_checkpoint_and_goes_on(
    arm: str, ended: dict[str, Path], baselines: Path
) -> None:
    start = json.loads((baselines / "seed-0" / RECORD).read_text())["gate"]
    curve = pd.read_csv(ended[arm] / "curve.csv")
    assert curve["step"].tolist() == list(range(0, 61, 4))
    assert curve["accuracy"].iloc[0] == 100 * start["correct"] / start["total"] and start["correct"] > 100
    end = json.loads((ended[arm] / RECORD).read_text())
    assert curve["accuracy"].iloc[-1] == 100 * end["gate"]["correct"] / end["gate"]["total"]
    assert (end["trial"]["arm"], end["trial"]["n_routed_start"]) == (arm, 10)
    assert not same(weights(ended[arm]), weights(baselines / "seed-0"))


def test_single_is_the_control_arm_to_the_bit(ended: dict[str, Path]) -> None:
    for file in (WEIGHTS, "curve.csv", "surgeries.csv"):
        assert (ended["single"] / file).read_bytes() == (ended["continue"] / file).read_bytes()


def test_a_head_behind_a_detached_gradient_leaves_the_trunk_bitwise_alone(ended: dict[str, Path]) -> None:
    assert same(weights(ended["noise_detached"]), weights(ended["continue"]))
    assert not same(weights(ended["noise"]), weights(ended["continue"]))


@pytest.mark.parametrize("arm", ["noise_acting", "random_acting", "split", "task_gates"])
def test_the_same_seed_gives_the_same_bits(
    arm: str, trials: dict[str, Trial], ended: dict[str, Path], tmp_path: Path
) -> None:
    again = run(trials[arm], tmp_path)
    for file in (WEIGHTS, "curve.csv", "surgeries.csv"):
        assert (ended[arm] / file).read_bytes() == (again / file).read_bytes()


@pytest.mark.parametrize("arm", ARM_NAMES)
def test_the_log_of_surgeries_explains_the_number_of_experts(arm: str, ended: dict[str, Path]) -> None:
    curve, log = pd.read_csv(ended[arm] / "curve.csv"), pd.read_csv(ended[arm] / "surgeries.csv")
    assert set(log["operation"]) == OPERATIONS.get(arm, set())
    change = log["n_routed_after"] - log["n_routed_before"]
    assert (change == log["operation"].map({"remove": -1}).fillna(1)).all()
    for point in curve.to_dict("records"):
        assert point["n_routed"] == 10 + change[log["step"] <= point["step"]].sum()
    assert (log["step"] % 4 == 0).all() and log["step"].between(4, 48).all()
    for _, layer in log.groupby("block"):
        assert [5, *layer["n_routed_after"]][:-1] == layer["n_routed_before"].tolist()
        assert layer["n_routed_after"].between(4, 7).all()
        touched: dict[float, int] = {}
        for row in layer.to_dict("records"):
            experts = [row[name] for name in ("expert", "parent") if not pd.isna(row[name])]
            assert all(row["step"] - touched.get(expert, -8) >= 8 for expert in experts)
            touched |= dict.fromkeys(experts, row["step"])


@pytest.mark.parametrize("arm", OPERATIONS)
def test_the_log_of_surgeries_tells_what_each_did_and_when_the_model_recovered(
    arm: str, ended: dict[str, Path]
) -> None:
    curve, log = pd.read_csv(ended[arm] / "curve.csv"), pd.read_csv(ended[arm] / "surgeries.csv")
    for row in log.to_dict("records"):
        if row["operation"] == "split":
            assert row["output_change"] <= 1e-6 and row["routing_kl"] == 0 and row["recovery_steps"] == 0
        else:
            assert 0 < row["output_change"] < 10 and 0 <= row["routing_kl"] < 10
        back = curve["accuracy"] >= row["accuracy_before"]
        first = curve["step"][back & (curve["step"] >= row["step"])].min() - row["step"]
        recovered = row["accuracy_after"] >= row["accuracy_before"]
        assert row["recovery_steps"] == 0 if recovered else np.array_equal(row["recovery_steps"], first, equal_nan=True)


@pytest.mark.parametrize("own_gates", [True, False])
def test_further_tasks_leave_the_first_tasks_logits_exactly_as_they_were(
    baselines: Path, gate: Examples, own_gates: bool
) -> None:
    trial = load(baselines / "seed-0", gate)
    model = trial.model.eval()
    assert isinstance(model, Model) and trial.optimizer is not None
    before = model(gate.x).logits[0]
    add_tasks(model, trial.optimizer, [2, 3], own_gates)
    assert torch.equal(model(gate.x).logits[0], before)
    logits = model(gate.x, n_tasks=3).logits
    torch.testing.assert_close(logits[0], before)
    assert [rows.shape[1] for rows in logits] == [4, 2, 3]
    assert [moe.router.shape[0] for moe in model.layers] == [3 if own_gates else 1] * 2


def test_tasks_with_gates_of_their_own_come_to_route_differently(ended: dict[str, Path], gate: Examples) -> None:
    model = load(ended["task_gates"], gate).model
    assert isinstance(model, Model)
    first, *others = model.layers[0].router
    assert all(not torch.equal(first, other) for other in others)


def test_hyperplanes_move_only_where_they_are_trained(
    prepared: Path, baselines: Path, ended: dict[str, Path], tmp_path: Path
) -> None:
    trained = run(trials_of(phase_7b2, prepared, baselines, hyperplanes="trained")["split"], tmp_path)
    for folder, fixed in ((ended["split"], True), (trained, False)):
        norms = torch.cat([v.norm(dim=1) for k, v in weights(folder).items() if k.endswith("node_weight")])
        assert len(norms) and torch.allclose(norms, torch.ones(()), atol=1e-6) == fixed
