"""Trials of 7c.1 and 7c.2 start from the steps that they share, grow as their names say, and use the chosen rates."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from torch import Tensor

import stages.early
import stages.p7c1
import stages.p7c2
import stages.rates
from phasegate.base.errors import UserError
from phasegate.base.files import write_atomic
from phasegate.params import Params, load_params
from phasegate.params.fields import Seeds
from phasegate.params.phases import Arriving, GroundTruth, Growing, GrowingTimes, Schedule
from phasegate.signals.ground_truth import MeasuringController
from phasegate.surgery import growing
from phasegate.surgery.continuation import Arm
from phasegate.surgery.controllers import Action, Proposal, Situation
from phasegate.training.checkpoint import RECORD, WEIGHTS
from phasegate.trials.trial import Trial
from tests.layers import same
from tests.models import ARCHITECTURE
from tests.small_study import ROOT
from tests.test_continuation import Trials, alike, tables, weights
from tests.tiny_data import TRAINING

SMALL, LARGE, TOP_K, BLOCKS, LAST = 3, 6, 2, ARCHITECTURE.blocks, 125
STARTS = {"early": 5, "at": 10, "late": 15, "large": 10, "short": 10, "few": 20, "few_large": 20}
P7C1 = {  # the early steps that an arm continues, and its operations
    "small": ("at", {}), "large": ("large", {}), "birth": ("at", {"birth": 1}), "birth_early": ("early", {"birth": 1}),
    "birth_late": ("late", {"birth": 1}), "birth_short": ("short", {"birth": 1}), "handover": ("at", {"handover": 1}),
    "upcycle": ("at", {"upcycle": 1}), "upcycle_carried": ("at", {"upcycle": 1}), "reinit": ("at", {"reinit": 3}),
    "split": ("at", {"split": 3}),
}  # fmt: skip
P7C2 = {
    "stay": ("few", {}), "large": ("few_large", {}), "measured": ("few", {"birth": 1}),
    "informed": ("few", {"birth": 1}), "yoked": ("few", {"birth": 1}), "restart": (None, {}),
    "split": ("few", {"split": 3}),
}  # fmt: skip
ARMS = {f"{phase}/{arm}": case for phase, arms in (("p7c1", P7C1), ("p7c2", P7C2)) for arm, case in arms.items()}
RATES = {"small": 2.0, "large": 1.0, "birth": 4.0, "handover": 2.0, "upcycle": 4.0, "upcycle_carried": 2.0}
RATES |= {"reinit": 1.0, "split": 2.0}
each_arm = pytest.mark.parametrize("arm", ARMS)


@pytest.fixture(scope="module")
def params(schedule: Schedule, truth: GroundTruth) -> Params:
    study = Growing(
        steps=LAST, small=SMALL, large=LARGE, top_k=TOP_K, expert_width=8, act_every=10, settle=5, eval_every=5,
        seeds=Seeds(first=7, count=2), rates=(1.0, 2.0, 4.0),
    )  # fmt: skip
    changes = {"seeds": Seeds(first=0, count=1), "model": ARCHITECTURE, "p7b": schedule, "p7b4": truth, "p7c": study}
    changes |= {"p7c1": GrowingTimes(early=5, at=10, late=15)}
    changes |= {"p7c2": Arriving(classes=2, at=20, recovery_steps=3, repeats=2)}
    return load_params(ROOT / "params.yaml").model_copy(update=changes)


@pytest.fixture(scope="module")
def trials(params: Params, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    """All trials by phase/arm, each run in a folder that this process is in; rates were tried in vain."""
    found: Trials = {}

    def run_here(trials: list[Trial], output: Path) -> None:
        for trial in trials:
            found[f"{trial.phase}/{trial.arm}"] = trial
            run(trial, output / trial.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("study"))
        Path("data").mkdir()
        Path("data/prepared").symlink_to(prepared)
        write_atomic(Path("models/q1.yaml"), yaml.safe_dump({"training": TRAINING.model_dump()}))
        choose(params, patch, {(way, rate): 50.0 + (rate == best) for way, best in RATES.items() for rate in (1, 2, 4)})
        for stage in (stages.early, stages.p7c1, stages.p7c2):
            patch.setattr(stage, "run_trials", run_here)
            stage.main(params)
        yield found


def choose(params: Params, patch: pytest.MonkeyPatch, accuracies: dict[tuple[str, int], float]) -> list[Trial]:
    """Run the stage that chooses rates on made-up accuracies of ways and rates; returns what it would train."""
    tried: list[Trial] = []
    names = {f"{way}_x{rate}": accuracy for (way, rate), accuracy in accuracies.items()}
    patch.setattr(stages.rates, "run_trials", lambda trials, output: tried.extend(trials))
    patch.setattr(stages.rates, "accuracy", lambda folder, case, seed: names[case] + (seed - 7.5))
    stages.rates.main(params)
    return tried


def run(trial: Trial, folder: Path) -> Path:
    folder.mkdir(parents=True)
    trial.run(folder, **trial.arguments)
    return folder


def folder_of(name: str, seed: int = 0) -> Path:
    return Path("models", name, f"seed-{seed}")


def model_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for name, value in weights(folder).items() if name.startswith("model.")}


def test_stages_run_the_declared_arms(trials: Trials, params: Params) -> None:
    declared = [f"{phase}/{arm}" for phase in ("p7c1", "p7c2") for arm in params.arms()[phase]]
    assert list(trials) == [*(f"early/{name}" for name in STARTS), *declared] and declared == list(ARMS)


@each_arm
def test_an_arm_ends_with_as_many_experts_as_its_name_says(arm: str, trials: Trials) -> None:
    (curve, log), operations = tables(folder_of(arm)), ARMS[arm][1]
    layers = log["block"].nunique() if arm == "p7c2/measured" else BLOCKS * bool(operations)
    large = BLOCKS if arm.endswith(("/large", "/restart")) else layers
    assert curve["n_routed"].iloc[-1] == BLOCKS * SMALL + large * (LARGE - SMALL)
    for _, layer in log.groupby("block"):
        assert layer["operation"].value_counts().to_dict() == operations
    assert log["block"].nunique() == layers and not log["dead"].any()
    last = weights(folder_of(arm))
    ids = last["model.blocks.0.moe.expert_id"].tolist()
    assert ids == list(range(SMALL if arm.endswith("/handover") else 0, int(last["model.blocks.0.moe.next_id"])))
    if arm not in ("p7c2/measured", "p7c2/yoked"):  # which may grow late
        under_way = [SMALL, 15, 0] if arm == "p7c1/birth_short" else [0, 0, 0]
        assert last["model.blocks.1.moe.birth"].tolist() == under_way


@each_arm
def test_an_arm_continues_the_right_early_steps_and_its_curve_holds_them(arm: str, trials: Trials) -> None:
    start, curve = ARMS[arm][0], tables(folder_of(arm))[0]
    last = LAST - 100 if start == "short" else LAST
    if start is None:
        assert curve["step"].tolist() == list(range(20, last + 1, 5))
        assert not any(path.is_relative_to("models") for path in trials[arm].inputs)
        return
    early = folder_of(f"early/{start}")
    assert {early / WEIGHTS, early / RECORD, early / "curve.csv"} <= {*trials[arm].inputs}
    assert curve["step"].tolist() == list(range(0, last + 1, 5))
    before = tables(early)[0]
    assert before["step"].iloc[-1] == STARTS[start]
    pd.testing.assert_frame_equal(curve.iloc[: len(before)], before, check_exact=True)
    lines = (folder_of(arm) / "curve.csv").read_text().splitlines()
    assert lines[: len(before) + 1] == (early / "curve.csv").read_text().splitlines()
    end = json.loads((folder_of(arm) / RECORD).read_text())
    assert curve["accuracy"].iloc[-1] == 100 * end["gate"]["correct"] / end["gate"]["total"]


def test_the_rates_of_arms_are_those_that_were_chosen(trials: Trials) -> None:
    for name, (_, operations) in ARMS.items():
        plan, arm = trials[name].arguments["plan"], name.split("/")[1]
        way = {"stay": "small", "restart": "large"}.get(arm) or arm
        if arm in ("measured", "yoked"):
            assert (plan.rate, plan.arm.treatment.expert_rate) == (RATES["small"], RATES["birth"])
        else:
            assert plan.rate == RATES[way if way in RATES else "birth"], name
            assert not operations or plan.arm.treatment.expert_rate is None


def test_trials_that_share_steps_train_what_one_trial_would(trials: Trials, tmp_path: Path) -> None:
    """Three trials in a row, and one from scratch, give the same bits; only the rate of experts is set at the start."""
    chained = growing.growing("p7c1", "chained", 0, growing_plan(trials, "p7c1/small", rate=1.0), start=None)
    late = trials["p7c1/small"].arguments | {"plan": growing_plan(trials, "p7c1/small", rate=1.0, begin=10)}
    one = run(chained, tmp_path / "one")
    (tmp_path / "late").mkdir()
    growing.grow(tmp_path / "late", **late)
    assert same(model_of(one), model_of(tmp_path / "late"))
    curves = [tables(folder)[0] for folder in (one, tmp_path / "late")]
    assert curves[0].to_csv() == curves[1].to_csv()


def growing_plan(trials: Trials, arm: str, rate: float, begin: int = 0) -> growing.Plan:
    plan: growing.Plan = trials[arm].arguments["plan"]
    return growing.Plan(plan.spec, plan.training, plan.schedule, begin, rate=rate)


def test_only_the_first_classes_are_there_before_the_others_arrive(trials: Trials) -> None:
    few, stay = (trials[name].arguments["plan"] for name in ("early/few", "p7c2/stay"))
    assert (few.classes, few.until, stay.classes, stay.begin) == (2, 20, None, 20)
    accuracy = tables(folder_of("p7c2/stay"))[0].set_index("step")["accuracy"]
    assert accuracy[20] <= 50 < 60 < accuracy[LAST]


@pytest.mark.parametrize("arm", [arm for arm, case in ARMS.items() if case[1]])
def test_exact_growth_changes_no_output_when_it_is_done(arm: str, trials: Trials) -> None:
    log = tables(folder_of(arm))[1]
    exact = log["operation"].isin(["split", "birth", "handover"])
    assert (log["output_change"][exact] == 0).all() and (log["recovery_steps"][exact] == 0).all()
    assert (log["routing_kl"][log["operation"] == "split"] == 0).all()
    assert (log["output_change"][~exact] > 0).all()


@pytest.mark.parametrize(("arm", "first"), [("birth", 10), ("birth_early", 5), ("birth_late", 15), ("birth_short", 10)])
def test_a_curve_counts_the_slots_of_each_step(arm: str, first: int, trials: Trials) -> None:
    curve, plain = tables(folder_of(f"p7c1/{arm}"))[0], BLOCKS * TOP_K
    assert curve["slots"].isna().tolist() == [True] + [False] * (len(curve) - 1)
    slots = curve.set_index("step")["slots"].iloc[1:]
    assert slots.tolist() == [plain * (2 if first < step <= first + 100 else 1) for step in slots.index]
    for other in ("small", "handover", "upcycle"):
        assert set(tables(folder_of(f"p7c1/{other}"))[0]["slots"].dropna()) == {plain}


def rerun(trial: Trial, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    growing.grow(folder, **trial.arguments | changes)
    return folder


def test_measuring_that_never_grows_leaves_training_alone(
    trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = MeasuringController.plan, list[int]()

    def measure_and_rest(controller: MeasuringController, situation: Situation) -> tuple[()]:
        plan(controller, situation)
        asked.append(situation.step)
        return ()

    monkeypatch.setattr(MeasuringController, "plan", measure_and_rest)
    folder = rerun(trials["p7c2/measured"], tmp_path / "measured", name="stay")
    assert asked == [step for step in range(20, 121, 10) for _ in range(BLOCKS)]
    assert alike(folder, folder_of("p7c2/stay"))


def test_measuring_that_grows_at_once_is_the_informed_arm(
    trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow_at_once(controller: MeasuringController, situation: Situation) -> list[Proposal]:
        return situation.allowed.proposals(Action.GROW)[:1]

    monkeypatch.setattr(MeasuringController, "plan", grow_at_once)
    folder = rerun(trials["p7c2/measured"], tmp_path / "measured", name="informed")
    assert alike(folder, folder_of("p7c2/informed"))
    assert (tables(folder)[1]["step"] == 20).all()
    assert not same(weights(folder), weights(folder_of("p7c2/stay")))


def test_the_yoked_arm_grows_all_layers_at_a_chance_that_its_seed_draws(trials: Trials, tmp_path: Path) -> None:
    chances = list(range(20, 121, 10))
    assert trials["p7c2/yoked"].arguments["plan"].arm.treatment.policy.steps == tuple(chances)
    drawn = set()
    for seed in range(4):
        log = tables(rerun(trials["p7c2/yoked"], tmp_path / str(seed), seed=seed))[1]
        assert log["step"].nunique() == 1 and log["block"].tolist() == list(range(BLOCKS))
        drawn.add(log["step"].iloc[0])
    assert drawn <= {*chances} and len(drawn) > 1


def test_an_arm_that_grows_gives_the_same_bits_again(trials: Trials, tmp_path: Path) -> None:
    for arm in ("p7c1/birth", "p7c1/handover", "p7c1/upcycle", "p7c2/measured"):
        assert alike(rerun(trials[arm], tmp_path / arm.replace("/", "-")), folder_of(arm))
    assert trials["p7c1/small"].arguments["plan"].arm == Arm()


def test_the_best_rate_that_no_seed_failed_with_is_chosen(
    params: Params, trials: Trials, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {name: Path(name).read_text() for name in ("models/rates.yaml", "models/rates.csv")}
    accuracies = {(way, rate): 60.0 - rate for way in RATES for rate in (1, 2, 4)}
    accuracies |= {("birth", 1): float("nan"), ("split", 4): 61.0, ("upcycle", 2): 59.0}
    tried = choose(params, monkeypatch, accuracies)
    table, chosen = pd.read_csv("models/rates.csv"), yaml.safe_load(Path("models/rates.yaml").read_text())["rates"]
    assert chosen == dict.fromkeys(RATES, 1.0) | {"birth": 2.0, "split": 4.0}
    assert list(table) == ["operator", "factor", "seed", "accuracy", "chosen"] and len(table) == 8 * 3 * 2
    for row in table.to_dict("records"):
        assert row["chosen"] == (chosen[row["operator"]] == row["factor"])
    assert {trial.seed for trial in tried} == {7, 8}
    assert {trial.arm for trial in tried if trial.arguments["start"] is None} == {"early", "large"}
    assert all(trial.phase == "rates" for trial in tried) and len(tried) == (3 + 8 * 3) * 2
    accuracies |= {("reinit", rate): float("nan") for rate in (1, 2, 4)}
    with pytest.raises(UserError, match=r"^every rate of reinit failed in some seed of p7c.seeds: try lower ones in"):
        choose(params, monkeypatch, accuracies)
    for name, content in before.items():
        Path(name).write_text(content)
