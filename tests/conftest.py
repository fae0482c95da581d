"""Share between tests: one thread, and a tiny study that trains in a second."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import phasegate  # before numpy and torch

# isort: split
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from phasegate.base import timings
from phasegate.model.classifier import ModelSpec
from phasegate.params.phases import GroundTruth, Schedule, UsageLabels
from phasegate.params.pretraining import Architecture, Training
from phasegate.pretraining.pretrain import pretrain
from phasegate.signals.predictor import SURVEY, learn
from phasegate.signals.survey import survey
from phasegate.training.batches import Examples, load_examples
from phasegate.trials import store
from tests.models import ARCHITECTURE
from tests.small_study import ASCII, PATH, Checkout
from tests.tiny_data import TRAINING, write_tiny_data

assert not phasegate.UNPINNED, phasegate.UNPINNED
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
    os.environ.pop(name, None)  # `make test` sets them, and a make below it would tell which folder it enters
os.environ["PATH"] = PATH  # so that `.venv/bin/pytest` is enough
torch.set_num_threads(1)
settings.register_profile("phasegate", deadline=None)  # a test may wait for a busy core
settings.load_profile("phasegate")

FIRST = ["pipeline", "other_data", "surroundings", "kernels", "continuation", "recipes", "used", "reliability"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first; the first makes the study that the last three copy without waiting."""
    items.sort(key=lambda item: FIRST.index(name) if (name := item.path.stem[5:]) in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline under the small profile, run once from nothing for all processes: to be copied."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small-study"
    with FileLock(f"{folder}.lock"):
        if not (folder / "metrics.json").exists():
            study = Checkout(folder, None, **ASCII)  # stages run whatever the locale
            study.command("env", "PHASEGATE_WORKERS=2", "dvc", "repro", "q1")
            study.repro()
    return folder


@pytest.fixture(scope="module")
def checkout(small_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A copy of the small study, for the tests of one file."""
    return Checkout(tmp_path_factory.mktemp("study") / "checkout", of=small_study)


@pytest.fixture(scope="session", autouse=True)
def own_timings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file for what trials of tests take, in place of this checkout's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timings, "TIMINGS", path := tmp_path_factory.mktemp("timings") / "timings.csv")
        yield path


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a store of this test's own; and no processes unless the test asks for them."""
    monkeypatch.setattr(store, "STORE", tmp_path / "store/trials")
    monkeypatch.setenv("PHASEGATE_WORKERS", "1")
    return tmp_path / "store"


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    return ARCHITECTURE


@pytest.fixture(scope="session")
def training() -> Training:
    return TRAINING


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    return Schedule(
        steps=60, lr_scale=0.5, act_every=4, settle=12, cooldown=8, min_experts=4, max_experts=7,
        eval_every=4, split_direction="random", hyperplanes="fixed", sibling_balance=0.01,
    )  # fmt: skip


@pytest.fixture(scope="session")
def truth() -> GroundTruth:
    return GroundTruth(
        recovery_steps=3, repeats=2, surveys=2, survey_every=8, surveyed=1, candidates=1, every=1,
        certainty=0.9, price=1e-8, usage=UsageLabels(grow_above=1.3, prune_below=0.7),
    )  # fmt: skip


@pytest.fixture(scope="session")
def spec(architecture: Architecture) -> ModelSpec:
    return ModelSpec(architecture, (1, 8), (4,))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def gate(prepared: Path) -> Examples:
    return load_examples(prepared, torch.device("cpu"))[2]


@pytest.fixture(scope="session")
def baselines(prepared: Path, spec: ModelSpec, training: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a 7a checkpoint, `seed-0`, with its optimizer."""
    folder = tmp_path_factory.mktemp("baseline") / "seed-0"
    folder.mkdir()
    pretrain(folder, prepared=prepared, phase="p7a", arm="baseline", seed=0, spec=spec, training=training,
             keep_optimizer=True)  # fmt: skip
    return folder.parent


@pytest.fixture(scope="session")
def surveys(
    prepared: Path, baselines: Path, schedule: Schedule, truth: GroundTruth, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of surveys of two seeds; both start from the one baseline that there is."""
    folder = tmp_path_factory.mktemp("surveys")
    for seed in (0, 1):
        (folder / f"seed-{seed}").mkdir()
        survey(folder / f"seed-{seed}", prepared=prepared, start=baselines / "seed-0", seed=seed, schedule=schedule,
               truth=truth, steps=truth.last_survey)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def heads(surveys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the control head of `seed-0`, which learned from the survey of seed 1."""
    folder = tmp_path_factory.mktemp("heads")
    learn(folder / "seed-0", surveys=(surveys / "seed-1" / SURVEY,), seed=0)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
