"""Every arm of 7b starts from its 7a checkpoint, does what its name says, and can be repeated to the bit."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import Tensor

from phasegate.base.errors import UserError
from phasegate.evaluation.split_halves import split_halves
from phasegate.model.classifier import Model
from phasegate.params import load_params
from phasegate.params.fields import Seeds, override
from phasegate.params.phases import GroundTruth, Repairing, Schedule, SurgeryStudy
from phasegate.records.trial_folder import SURGERIES
from phasegate.signals import forks, ground_truth, predictor
from phasegate.surgery import continuation, hyperplanes, tasks
from phasegate.surgery.controllers import Action, HeadPolicy, Proposal, Situation
from phasegate.surgery.surgeon import Treatment
from phasegate.training.batches import Examples
from phasegate.training.checkpoint import RECORD, WEIGHTS, load
from phasegate.trials.trial import Trial
from tests.layers import same

PHASES = ("control", "p7b1", "p7b2", "p7b3", "p7b4", "p7c3", "surgery")
PARAMS = load_params(Path(__file__).parents[1] / "params.yaml")
PLANNED = 4  # operations of each arm of the study on each layer: at steps 4, 8, 12 and 16, if nothing hinders them
OPERATIONS = {
    "p7b1/noise_acting": {"reinit", "remove"},
    "p7b1/random_acting": {"reinit", "remove"},
    **{f"p7b2/{grow}": {grow, "remove"} for grow in ("split", "clone", "reinit")},
    **{f"{phase}/grow": {"split"} for phase in ("p7b1", "p7b2")},
    **{f"{phase}/prune": {"remove"} for phase in ("p7b1", "p7b2")},
    "p7b1/yoked": {"reinit", "remove"},
    **{f"{phase}/yoked": {"split", "remove"} for phase in ("p7b2", "p7b4")},
    **{f"p7b4/{arm}": {"split", "remove"} for arm in ("counterfactual_head", "oracle", "frequency")},
    **{f"p7c3/{arm}": {"remove"} for arm in PARAMS.arms()["p7c3"] if arm != "leave"},
    **{f"surgery/{grow}": {grow} for grow in ("split", "clone", "reinit")},
    "surgery/clone_carried": {"clone"},
    **{f"surgery/split_{plane}": {"split"} for plane in ("loss", "trained", "balanced")},
    **{f"surgery/remove_by_{signal}": {"remove"} for signal in ("usage", "loss")},
    "surgery/merge": {"split", "merge"},
}
RESTING = {f"{phase}/{arm}" for phase in ("p7b4", "p7c3") for arm in ("counterfactual_head", "oracle", "sham", "yoked")}
"""Arms in which nothing may be worth doing."""
DEAD = 2  # experts of each layer in p7c3
CONTROL = "p7a/continue"
ARM_NAMES = [CONTROL, *(f"{phase}/{arm}" for phase in PHASES for arm in PARAMS.arms().get(phase, ()))]
STUDY = [name for name in ARM_NAMES if name.startswith("surgery/")]
Trials = dict[str, Trial]
Folders = dict[str, Path]
each_arm = pytest.mark.parametrize("arm", ARM_NAMES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the trials leave theirs."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def trials(
    prepared: Path, baselines: Path, heads: Path, models: Path, schedule: Schedule, truth: GroundTruth
) -> Trials:
    """The trials that the stages would run on the tiny study, by phase/arm; yoked ones stand after what they repeat."""
    found: list[Trial] = []
    paths = {"PREPARED": prepared, "BASELINES": baselines, "HEADS": heads, "MODELS": models}
    study = SurgeryStudy(operations=PLANNED, in_a_row=30)
    for phase in PHASES:
        stage = importlib.import_module(f"stages.{phase}")
        limits = {"surgery": {"min_experts": 3, "max_experts": 9}, "p7c3": {"min_experts": 3}}
        room = override(schedule, limits.get(phase, {}), "p7b")
        with pytest.MonkeyPatch.context() as patch:
            for module in (stage, continuation):
                for name, value in paths.items():
                    patch.setattr(module, name, value, raising=False)
                patch.setattr(module, "run_trials", lambda trials, output: found.extend(trials), raising=False)
            changes = {"seeds": Seeds(first=0, count=1), "p7b": room, "p7b4": truth, "surgery": study}
            stage.main(PARAMS.model_copy(update={**changes, "p7c3": Repairing(dead=DEAD)}))
    return {f"{trial.phase}/{trial.arm}": trial for trial in found}


@pytest.fixture(scope="module")
def ended(trials: Trials, models: Path) -> Folders:
    """The folders that the trials leave, by arm."""
    return {arm: run(trial, models / trial.phase / trial.name) for arm, trial in trials.items()}


def run(trial: Trial, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    trial.run(folder, **trial.arguments)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A trial's learning curve and log of surgeries."""
    return pd.read_csv(folder / "curve.csv"), pd.read_csv(folder / "surgeries.csv")


def test_stages_run_the_declared_arms_and_only_the_head_arms_read_a_control_head(trials: Trials) -> None:
    assert list(trials) == ARM_NAMES
    ask = {name for name, trial in trials.items() if any(path.name == predictor.HEAD for path in trial.inputs)}
    assert ask == {"p7b4/counterfactual_head", "p7c3/counterfactual_head"}


@each_arm
def test_every_arm_starts_at_the_accuracy_of_its_checkpoint(arm: str, ended: Folders, baselines: Path) -> None:
    start = json.loads((baselines / "seed-0" / RECORD).read_text())["gate"]
    curve, _ = tables(ended[arm])
    assert curve["step"].tolist() == list(range(0, 61, 4))
    same_start = curve["accuracy"].iloc[0] == 100 * start["correct"] / start["total"] and start["correct"] > 100
    assert same_start == (not arm.startswith("p7c3") or arm.endswith("sham"))
    end = json.loads((ended[arm] / RECORD).read_text())
    assert curve["accuracy"].iloc[-1] == 100 * end["gate"]["correct"] / end["gate"]["total"]
    assert (f"{end['trial']['phase']}/{end['trial']['arm']}", end["trial"]["n_routed_start"]) == (arm, 10)
    assert not same(weights(ended[arm]), weights(baselines / "seed-0"))


def alike(one: Path, other: Path) -> bool:
    files = (WEIGHTS, "curve.csv", "surgeries.csv", "loads.csv")
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


@pytest.mark.parametrize("kind", ["single", "keep", "noise_detached", "noise"])
def test_a_head_that_only_predicts_or_is_detached_leaves_the_trunk_alone(
    kind: str, trials: Trials, ended: Folders, heads: Path, tmp_path: Path
) -> None:
    """Else the trunk is trained as if nothing were there; the gradient of noise is not nothing."""
    labels = PARAMS.p7b1
    policy = {
        "keep": ground_truth.PredictedPolicy(heads, PARAMS.p7b4.price, PARAMS.p7b4.certainty),
        "noise_detached": HeadPolicy(labels, acts="sample"),
        "noise": HeadPolicy(labels, acts="sample", detach=False),
    }.get(kind)
    arm = continuation.Arm(Treatment(policy, grow=None, prune=None) if policy else None)
    continuation.run_arm(tmp_path, **{**trials[CONTROL].arguments, "name": kind, "arm": arm})
    assert same(weights(tmp_path), weights(ended[CONTROL])) == (kind != "noise")


@pytest.mark.parametrize(
    ("arm", "other"), [("p7b1/yoked", "noise_acting"), ("p7b2/yoked", "split"), ("p7b4/yoked", "frequency")]
)
def test_a_yoked_arm_does_the_same_operations_on_other_experts(
    arm: str, other: str, trials: Trials, ended: Folders, tmp_path: Path
) -> None:
    (_, mine), (_, log) = tables(ended[arm]), tables(path := ended[f"{trials[arm].phase}/{other}"])
    assert path / SURGERIES in trials[arm].inputs
    at = ["step", "block", "operation"]
    missing = log.merge(mine[at], how="left", indicator=True).query("_merge == 'left_only'")
    assert mine[at].merge(log[at]).equals(mine[at]) and len(missing) <= len(log) / 4  # where no expert had rested
    assert mine["expert"].tolist() != log["expert"][: len(mine)].tolist()


def test_measuring_leaves_training_alone(trials: Trials, ended: Folders, tmp_path: Path, monkeypatch: Any) -> None:
    measured: list[tuple[Tensor, Tensor]] = []

    def forks_and_nothing_more(controller: ground_truth.MeasuringController, situation: Situation) -> tuple[()]:
        plans = [[Proposal(Action.GROW, 0)], [Proposal(Action.PRUNE, 1)]]
        measured.append(forks.fork_proposals(plans, situation, controller.optimizer, controller.course, 3, 2))
        return ()

    monkeypatch.setattr(ground_truth.MeasuringController, "plan", forks_and_nothing_more)
    folder = run(trials["p7b4/oracle"], tmp_path)
    assert len(measured) == 24 and all(gate.abs().sum() > 0 for _, gate in measured)
    assert alike(folder, ended[CONTROL])


@pytest.mark.parametrize(
    "arm",
    ["p7b1/noise_acting", "p7b1/random_acting", "p7b2/split", "p7b3/task_gates", "p7b4/oracle"]
    + [f"surgery/{arm}" for arm in ("reinit", "remove_by_loss", "merge", "split_loss", "split_balanced")],
)
def test_the_same_seed_gives_the_same_bits(arm: str, trials: Trials, ended: Folders, tmp_path: Path) -> None:
    assert alike(ended[arm], run(trials[arm], tmp_path))


@each_arm
def test_the_log_of_surgeries_explains_the_number_of_experts(arm: str, trials: Trials, ended: Folders) -> None:
    (curve, log), schedule = tables(ended[arm]), trials[arm].arguments["schedule"]
    done, possible = set(log["operation"]), OPERATIONS.get(arm, set())
    assert done == possible or (done < possible and not arm.startswith("surgery/"))
    assert done or not possible or arm in RESTING
    change = log["n_routed_after"] - log["n_routed_before"]
    assert (change == log["operation"].map({"remove": -1, "merge": -1}).fillna(1)).all()
    for point in curve.to_dict("records"):
        assert point["n_routed"] == 10 + change[log["step"] <= point["step"]].sum()
    assert (log["step"] % 4 == 0).all() and log["step"].between(4, 48).all()
    for _, layer in log.groupby("block"):
        assert [5, *layer["n_routed_after"]][:-1] == layer["n_routed_before"].tolist()
        assert layer["n_routed_after"].between(schedule.min_experts, schedule.max_experts).all()
        touched: dict[float, int] = {}
        for row in layer.to_dict("records"):
            experts = [row[name] for name in ("expert", "parent") if not pd.isna(row[name])]
            assert all(row["step"] - touched.get(expert, -8) >= 8 for expert in experts)
            touched |= dict.fromkeys(experts, row["step"])


@pytest.mark.parametrize("arm", PARAMS.arms()["p7c3"])
def test_planted_dead_experts_stay_dead_and_only_who_knows_them_removes_all(arm: str, ended: Folders) -> None:
    left, log = weights(ended[f"p7c3/{arm}"]), tables(ended[f"p7c3/{arm}"])[1]
    planted = weights(ended["p7c3/leave"])
    for block in (0, 1):
        layer = f"model.blocks.{block}.moe."
        known = {e for e in range(5) if not any(planted[f"{layer}{name}"][e].any() for name in ("w_in", "w_out"))}
        rows, ids = log[log["block"] == block], left[f"{layer}expert_id"].tolist()
        killed = known if arm != "sham" else set()
        assert len(known) == DEAD and (rows["dead"] == rows["expert"].isin(killed)).all()
        zero = {expert for e, expert in enumerate(ids) if not left[f"{layer}w_in"][e].any()}
        assert zero == killed - {*rows["expert"]}
        if arm == "removed":
            assert {*rows["expert"]} == known and rows["step"].tolist() == [4, 8]
            assert set(rows["n_routed_after"]) == {4, 3}


@each_arm
def test_the_loads_are_of_the_experts_that_were_there(arm: str, ended: Folders) -> None:
    (curve, log), loads = tables(ended[arm]), pd.read_csv(ended[arm] / "loads.csv")
    assert list(loads["step"].unique()) == list(curve["step"])[1:]
    grown = log["n_routed_after"] > log["n_routed_before"]
    for (step, block), rows in loads.groupby(["step", "block"]):
        assert rows["share"].sum() == pytest.approx(1) and (rows["share"] >= 0).all()
        before = (log["step"] < step) & (log["block"] == block)  # a point is taken before the surgery of its step
        born, gone = set(log["expert"][grown & before]), set(log["expert"][~grown & before])
        assert set(rows["expert"]) == (set(range(5)) | born) - gone


@pytest.mark.parametrize("arm", OPERATIONS)
def test_the_log_of_surgeries_tells_what_each_did_and_when_the_model_recovered(arm: str, ended: Folders) -> None:
    curve, log = tables(ended[arm])
    for row in log.to_dict("records"):
        if row["operation"] == "split":
            assert row["output_change"] == 0 and row["routing_kl"] == 0 and row["recovery_steps"] == 0
        else:
            assert 0 < row["output_change"] < 10 and 0 <= row["routing_kl"] < 10
        back = curve["accuracy"] >= row["accuracy_before"]
        first = curve["step"][back & (curve["step"] >= row["step"])].min() - row["step"]
        recovered = row["accuracy_after"] >= row["accuracy_before"]
        assert row["recovery_steps"] == 0 if recovered else np.array_equal(row["recovery_steps"], first, equal_nan=True)


@pytest.mark.parametrize("arm", STUDY)
def test_the_study_grows_or_removes_half_as_often_or_merges_what_it_split(arm: str, ended: Folders) -> None:
    _, log = tables(ended[arm])
    assert set(log["block"]) == {0, 1}
    growth, pruned = (OPERATIONS[arm] & names for names in ({"split", "clone", "reinit"}, {"remove", "merge"}))
    plan = [*growth] * (2 if pruned else 4) + [*pruned] * 2
    for _, layer in log.groupby("block"):
        assert (layer["step"].tolist(), layer["operation"].tolist()) == ([4, 8, 12, 16][: len(plan)], plan)


@pytest.mark.parametrize("arm", ["surgery/remove_by_usage", "surgery/remove_by_loss"])
def test_removals_take_trained_experts_with_their_families(arm: str, ended: Folders, gate: Examples) -> None:
    model = load(ended[arm], gate).model
    assert isinstance(model, Model)
    assert all(moe.n_families == moe.n_routed == 3 and (moe.expert_id < 5).all() for moe in model.layers)


def test_the_studys_arms_are_one_until_they_first_differ(ended: Folders) -> None:
    """The third operation, at step 12, is the first that differs; a point is taken right after it."""
    (curve, log), (other_curve, other_log) = tables(ended["surgery/split"]), tables(ended["surgery/merge"])
    pd.testing.assert_frame_equal(curve[curve["step"] < 12], other_curve[other_curve["step"] < 12], check_exact=True)
    one, two = (table[table["step"] < 12].drop(columns="recovery_steps") for table in (log, other_log))
    pd.testing.assert_frame_equal(one, two, check_exact=True, check_dtype=False)
    assert len(one) == 4 and not curve.equals(other_curve)


def test_other_hyperplanes_and_other_growth_make_other_models(ended: Folders) -> None:
    grown = [weights(ended[arm]) for arm in STUDY if OPERATIONS[arm] <= {"split", "clone", "reinit"}]
    assert len(grown) == 7 and not any(same(a, b) for i, a in enumerate(grown) for b in grown[:i])


@pytest.mark.parametrize("own_gates", [True, False])
def test_further_tasks_leave_the_first_tasks_logits_alone(baselines: Path, gate: Examples, own_gates: bool) -> None:
    trial = load(baselines / "seed-0", gate)
    model = trial.model.eval()
    assert isinstance(model, Model) and trial.optimizer is not None
    before = model(gate.x).logits[0]
    tasks.add_tasks(model, trial.optimizer, [2, 3], own_gates)
    assert torch.equal(model(gate.x).logits[0], before)
    logits = model(gate.x, n_tasks=3).logits
    torch.testing.assert_close(logits[0], before)
    assert [rows.shape[1] for rows in logits] == [4, 2, 3]
    assert [moe.router.shape[0] for moe in model.layers] == [3 if own_gates else 1] * 2


def test_tasks_with_gates_of_their_own_come_to_route_differently(ended: Folders, gate: Examples) -> None:
    model = load(ended["p7b3/task_gates"], gate).model
    assert isinstance(model, Model)
    first, *others = model.layers[0].router
    assert all(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("arm", "fixed"), [("split", True), ("split_trained", False), ("split_balanced", False)])
def test_hyperplanes_move_only_where_they_are_trained(arm: str, fixed: bool, ended: Folders) -> None:
    named = weights(ended[f"surgery/{arm}"])
    norms = torch.cat([value.norm(dim=1) for name, value in named.items() if name.endswith("node_weight")])
    assert len(norms) == 2 * PLANNED and torch.allclose(norms, torch.ones(()), atol=1e-6) == fixed


def test_balanced_hyperplanes_even_out(trials: Trials, gate: Examples, tmp_path: Path, monkeypatch: Any) -> None:
    def tenth(tokens: Tensor, normal: Tensor) -> tuple[Tensor, float]:
        return normal, -float((tokens @ normal).quantile(0.9))

    monkeypatch.setattr(hyperplanes, "halve", tenth)
    share = {}
    for arm in ("trained", "balanced"):
        (folder := tmp_path / arm).mkdir()
        arguments = trials[f"surgery/split_{arm}"].arguments
        schedule = override(arguments["schedule"], {"sibling_balance": 1.0}, "p7b")
        continuation.run_arm(folder, **{**arguments, "schedule": schedule})
        share[arm] = split_halves(load(folder, gate).model, tables(folder)[1], gate)["smaller_share"].mean()
    assert share["trained"] < 0.2 and share["balanced"] > 0.3


def test_an_arm_that_a_stage_does_not_define_is_refused() -> None:
    with pytest.raises(UserError, match=r"decisions.phases.p7b3.arms has 'task_gates': did you mean task_gate\?"):
        continuation.run_phase("p7b3", {"task_gate": continuation.Arm()}, PARAMS)
