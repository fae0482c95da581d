"""Halves of a split are compared as one would by hand, and the model is left as it was."""

import copy
from collections.abc import Set

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.evaluation import split_halves
from phasegate.model.classifier import Model
from phasegate.model.references import Reference, ReferenceSpec
from phasegate.records.trial_folder import SURGERY_COLUMNS
from phasegate.surgery.hyperplanes import random_direction
from phasegate.surgery.operations import ExpertManager
from phasegate.training.batches import Examples
from phasegate.training.predictions import predict
from tests.models import draws, random_model, unchanged

MEASURES = ["smaller_share", "weight_distance", "output_distance", "swap_loss"]


class Study:
    """A model whose experts can be split, with the log of that."""

    def __init__(self, model: Model, examples: Examples) -> None:
        self.model, self.examples = model, examples
        self.rows: list[dict[str, object]] = []

    def split(self, expert: int, block: int = 0, share: float = 0.7) -> int:
        """Split along a random direction, with that share of the expert's tokens on the old side."""
        tokens = self.reaching({expert}, block)
        direction = random_direction(16, draws(len(self.rows)))
        offset = -float((tokens @ direction).quantile(share))
        surgery = ExpertManager(self.model.layers[block]).split(expert, direction, offset)
        self.note("split", surgery.expert, expert, block)
        return surgery.expert

    def note(self, operation: str, expert: int, parent: int | None, block: int = 0) -> None:
        row = (4 * len(self.rows), block, operation, expert, parent)
        self.rows.append(dict(zip(SURGERY_COLUMNS, row, strict=False)))

    def change(self, expert: int, block: int = 0) -> None:
        """Let an expert come to differ from its sibling."""
        moe, random = self.model.layers[block], draws(expert)
        for weight in (moe.w_in, moe.w_out):
            weight.data[self.index(expert, block)] += 0.3 * torch.randn(weight.shape[1:], generator=random)

    def index(self, expert: int, block: int) -> int:
        return self.model.layers[block].expert_id.tolist().index(expert)

    def table(self) -> pd.DataFrame:
        return split_halves.split_halves(self.model, pd.DataFrame(self.rows, columns=SURGERY_COLUMNS), self.examples)

    def measured(self, expert: int, block: int = 0) -> dict[str, float]:
        """The row of the split that made an expert."""
        (row,) = self.table().set_index(["expert", "block"])[MEASURES].loc[[(expert, block)]].to_dict("records")
        return {str(name): float(value) for name, value in row.items()}

    def reaching(self, experts: Set[int], block: int) -> Tensor:
        """The tokens that run one of these experts, one by one."""
        moe, routing = self.model.layers[block], predict(self.model, self.examples.x)[0].routings[block]
        ids = moe.expert_id[routing.experts[0]].tolist()
        return torch.stack([token for token, mine in zip(routing.tokens[0], ids, strict=True) if experts & {*mine}])

    def by_hand(self, a: int, b: int, sides: tuple[Set[int], Set[int]], block: int = 0) -> dict[str, float]:
        """The measures of experts a and b, whose hyperplane has these experts on its two sides."""
        counts = [len(self.reaching(side, block)) for side in sides]
        moe, i, j = self.model.layers[block], self.index(a, block), self.index(b, block)
        tokens = self.reaching({a, b}, block).double()
        (in_a, out_a), (in_b, out_b) = ((moe.w_in[e].double(), moe.w_out[e].double()) for e in (i, j))
        y_a, y_b = (tokens @ in_a).relu() @ out_a, (tokens @ in_b).relu() @ out_b
        difference = ((in_a - in_b).square().sum() + (out_a - out_b).square().sum()).sqrt()
        mean = ((in_a + in_b).square().sum() + (out_a + out_b).square().sum()).sqrt() / 2
        exchanged = copy.deepcopy(self.model)
        for weight in (exchanged.layers[block].w_in, exchanged.layers[block].w_out):
            weight.data[[i, j]] = weight.data[[j, i]]
        losses = [F.cross_entropy(m(self.examples.x).logits[0], self.examples.y) for m in (exchanged, self.model)]
        return {
            "smaller_share": min(counts) / sum(counts),
            "weight_distance": (difference / mean).item(),
            "output_distance": ((y_a - y_b).norm() / ((y_a + y_b) / 2).norm()).item(),
            "swap_loss": (losses[0] - losses[1]).item() * len(self.examples) / len(tokens),
        }


@pytest.fixture(params=["mlp", "conv"])
def study(request: pytest.FixtureRequest, gate: Examples) -> Study:
    model, _ = random_model(0, stem=request.param)
    for moe in model.layers:
        moe.selection_bias.zero_()
    return Study(model.float(), gate)


@pytest.mark.parametrize("block", [0, 1])
def test_right_after_a_split_the_halves_are_equal_and_shares_are_counted(block: int, study: Study) -> None:
    new = study.split(2, block, share=0.8)
    found = study.measured(new, block)
    assert found["weight_distance"] == found["output_distance"] == 0 and abs(found["swap_loss"]) < 1e-5
    counts = [len(study.reaching({expert}, block)) for expert in (2, new)]
    assert found["smaller_share"] == min(counts) / sum(counts) and 0.15 < found["smaller_share"] < 0.25


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("changed", [2, 5])
def test_the_measures_of_unequal_halves_equal_those_by_hand(changed: int, block: int, study: Study) -> None:
    assert study.split(2, block) == 5
    study.change(changed, block)
    with unchanged(study.model):
        found = study.measured(5, block)
    assert found == pytest.approx(study.by_hand(2, 5, ({2}, {5}), block), rel=1e-3, abs=1e-6)
    assert min(abs(found[measure]) for measure in MEASURES) > 1e-4


def test_nested_splits_are_measured_each_at_its_own_hyperplane_and_tokens(study: Study) -> None:
    for expert in (2, 5, 2, 2):
        study.split(expert)  # to ((2 | 8) | 7) | (5 | 6)
    for expert in (2, 5, 6, 7, 8):
        study.change(expert)
    pairs = {(2, 5): ({2, 7, 8}, {5, 6}), (5, 6): ({5}, {6}), (2, 7): ({2, 8}, {7}), (2, 8): ({2}, {8})}
    with unchanged(study.model):
        assert study.table()[["parent", "expert"]].values.tolist() == [list(pair) for pair in pairs]
    for (a, b), sides in pairs.items():
        assert study.measured(b) == pytest.approx(study.by_hand(a, b, sides), rel=1e-3, abs=1e-6)


def test_a_row_names_its_split_and_other_operations_have_none(study: Study) -> None:
    moe = study.model.layers[1]
    study.split(1, block=0)
    study.note("clone", ExpertManager(moe).clone(3).expert, 3, block=1)
    study.note("reinit", ExpertManager(moe).reinit().expert, None, block=1)
    new = study.split(3, block=1)
    table = study.table()
    assert table.columns.tolist() == split_halves.HALVES_COLUMNS
    assert table[["block", "expert", "parent", "step"]].values.tolist() == [[0, 5, 1, 0], [1, new, 3, 12]]


@pytest.mark.parametrize("gone", [2, 5])
def test_a_split_one_half_of_which_is_gone_has_no_row(gone: int, study: Study) -> None:
    study.split(2)
    study.split(4)
    ExpertManager(study.model.layers[0]).remove(gone)
    study.note("remove", gone, None)
    assert study.table()["expert"].tolist() == [6]


@pytest.mark.parametrize("side", [2, 5])
def test_a_split_keeps_its_row_when_one_below_it_is_merged_or_removed(side: int, study: Study) -> None:
    study.split(2)
    study.split(side)  # 2 | (5 | 6), or (2 | 6) | 5
    manager = ExpertManager(study.model.layers[0])
    manager.merge(6, into=5, share=0.5) if side == 5 else manager.remove(6)
    study.change(side)
    assert study.table()["expert"].tolist() == [5]
    assert study.measured(5) == pytest.approx(study.by_hand(2, 5, ({2}, {5})), rel=1e-3, abs=1e-6)


def test_halves_without_any_token_are_measured_too(study: Study) -> None:
    study.split(2)
    study.change(5)
    study.model.layers[0].selection_bias[:, 2] = -1e3
    found = study.measured(5)
    assert found["smaller_share"] == found["output_distance"] == found["swap_loss"] == 0 < found["weight_distance"]


def test_only_the_first_examples_count(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.split(2)
    study.change(5)
    whole = study.table()
    monkeypatch.setattr(split_halves, "EVALUATION_BATCH", 50)
    first = study.table()
    study.examples = Examples(study.examples.x[:50], study.examples.y[:50])
    pd.testing.assert_frame_equal(first, study.table(), check_exact=True)
    assert not first.equals(whole)


def test_the_columns_hold_where_there_is_nothing_to_measure(study: Study) -> None:
    log = pd.DataFrame([{"operation": "split", "block": 0, "expert": 5, "parent": 2, "step": 4}])
    reference = Reference(ReferenceSpec((1, 8), 4, (), None))
    gone = split_halves.split_halves(study.model, log, study.examples)  # the checkpoint has no such expert
    for table in (study.table(), gone, split_halves.split_halves(reference, log, study.examples)):
        assert (table.empty, table.columns.tolist()) == (True, split_halves.HALVES_COLUMNS)
