"""The control head finds planted relations in noisy labels, knows how surely, and never sees its own seed."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import Tensor

from phasegate.base.errors import UserError
from phasegate.model.moe import MoE
from phasegate.records.trial_folder import Failure, write_failure
from phasegate.signals import predictor
from phasegate.signals.features import CHANGES, FEATURES, describe
from phasegate.signals.forks import Estimate
from phasegate.signals.predictor import HEAD, SURVEY, CounterfactualHead, heads, load_head, save_head, train_head
from phasegate.surgery.operations import ExpertManager
from phasegate.surgery.probe import Probe
from phasegate.trials.trial import Trial
from tests.models import draws, random_model, split

UNIT = 0.01  # nats, the size of a change
NOISE = 0.5 * UNIT


def simulated(first: int, seeds: int, experts: int = 10, noise: float = NOISE) -> pd.DataFrame:
    """Surveys in which every change is a constant and a linear part, the seed's and the expert's own, and noise.

    The columns `true_*` hold the changes without the noise, `told_*` what the features tell of them.
    """
    slopes, rng = np.random.default_rng(0).normal(size=(len(FEATURES), len(CHANGES))), np.random.default_rng(first)
    names = np.repeat(np.arange(first, first + seeds), experts)
    x = rng.normal(3, 2, (len(names), len(FEATURES)))
    told = UNIT * (0.5 + (x - 3) / 2 @ slopes / len(FEATURES) ** 0.5)
    own = UNIT * (0.2 * rng.normal(size=(seeds, 3)).repeat(experts, 0) + 0.3 * rng.normal(size=told.shape))
    labels = told + own + noise * rng.normal(size=told.shape)
    table = pd.DataFrame(x, columns=list(FEATURES)).assign(seed=names)
    for c, change in enumerate(CHANGES):
        table[change], table[f"{change}_error"] = labels[:, c], noise
        table[f"true_{change}"], table[f"told_{change}"] = told[:, c] + own[:, c], told[:, c]
    return table


def predicted(head: CounterfactualHead, table: pd.DataFrame) -> Estimate:
    return head.predict(torch.tensor(table[list(FEATURES)].to_numpy()))


def columns(table: pd.DataFrame, prefix: str) -> Tensor:
    """What the table says of every change, (n, C)."""
    return torch.tensor(table[[f"{prefix}{change}" for change in CHANGES]].to_numpy()).float()


@pytest.fixture(scope="module")
def head() -> CounterfactualHead:
    return train_head(simulated(0, 20), 0)


def test_a_planted_relation_is_found_in_noisy_labels(head: CounterfactualHead) -> None:
    unseen = simulated(1000, 40)
    told, found = columns(unseen, "told_"), predicted(head, unseen).change
    for c in range(len(CHANGES)):
        assert torch.corrcoef(torch.stack([told[:, c], found[:, c]]))[0, 1] > 0.95
        assert (found[:, c] - told[:, c]).square().mean().sqrt() < 0.35 * UNIT < told[:, c].std() / 2


def test_standard_errors_cover_what_experts_of_unseen_seeds_bring(head: CounterfactualHead) -> None:
    unseen = simulated(2000, 60)
    change, error = predicted(head, unseen)
    miss = (change - columns(unseen, "true_")) / error
    within = [(miss.abs() < z).float().mean(0) for z in (1.0, 1.96)]
    assert (within[0] - 0.68).abs().max() < 0.08 and (within[1] - 0.95).abs().max() < 0.03
    assert miss.mean(0).abs().max() < 0.35


def test_where_nothing_was_seen_the_head_is_less_sure_and_extrapolates_nothing(head: CounterfactualHead) -> None:
    change, error = head.predict(head.centre + torch.tensor([[0.0], [2.0], [4.0], [100.0]]) * head.scale)
    assert (error[0] < error[1]).all() and (error[1] < error[2]).all()
    torch.testing.assert_close(change[3], change[2])
    torch.testing.assert_close(error[3], error[2])


def test_an_expert_is_judged_for_itself(head: CounterfactualHead) -> None:
    features = torch.tensor(simulated(3000, 1)[list(FEATURES)].to_numpy())
    together, order = head.predict(features), torch.randperm(10, generator=draws())
    for row, shuffled, whole in zip(head.predict(features[:1]), head.predict(features[order]), together, strict=True):
        torch.testing.assert_close(row[0], whole[0])
        torch.testing.assert_close(shuffled, whole[order])


def test_noisier_labels_are_trusted_less() -> None:
    lesson, unseen = simulated(0, 8), simulated(1000, 8)
    found = []
    for factor in (0.1, 1, 10, 100):
        noisy = lesson.assign(**{f"{change}_error": factor * NOISE for change in CHANGES})
        found.append(predicted(train_head(noisy, 0), unseen))
    spread, doubt = [change.square().mean().sqrt() for change, _ in found], [error.mean() for _, error in found]
    assert spread[0] > spread[2] > spread[3] and spread[1] > spread[2] and spread[3] < 0.1 * spread[1]
    assert doubt[1] < doubt[2] < doubt[3]


def test_blank_labels_are_ignored_whatever_stands_beside_them() -> None:
    lesson, unseen = simulated(0, 6), simulated(1000, 2)
    blank = lesson.copy()
    blank[list(CHANGES)] = float("nan")
    without, beside = (predicted(train_head(table, 0), unseen) for table in (lesson, pd.concat([lesson, blank])))
    for one, other in zip(without, beside, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-3 * UNIT)
    half = lesson.copy()
    half.loc[half.index % 2 == 0, ["grow_error"]] = float("nan")
    other_half = half.assign(grow=half["grow"].where(half.index % 2 == 1, 1e6))
    for one, other in zip(*(predicted(train_head(table, 0), unseen) for table in (half, other_half)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(predicted(train_head(half, 0), unseen).change[:, 2], without.change[:, 2])


@pytest.mark.parametrize("change", CHANGES)
def test_a_kind_that_was_never_measured_can_not_be_learned(change: str) -> None:
    with pytest.raises(UserError, match=rf"no measured change of kind {change}: a control head can't learn it$"):
        train_head(simulated(0, 2).assign(**{change: float("nan")}), 0)


def test_of_too_many_rows_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "MOST_ROWS", 60)
    table = simulated(0, 8)
    one, same, other, few = train_head(table, 0), train_head(table, 0), train_head(table, 1), train_head(table[:60], 0)
    assert one.seen.shape == few.seen.shape == (60, len(FEATURES))
    assert torch.equal(one.seen, same.seen) and torch.equal(one.weights, same.weights)
    assert not torch.equal(one.seen, other.seen) and len(set(one.seen[:, 0].tolist())) == 60
    change = predicted(one, unseen := simulated(1000, 8)).change
    assert torch.corrcoef(torch.stack([change.flatten(), columns(unseen, "told_").flatten()]))[0, 1] > 0.8


def test_a_head_read_back_predicts_the_same(head: CounterfactualHead, tmp_path: Path) -> None:
    save_head(head, tmp_path)
    unseen = simulated(1000, 3)
    for written, read in zip(predicted(head, unseen), predicted(load_head(tmp_path), unseen), strict=True):
        assert torch.equal(written, read) and written.any()


@pytest.mark.parametrize("content", ["missing", "damaged", "empty", "text", "foreign", "another size"])
def test_a_file_that_is_no_head_is_refused(head: CounterfactualHead, tmp_path: Path, content: str) -> None:
    tensors = {"foreign": {"stem.weight": torch.ones(3)}}
    tensors["another size"] = {**vars(head), "weights": head.weights[:, 1:].contiguous()}
    contents = {name: safetensors.torch.save(named) for name, named in tensors.items()}
    contents |= {"empty": b"", "text": b"seed,change\n0,1\n"}
    path = tmp_path / HEAD
    if content != "missing":
        save_head(head, tmp_path)
        path.write_bytes(contents.get(content, path.read_bytes()[:-1000]))
    with pytest.raises(UserError) as refusal:
        load_head(tmp_path)
    sentence, why = str(refusal.value), "is missing" if content == "missing" else "is not a control head"
    assert sentence.startswith(str(path)) and why in sentence and "\n" not in sentence


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The surveys of three seeds."""
    files = [tmp_path / "surveys" / f"seed-{seed}" / SURVEY for seed in range(3)]
    for seed, file in enumerate(files):
        file.parent.mkdir(parents=True)
        simulated(seed, 1).to_csv(file, index=False)
    return files


def learned(trial: Trial, folder: Path) -> bytes:
    trial.run(folder, **trial.arguments)
    return (folder / HEAD).read_bytes()


def test_a_head_learns_from_all_seeds_but_its_own(files: list[Path], tmp_path: Path) -> None:
    trials = heads(tmp_path / "surveys", range(3))
    assert [trial.name for trial in trials] == ["seed-0", "seed-1", "seed-2"]
    for seed, trial in enumerate(trials):
        assert set(trial.inputs) == set(files) - {files[seed]} == set(trial.arguments["surveys"])
        assert str(files[seed]) not in repr(trial.arguments)
    before = [learned(trial, tmp_path / trial.name) for trial in trials]
    simulated(7, 1).to_csv(files[1], index=False)
    after = [learned(trial, tmp_path / trial.name) for trial in trials]
    assert [was == now for was, now in zip(before, after, strict=True)] == [False, True, False]
    files[1].unlink()
    assert learned(trials[1], tmp_path / "alone") == before[1]


def test_a_head_learns_from_the_surveys_that_did_not_fail_and_needs_one(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "surveys"
    files[1].unlink()
    write_failure(folder / "seed-1", Failure("survey", "", 1, 0, "its start failed: the loss is nan"))
    assert [trial.inputs for trial in heads(folder, range(3))] == [(files[2],), (files[0], files[2]), (files[0],)]
    write_failure(folder / "seed-0", Failure("survey", "", 0, 4, "the loss is nan"))
    with pytest.raises(UserError, match="no control head can be trained for seed 2: the surveys of all other seeds"):
        heads(folder, range(3))
    write_failure(folder / "seed-2", Failure("survey", "", 2, 4, "the loss is nan"))
    with pytest.raises(UserError, match="all 3 trials failed; the first: survey, seed 0, step 4"):
        heads(folder, range(3))


def described(change: Callable[[MoE], object] = lambda layer: None) -> pd.DataFrame:
    """The features of a random layer with seven experts, of which 2 and 5 are siblings, and 6 has none."""
    model, examples = random_model(0, examples=30)
    layer = model.layers[0]
    layer.selection_bias.zero_()
    split(layer, 2)
    ExpertManager(layer).clone(3)
    layer.w_in.data += 0.1 * torch.randn_like(layer.w_in)
    change(layer)
    probe = Probe(model, 0, examples)
    features = describe(probe, torch.tensor([60, 60, 4, 60, 60, 4, 0]), progress=0.25)
    assert features.shape == (7, len(FEATURES)) and features.isfinite().all() and not features.requires_grad
    return pd.DataFrame(features.numpy(), columns=list(FEATURES)).assign(loss=float(probe.losses.mean()))


def test_an_expert_is_described_by_its_work_its_age_and_its_sibling() -> None:
    table = described()
    assert table["load"].mean() == pytest.approx(1) and table["gate"].between(0, 1).all()
    assert table["age"].tolist() == pytest.approx([math.log(max(1, age)) for age in (60, 60, 4, 60, 60, 4, 0)])
    assert table["has_sibling"].tolist() == [0, 0, 1, 0, 0, 1, 0]
    distance = table["sibling_distance"]
    assert distance[2] == distance[5] > 0 and not distance.drop([2, 5]).any()
    for relative in ("output", "weights_in", "weights_out", "relative_saliency", "relative_gradient"):
        assert np.exp(table[relative]).mean() == pytest.approx(1, abs=0.01 / 7)  # a hundredth at least
    assert (table[["layer_entropy", "layer_experts", "model_loss", "progress"]].nunique() == 1).all()
    assert table["layer_experts"][0] == pytest.approx(math.log(7)) and table["progress"][0] == 0.25
    assert table["model_loss"][0] == table["loss"][0] and 0 < table["layer_entropy"][0] < 1


def test_relative_features_do_not_depend_on_the_scale_of_the_layer() -> None:
    usual, larger = described(lambda layer: layer.w_in.data.mul_(3)), described(lambda layer: layer.w_out.data.mul_(3))
    same = ["load", "gate", "entropy", "relative_entropy", "output", "weights_in", "weights_out"]
    pd.testing.assert_frame_equal(usual[same], larger[same])


def test_an_expert_without_work_is_described_too() -> None:
    table = described(lambda layer: layer.selection_bias[0, 0].fill_(-1e3))
    assert table["load"][0] == 0 and table["relative_entropy"][0] == -10
    relative = table[["output", "relative_saliency", "relative_gradient"]].to_numpy()[0]
    assert relative.tolist() == pytest.approx([math.log(0.01)] * 3)
