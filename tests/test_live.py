"""While a stage trains, DVC's own commands see how far it is; afterwards nothing is left of it."""

import json
import subprocess
from pathlib import Path

import pytest

from phasegate import live

POINTS = [
    {"step": 0, "accuracy": 10.0, "loss": float("nan"), "n_routed": 12},
    {"step": 20, "accuracy": 62.5, "loss": 1.25, "n_routed": 12},
]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(live, "_followed", None)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, check=True)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    return tmp_path


def dvc(*words: str) -> str:
    return subprocess.run(["dvc", *words], check=True, capture_output=True, text=True).stdout


def test_dvc_sees_the_stage_that_trains_and_the_curve_of_seed_0(repository: Path) -> None:
    with live.stage("p7b2", 70):
        for name in ("split/seed-0", "split/seed-1", "seed-0"):
            live.follow("p7b2", name)
            live.show(POINTS[:1])
            live.show(POINTS)
        live.tell("p7b2", 70, 13)
        metrics = json.loads(dvc("metrics", "show", "--json"))[""]["data"]["live/metrics.json"]["data"]
        plots = json.loads(dvc("plots", "show", "--json"))["data"]
    assert metrics == {"stage": "p7b2", "trials": 70, "done": 13}
    folder = "live/plots/metrics/p7b2"
    assert set(plots) == {f"{folder}/{name}.tsv" for name in ("split/accuracy", "split/loss", "accuracy", "loss")}
    [drawn] = plots[f"{folder}/split/loss.tsv"]
    assert [(row["step"], row["loss"]) for row in drawn["content"]["data"]["values"]] == [("20", "1.25")]
    assert not (repository / "live").exists()


def test_a_run_that_stops_leaves_nothing_and_what_a_killed_one_left_is_not_shown(repository: Path) -> None:
    (repository / "live/plots/metrics/old").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), live.stage("q1", 1):
        assert not (repository / "live/plots").exists()
        raise KeyboardInterrupt
    assert not (repository / "live").exists()


def test_nobody_is_followed_outside_a_stage_and_nothing_fails_where_nothing_can_be_written(repository: Path) -> None:
    live.follow("p7b2", "split/seed-0")
    live.show(POINTS)
    assert not (repository / "live").exists()
    (repository / "live").touch()
    with live.stage("p7b2", 1):
        live.follow("p7b2", "split/seed-0")
        live.show(POINTS)
