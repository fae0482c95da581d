"""What is reported of a model is what one would count by hand."""

import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phasegate.base.errors import UserError
from phasegate.evaluation import evaluate as evaluation
from phasegate.evaluation.evaluate import KEY, TABLES, calibration_error, evaluate_phase, mutual_information
from phasegate.evaluation.split_halves import HALVES_COLUMNS
from phasegate.model.births import Birth
from phasegate.model.classifier import Model, ModelSpec, cost
from phasegate.model.references import Reference, ReferenceSpec
from phasegate.params.fields import override
from phasegate.params.phases import Schedule
from phasegate.records.predictions import read_predictions
from phasegate.records.prepared import TEST, load_splits
from phasegate.records.trial_folder import FAILURE_COLUMNS, LAST_GOOD, SURGERY_COLUMNS, Failure, write_failure
from phasegate.surgery import continuation, controllers, surgeon
from phasegate.surgery.operations import ExpertManager
from phasegate.surgery.tasks import add_tasks
from phasegate.training.batches import Examples
from phasegate.training.checkpoint import load
from phasegate.training.predictions import correct, predict
from tests.models import ARCHITECTURE

COLUMNS = {name: [*KEY, *names] for name, names in TABLES.items()}


def columns(folder: Path) -> dict[str, list[str]]:
    """The columns of the tables of an evaluated phase."""
    return {name: pd.read_csv(folder / f"{name}.csv").columns.tolist() for name in TABLES}


def test_calibration_error_is_the_weighted_gap_between_confidence_and_accuracy() -> None:
    confidence = np.array([0.9, 0.9, 0.9, 0.9, 0.55, 0.55])
    right = np.array([True, True, True, False, False, False])
    by_hand = 100 * (4 / 6 * abs(0.75 - 0.9) + 2 / 6 * 0.55)
    assert calibration_error(confidence, right, bins=10) == pytest.approx(by_hand)
    assert [calibration_error(np.ones(5), np.full(5, right)) for right in (True, False)] == [0, 100]
    assert calibration_error(np.full(4, 0.75), np.array([True, True, True, False])) == pytest.approx(0)


def test_balanced_accuracy_gives_every_class_that_is_there_the_same_weight() -> None:
    y = np.array([0] * 6 + [1] * 2 + [3])
    right = np.array([True] * 5 + [False] + [True, False] + [False])
    assert evaluation.balanced_accuracy(right, y) == pytest.approx(100 * (5 / 6 + 1 / 2 + 0) / 3)
    assert evaluation.balanced_accuracy(right[:6], y[:6]) == pytest.approx(100 * right[:6].mean())


def test_mutual_information_of_tables_made_by_hand() -> None:
    assert mutual_information(np.diag([5, 5, 5])) == pytest.approx(math.log(3))
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)
    by_hand = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    table = np.array([[2, 0], [1, 1], [0, 0]])
    assert [mutual_information(table), mutual_information(table.T)] == pytest.approx([by_hand] * 2)


@pytest.mark.parametrize(("stem", "shape"), [("mlp", (1, 8)), ("conv", (2, 12))])
def test_the_usage_of_experts_by_classes_sums_to_every_tokens_k_experts(stem: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Model(ModelSpec(override(ARCHITECTURE, {"stem": stem}, ""), shape, (4,)))
    ExpertManager(model.layers[0]).split(2, torch.randn(16), 0.0)
    ExpertManager(model.layers[1]).remove(0)
    y = torch.tensor([0, 0, 0, 1, 1, 3])
    outputs = predict(model, torch.randn(6, *shape))
    table, tokens = evaluation.routing_table(model, outputs, y), 1 if stem == "mlp" else 3
    assert table.columns.tolist() == TABLES["routing"]
    for block, ids in enumerate([{0, 1, 2, 3, 4, 5}, {1, 2, 3, 4}]):
        rows = table[table["block"] == block]
        assert set(rows["expert"]) == ids and rows["class"].tolist() == [0, 1, 2, 3] * len(ids)
        assert rows.groupby("class")["tokens"].sum().tolist() == [count * tokens * 2 for count in (3, 2, 0, 1)]
    experts = outputs[0].routings[0].experts[0].view(6, -1)
    of_five = table[(table["block"] == 0) & (table["expert"] == 5) & (table["class"] == 0)]
    assert of_five["tokens"].tolist() == [int((experts[:3] == 5).sum())]


def test_cost_is_what_one_counts_by_hand_and_of_the_reference_models_as_published() -> None:
    changes = {"width": 6, "blocks": 1, "expert_width": 3, "n_shared": 1}
    model = Model(ModelSpec(override(ARCHITECTURE, changes, ""), (1, 8), (4,)))
    stem, norms, router, expert, head = 8 * 6 + 6, 2 * 2 * 6, 5 * 6, 2 * 6 * 3, 6 * 4 + 4
    total, active = stem + norms + router + 6 * expert + head, stem + norms + router + 3 * expert + head
    flops = 2 * (8 * 6 + 5 * 6 + 3 * expert + 6 * 4)
    assert tuple(cost(model).model_dump().values()) == (total, active, flops)
    ExpertManager(model.layers[0]).split(0, torch.randn(6), 0.0)  # its hyperplane is all that it costs
    assert tuple(cost(model).model_dump().values()) == (total + expert + 7, active + 7, flops + 2 * 6)
    optimizer = torch.optim.AdamW(model.parameters())
    add_tasks(model, optimizer, [2, 3], own_gates=True)  # what other tasks need is not active in the first
    grown = total + expert + 7 + 2 * router + 7 * 2 + 7 * 3
    assert tuple(cost(model).model_dump().values()) == (grown, active + 7, flops + 2 * 6)
    for hidden, channels, size in (((100, 100), None, 15_210), (None, (25, 25, 25), 5_210)):
        assert cost(Reference(ReferenceSpec((1, 40), 10, hidden, channels))).params_total == size


@pytest.mark.parametrize("birth", [None, Birth(4, 5, retires=False), Birth(4, 5, retires=True)])
def test_operations_are_as_many_as_torch_counts_in_images_and_births_too(birth: Birth | None) -> None:
    architecture = override(ARCHITECTURE, {"stem": "conv", "n_routed": 7, "n_shared": 2}, "")
    model = Model(ModelSpec(architecture, (3, 9, 11), (4, 2), n_gates=2)).eval()
    for moe in model.layers:
        ExpertManager(moe).split(0, torch.randn(moe.router.shape[-1]), 0.0)
        moe.set_birth(birth)
    found = cost(model).flops_per_example
    with FlopCounterMode(display=False) as counter:
        model.double()(torch.zeros(1, 3, 9, 11, dtype=torch.float64))
    assert found == counter.get_total_flops()


def test_a_trials_row_is_consistent_with_its_predictions(baselines: Path, gate: Examples) -> None:
    trial = load(baselines / "seed-0", gate)
    found = evaluation.evaluate(trial, gate, {}, pd.DataFrame(columns=SURGERY_COLUMNS))
    assert found.trial["accuracy"] == pytest.approx(100 * correct(trial.model, gate) / 200)
    assert found.trial["accuracy"] == pytest.approx(100 * (found.predictions == gate.y.numpy()).mean())
    logits = predict(trial.model, gate.x)[0].logits[0]
    confidence, predicted = (value.numpy() for value in logits.double().softmax(-1).max(-1))
    assert found.trial["calibration_error"] == calibration_error(confidence, predicted == gate.y.numpy())
    assert found.trial["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, gate.y).item(), rel=1e-5)
    assert found.tables["routing"]["tokens"].sum() == 200 * 2 * 2
    assert (found.trial["n_routed_start"], found.trial["n_routed_end"]) == (10, 10)
    assert 0 < found.trial["routing_entropy"] < 1 and found.trial["mutual_information"] > 0
    halves = found.tables["split_halves"]
    assert halves.empty and halves.columns.tolist() == HALVES_COLUMNS


def test_further_heads_are_judged_beside_what_the_first_tells_of_their_task(baselines: Path, gate: Examples) -> None:
    trial = load(baselines / "seed-0", gate)
    assert isinstance(trial.model, Model)
    tasks = {"one": [0] * 4, "same": list(range(4))}
    assert evaluation.further_tasks(trial.model, gate, gate.y.numpy(), tasks).empty
    add_tasks(trial.model, torch.optim.AdamW(trial.model.parameters()), [1, 4], own_gates=True)
    trial.model.heads[2].load_state_dict(trial.model.heads[0].state_dict())  # then it answers as the first
    predicted = torch.cat([o.logits[0] for o in predict(trial.model, gate.x)]).argmax(-1).numpy()
    table = evaluation.further_tasks(trial.model, gate, predicted, tasks)
    right = 100 * correct(trial.model, gate) / len(gate)
    assert table.to_numpy().tolist() == [["one", 100, 100], ["same", pytest.approx(right), pytest.approx(right)]]


def test_a_phase_is_evaluated_on_test_and_an_empty_one_refused(baselines: Path, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "p7a").mkdir()
    (tmp_path / "p7a/baseline").symlink_to(baselines, target_is_directory=True)
    evaluate_phase(tmp_path / "p7a", prepared, tmp_path / "out")
    trials, routing = (pd.read_csv(tmp_path / f"out/{name}.csv") for name in ("trials", "routing"))
    assert trials[["phase", "arm", "seed"]].values.tolist() == [["p7a", "baseline", 0]]
    assert routing["tokens"].sum() == 100 * 2 * 2 and list(routing["class"].unique()) == ["a", "b", "c", "d"]
    assert len(pd.read_csv(tmp_path / "out/curves.csv")) == 21
    assert pd.read_csv(tmp_path / "out/split_halves.csv").empty
    assert columns(tmp_path / "out") == COLUMNS
    assert (tmp_path / "out/failures.csv").read_text() == ",".join(FAILURE_COLUMNS) + "\n"
    labels, predictions = read_predictions(tmp_path / "out")
    test = load_splits(prepared / TEST)
    assert labels.tolist() == test["test"].y.tolist() and list(predictions) == ["p7a/baseline/seed-0"]
    assert 100 * (predictions["p7a/baseline/seed-0"] == labels).mean() == pytest.approx(trials["accuracy"][0])
    (tmp_path / "p7a").rename(tmp_path / "references")
    evaluate_phase(tmp_path / "references", prepared, tmp_path / "published")
    assert read_predictions(tmp_path / "published")[0].tolist() == test["published"].y.tolist()
    with pytest.raises(UserError, match="holds no checkpoints"):
        evaluate_phase(tmp_path / "none", prepared, tmp_path / "out")


def test_a_failed_trial_is_listed_and_not_evaluated(baselines: Path, prepared: Path, tmp_path: Path) -> None:
    failed = Failure("p7a", "baseline", 1, 17, "the loss is nan")
    arm = tmp_path / "p7a/baseline"
    write_failure(arm / "seed-1", failed)
    shutil.copytree(baselines / "seed-0", arm / "seed-1" / LAST_GOOD)
    evaluate_phase(tmp_path / "p7a", prepared, tmp_path / "all failed")
    assert columns(tmp_path / "all failed") == COLUMNS
    assert all(pd.read_csv(tmp_path / f"all failed/{name}.csv").empty for name in TABLES)
    assert read_predictions(tmp_path / "all failed")[1] == {}
    (arm / "seed-0").symlink_to(baselines / "seed-0", target_is_directory=True)
    evaluate_phase(tmp_path / "p7a", prepared, tmp_path / "one failed")
    assert pd.read_csv(tmp_path / "one failed/trials.csv")["seed"].tolist() == [0]
    assert list(read_predictions(tmp_path / "one failed")[1]) == ["p7a/baseline/seed-0"]
    for name in ("all failed", "one failed"):
        assert pd.read_csv(tmp_path / name / "failures.csv").to_dict("records") == [asdict(failed)]


def test_halves_of_splits_arrive(baselines: Path, prepared: Path, schedule: Schedule, tmp_path: Path) -> None:
    short = override(schedule, {"steps": 12, "settle": 4}, "")
    arm, treatment, plan = continuation.Arm, surgeon.Treatment, controllers.PlannedPolicy
    arms = {"none": arm(), "split": arm(treatment(plan(2))), "reinit": arm(treatment(plan(1), grow="reinit"))}
    for trial in continuation.continuations(prepared, baselines, "surgery", arms, range(1), short):
        (folder := tmp_path / "models" / trial.name).mkdir(parents=True)
        trial.run(folder, **trial.arguments)
    evaluate_phase(tmp_path / "models", prepared, tmp_path / "out")
    halves, log = (pd.read_csv(tmp_path / f"out/{name}.csv") for name in ("split_halves", "surgeries"))
    splits, names = log[log["arm"] == "split"], ["block", "expert", "parent", "step"]
    assert len(splits) == 4 and halves[names].to_numpy().tolist() == splits[names].to_numpy().tolist()
    assert (halves["phase"] == "surgery").all() and (halves["arm"] == "split").all() and (halves["seed"] == 0).all()
    assert halves["smaller_share"].between(0.1, 0.5).all()  # on the test split
    assert halves["weight_distance"].between(1e-4, 1).all() and (halves["swap_loss"] != 0).all()
