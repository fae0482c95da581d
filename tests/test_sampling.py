"""What the choice of test examples adds to the error of an accuracy is what simulated studies show."""

import math
from pathlib import Path

import numpy as np
import pytest

from phasegate.base.errors import UserError
from phasegate.params import load_params
from phasegate.params.names import EVALUATED
from phasegate.records import predictions
from phasegate.records.prepared import Array
from phasegate.verdicts.sampling import examples_error, sampling
from tests.small_study import ROOT


@pytest.mark.parametrize("shared", [0, 0.3, 1], ids=lambda share: f"{share} of the variance is the examples'")
def test_the_errors_of_seeds_and_examples_add_up(shared: float) -> None:
    draws, seeds, examples = np.random.default_rng(0), 5, 40
    means, expected = [], []
    for _ in range(4000):  # studies whose seeds and examples are drawn anew
        values = shared**0.5 * draws.normal(size=examples) + 0.1 * draws.normal(size=(seeds, 1))
        values = values + (1 - shared) ** 0.5 * draws.normal(size=(seeds, examples))
        means.append(values.mean())
        expected.append(values.mean(1).var(ddof=1) / seeds + examples_error(values) ** 2)
    assert np.mean(expected) == pytest.approx(np.var(means), rel=0.08 if shared else 0.2)


def test_one_seed_shows_the_binomial_error_and_equal_seeds_the_same() -> None:
    right = 100.0 * (np.arange(400) % 10 > 0)[None]  # 90 % of 400
    expected = pytest.approx(100 * (0.9 * 0.1 / 400) ** 0.5, rel=2e-3)
    assert examples_error(right) == expected and examples_error(right.repeat(3, axis=0)) == expected
    assert examples_error(np.zeros((3, 400))) == 0


def study(folder: Path) -> dict[int, Array]:
    """Write predictions of two classes: the arm `split` answers as the control does, and one of its trials failed."""
    draws = np.random.default_rng(1)
    labels = {name: draws.integers(2, size=50 if name == "references" else 200) for name in EVALUATED}
    labels |= dict.fromkeys(("control", "p7b2", "p7c1"), labels["p7a"])
    hard = draws.random(200) < 0.3  # some examples are hard for all seeds
    right = {seed: np.where(hard & (draws.random(200) < 0.7), 1 - labels["p7a"], labels["p7a"]) for seed in range(3)}
    trials = {"references": {"references/cnn/seed-0": labels["references"]}}
    trials["control"] = {f"p7a/continue/seed-{seed}": right[seed] for seed in right}
    trials["p7b2"] = {f"p7b2/split/seed-{seed}": right[seed] for seed in (0, 2)}
    trials["p7c1"] = {f"p7c1/small/seed-{seed}": labels["p7a"] for seed in right}
    trials["p7c1"] |= {f"p7c1/birth/seed-{seed}": right[seed] for seed in (0, 1)}
    trials["p7b2"] |= {f"p7b2/clone/seed-{seed}": labels["p7a"] for seed in right}
    for name in EVALUATED:
        predictions.write_predictions(folder / name, labels[name], trials.get(name, {}))
    return {seed: 100.0 * (right[seed] == labels["p7a"]) for seed in right}


def test_arms_are_compared_on_the_seeds_that_both_finished(tmp_path: Path) -> None:
    right = study(tmp_path)
    found = sampling(tmp_path, load_params(ROOT / "params.yaml").claims())
    table = {(phase, arm): errors for phase, arm, *errors in found.itertuples(index=False)}
    both, every, first = (examples_error(np.stack([right[s] for s in some])) for some in ((0, 2), (0, 1, 2), (0, 1)))
    assert table["p7b2", "split"] == pytest.approx([both, 0])
    assert table["p7a", "continue"] == pytest.approx([every, 0])
    assert table["p7b2", "clone"] == pytest.approx([0, every])  # it is never wrong
    assert table["p7c1", "birth"] == pytest.approx([first, first])  # beside `small`, which is never wrong
    assert table["p7c1", "small"] == [0, 0]
    accuracy, delta = table["references", "cnn"]
    assert accuracy == 0 and math.isnan(delta)
    assert len(table) == 6 and every > 0


@pytest.mark.parametrize("damage", ["missing", "cut", "no labels", "too few"])
def test_damaged_predictions_are_refused(tmp_path: Path, damage: str) -> None:
    study(tmp_path)
    path = tmp_path / "p7b2" / predictions.FILE
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:100])
        case "no labels":
            path.write_bytes(path.read_bytes().replace(b"labels", b"labell"))
        case "too few":
            predictions.write_predictions(tmp_path / "p7b2", np.arange(5), {"p7b2/split/seed-0": np.arange(4)})
    with pytest.raises(UserError, match=r"p7b2/predictions.safetensors .*`dvc repro` makes it again"):
        sampling(tmp_path, {})
