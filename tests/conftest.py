"""What tests share: one thread, and a tiny study that trains in a second."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from phasegate.counterfactual_head import SURVEY, learn
from phasegate.data import Split, save
from phasegate.model import ModelSpec
from phasegate.phase_params import GroundTruth, Schedule, UsageLabels
from phasegate.pretraining import pretrain
from phasegate.pretraining_params import Architecture, Training
from phasegate.survey import survey
from phasegate.training import Examples, load_examples
from phasegate.trials import SECONDS
from tests.small_study import Checkout

torch.set_num_threads(1)
settings.register_profile("phasegate", deadline=None)  # a test may wait for a busy core
settings.load_profile("phasegate")


FIRST = ("test_pipeline.py", "test_cifar.py", "test_recipes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first, so that no process is left alone with them; the first makes what the third copies."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline under the small profile, run once from nothing for all processes: to be copied."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small-study"
    with FileLock(f"{folder}.lock"):
        if not (folder / "metrics.json").exists():
            Checkout(folder, PHASEGATE_WORKERS="2").repro()
    return folder


@pytest.fixture(scope="module")
def checkout(small_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A copy of the small study, for the tests of one file."""
    return Checkout(tmp_path_factory.mktemp("study") / "checkout", of=small_study)


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    return Architecture(
        stem="mlp", width=16, blocks=2, n_routed=5, n_shared=0, top_k=2, expert_width=8,
        dropout=0.1, balance_loss=0.01, balance_bias=0.001, z_loss=0.001,
    )  # fmt: skip


@pytest.fixture(scope="session")
def training() -> Training:
    return Training(
        steps=60, batch=32, lr=0.01, warmup=5, weight_decay=0.01, label_smoothing=0.0, noise=0.1, shift=1
    )  # fmt: skip


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    return Schedule(
        steps=60, lr_scale=0.5, act_every=4, settle=12, cooldown=8, min_experts=4, max_experts=7,
        eval_every=4, split_direction="random", hyperplanes="fixed", sibling_balance=0.01,
    )  # fmt: skip


@pytest.fixture(scope="session")
def truth() -> GroundTruth:
    return GroundTruth(
        recovery_steps=3, repeats=2, surveys=2, survey_every=8, surveyed=1, candidates=1, price=1e-8,
        usage=UsageLabels(grow_above=1.3, prune_below=0.7),
    )  # fmt: skip


@pytest.fixture(scope="session")
def spec(architecture: Architecture) -> ModelSpec:
    return ModelSpec(architecture, (1, 8), (4,))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set: 4 noisy classes, with two label maps."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("prepared")
    centres = rng.normal(size=(4, 1, 8))

    def split(examples: int) -> Split:
        y = np.arange(examples) % 4
        return Split(centres[y] + rng.normal(0, 0.8, (examples, 1, 8)), y)

    splits = {"train": split(320), "signal": split(300), "gate": split(200), "test": split(100)}
    tasks = {"half": (0, 0, 1, 1), "parity": (0, 1, 0, 1)}
    save(folder, splits, name="tiny", class_names=("a", "b", "c", "d"), tasks=tasks, mean=(0.0,), std=(1.0,))
    return folder


@pytest.fixture(scope="session")
def gate(prepared: Path) -> Examples:
    return load_examples(prepared, torch.device("cpu"))[2]


@pytest.fixture(scope="session")
def baselines(prepared: Path, spec: ModelSpec, training: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a 7a checkpoint, `seed-0`, with its optimizer."""
    folder = tmp_path_factory.mktemp("baseline")
    arguments = {"prepared": prepared, "phase": "p7a", "arm": "baseline", "seed": 0}
    (folder / "seed-0").mkdir()
    pretrain(folder / "seed-0", **arguments, spec=spec, training=training, keep_optimizer=True)  # type: ignore[arg-type]
    (folder / "seed-0" / SECONDS).write_text("1.5\n")
    return folder


@pytest.fixture(scope="session")
def surveys(
    prepared: Path, baselines: Path, schedule: Schedule, truth: GroundTruth, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of surveys of two seeds; both go on from the one baseline that there is."""
    folder = tmp_path_factory.mktemp("surveys")
    for seed in (0, 1):
        (folder / f"seed-{seed}").mkdir()
        start = baselines / "seed-0"
        survey(folder / f"seed-{seed}", prepared=prepared, start=start, seed=seed, schedule=schedule, truth=truth)
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
