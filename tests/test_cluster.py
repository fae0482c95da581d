"""A Ray cluster that loses a machine gives the same bits as the processes of one: `make test-cluster`."""

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phasegate.base.errors import UserError
from phasegate.model.classifier import ModelSpec
from phasegate.params.phases import GroundTruth, Schedule
from phasegate.params.pretraining import Training
from phasegate.pretraining.pretrain import pretraining
from phasegate.signals.ground_truth import PredictedPolicy
from phasegate.signals.predictor import heads
from phasegate.signals.signal_scores import scorings
from phasegate.signals.survey import surveys
from phasegate.surgery.continuation import Arm, continuations
from phasegate.surgery.surgeon import Treatment
from phasegate.trials import store
from phasegate.trials.run import run_trials
from phasegate.trials.trial import Trial
from tests.small_study import content

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings

SEEDS = 5
PREPARED = Path("data/prepared")
STARTED = Path("started")


def observed(folder: Path, *, trial: Trial, log: Path, pause: float) -> None:
    """Run a trial; before, write down where, and leave the test some seconds to interfere."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
    with log.open("a") as file:
        file.write(f"{trial.name} {node}\n")
    time.sleep(pause)
    trial.run(folder, **trial.arguments)


def fail(folder: Path, *, sentence: str) -> None:
    """A trial whose parameters are wrong."""
    raise UserError(sentence)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A node with one processor, to which a test adds others; trials run there."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes have phasegate, but not its tests
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    monkeypatch.setenv("PHASEGATE_BACKEND", "ray")
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def checkout(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prepared data alone, which is where we stand."""
    shutil.copytree(prepared, tmp_path / PREPARED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runs(checkout: Path) -> list[list[str]]:
    """Trial and node of every run, so far."""
    log = checkout / STARTED
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_a_cluster_that_loses_a_node_gives_the_bits_of_one_machine(
    cluster: Any, checkout: Path, spec: ModelSpec, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [pretraining(PREPARED, "p7a", "baseline", seed, spec, training, True) for seed in range(SEEDS)]
    arguments = {"log": checkout / STARTED, "pause": 2.0}
    wanted = [replace(trial, run=observed, arguments={**arguments, "trial": trial}) for trial in plain]
    doomed = cluster.add_node(num_cpus=1)
    killed: list[str] = []

    def kill() -> None:
        while not any(node == doomed.node_id for _, node in runs(checkout)):
            time.sleep(0.05)
        cluster.remove_node(doomed, allow_graceful=False)
        killed.extend(name for name, node in runs(checkout) if node == doomed.node_id)

    killer = threading.Thread(target=kill)
    killer.start()
    run_trials(wanted, Path("models/ray"))
    killer.join(timeout=10)
    names = [name for name, _ in runs(checkout)]
    assert len(killed) == 1 and names.count(killed[0]) == 2  # lost in the middle, and run again
    assert len(names) == SEEDS + 1

    monkeypatch.setenv("PHASEGATE_BACKEND", "processes")
    monkeypatch.setattr(store, "STORE", Path("other/store"))
    run_trials(plain, Path("models/here"))
    assert len(content(Path("models/ray"))) > SEEDS and content(Path("models/ray")) == content(Path("models/here"))


def test_every_kind_of_trial_finds_all_that_it_reads(
    cluster: Any, checkout: Path, spec: ModelSpec, training: Training, schedule: Schedule, truth: GroundTruth
) -> None:
    models, seeds = Path("models"), range(2)
    starts, surveyed, learnt = models / "baseline", models / "survey", models / "heads"
    run_trials([pretraining(PREPARED, "p7a", "baseline", s, spec, training, True) for s in seeds], models)
    run_trials(surveys(PREPARED, starts, seeds, schedule, truth), surveyed)
    run_trials(heads(surveyed, seeds), learnt)
    run_trials(scorings(PREPARED, starts, surveyed, learnt, seeds, schedule, 1), models / "signals")
    arms = {"head": Arm(Treatment(PredictedPolicy(learnt, truth.price, truth.certainty)))}
    run_trials(continuations(PREPARED, starts, "p7b4", arms, seeds, schedule), models / "p7b4")
    assert len(list(models.glob("p7b4/head/*/weights.safetensors"))) == len(seeds)


def test_errors_of_a_cluster_are_one_sentence(cluster: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            run_trials([Trial("p", "arm", 0, fail, {"sentence": "lr is -1"})], Path("models"))

    refused(r"^lr is -1$")
    monkeypatch.setenv("PHASEGATE_DEVICE", "cuda")
    refused(r"^PHASEGATE_DEVICE is cuda, but the Ray cluster has no GPU: use auto or cpu$")
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    refused(r"^no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:1$")


def test_a_cluster_that_refuses_us_is_told_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("authentication token is missing")

    from phasegate.trials.cluster import connect

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match="RAY_ADDRESS=auto can't be joined: if it asks for a token, set RAY_AUTH_MODE"):
        connect()
