"""Halves of a split are compared as one would by hand, and the model is left as it was."""

import copy
from collections.abc import Set
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate import halves as module
from phasegate.expert_manager import ExpertManager
from phasegate.halves import HALVES_COLUMNS, halves
from phasegate.hyperplanes import halve, random_direction
from phasegate.logs import SURGERY_COLUMNS
from phasegate.model import Model, ModelSpec
from phasegate.pretraining_params import Architecture
from phasegate.references import Reference, ReferenceSpec
from phasegate.sections import override
from phasegate.training import Examples, predict

MEASURES = ["smaller_share", "weight_distance", "output_distance", "swap_loss"]


class Study:
    """A model whose experts can be split, with the log of that."""

    def __init__(self, model: Model, examples: Examples) -> None:
        self.model, self.examples = model, examples
        self.rows: list[dict[str, object]] = []

    def split(self, expert: int, block: int = 0, share: float = 0.7) -> int:
        """Split along a random direction, with that share of the expert's tokens on the old side."""
        moe, routing = self.model.layers[block], predict(self.model, self.examples.x)[0].routings[block]
        tokens = routing.tokens[0][(moe.expert_id[routing.experts[0]] == expert).any(-1)]
        direction = random_direction(16, torch.Generator().manual_seed(len(self.rows)))
        surgery = ExpertManager(moe).split(expert, direction, -float((tokens @ direction).quantile(share)))
        self.note("split", surgery.expert, expert, block)
        return surgery.expert

    def note(self, operation: str, expert: int, parent: int | None, block: int = 0) -> None:
        self.rows.append({
            "step": 4 * len(self.rows), "block": block, "operation": operation, "expert": expert, "parent": parent,
        })  # fmt: skip

    def change(self, expert: int, block: int = 0) -> None:
        """Let an expert come to differ from its sibling."""
        moe = self.model.layers[block]
        draws = torch.Generator().manual_seed(expert)
        for weight in (moe.w_in, moe.w_out):
            weight.data[self.index(expert, block)] += 0.3 * torch.randn(weight.shape[1:], generator=draws)

    def index(self, expert: int, block: int) -> int:
        return self.model.layers[block].expert_id.tolist().index(expert)

    def table(self) -> pd.DataFrame:
        return halves(self.model, pd.DataFrame(self.rows, columns=SURGERY_COLUMNS), self.examples)

    def measured(self, expert: int, block: int = 0) -> dict[str, float]:
        """The row of the split that made an expert."""
        table = self.table()
        (row,) = table[(table["expert"] == expert) & (table["block"] == block)][MEASURES].to_dict("records")
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
def study(request: pytest.FixtureRequest, architecture: Architecture, gate: Examples) -> Study:
    torch.manual_seed(0)
    changed = override(architecture, {"stem": request.param}, "")
    return Study(Model(ModelSpec(changed, (1, 8), (4,))).eval(), gate)


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
    found = study.measured(5, block)
    assert found == pytest.approx(study.by_hand(2, 5, ({2}, {5}), block), rel=1e-3, abs=1e-6)
    assert min(abs(found[measure]) for measure in MEASURES) > 1e-4


def test_nested_splits_are_measured_each_at_its_own_hyperplane_and_tokens(study: Study) -> None:
    study.split(2)  # 2 | 5
    study.split(5)  # 2 | (5 | 6)
    study.split(2)  # (2 | 7) | (5 | 6)
    study.split(2)  # ((2 | 8) | 7) | (5 | 6)
    for expert in (2, 5, 6, 7, 8):
        study.change(expert)
    pairs = {
        (2, 5): ({2, 7, 8}, {5, 6}),
        (5, 6): ({5}, {6}),
        (2, 7): ({2, 8}, {7}),
        (2, 8): ({2}, {8}),
    }
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
    assert table.columns.tolist() == HALVES_COLUMNS
    assert table[["block", "expert", "parent", "step"]].values.tolist() == [[0, 5, 1, 0], [1, new, 3, 12]]


@pytest.mark.parametrize("gone", [2, 5])
def test_a_split_one_half_of_which_is_gone_has_no_row(gone: int, study: Study) -> None:
    study.split(2)
    study.split(4)
    ExpertManager(study.model.layers[0]).remove(gone)
    study.note("remove", gone, None)
    assert study.table()["expert"].tolist() == [6]


def test_merged_halves_have_no_row_and_the_split_above_them_keeps_its_own(study: Study) -> None:
    study.split(2)
    study.split(5)
    ExpertManager(study.model.layers[0]).merge(6, into=5, share=0.5)
    study.note("merge", 6, 5)
    study.change(5)
    assert study.table()["expert"].tolist() == [5]
    assert study.measured(5) == pytest.approx(study.by_hand(2, 5, ({2}, {5})), rel=1e-3, abs=1e-6)


def test_a_side_may_be_removed_below_a_split_that_stays(study: Study) -> None:
    study.split(2)
    study.split(2)  # (2 | 6) | 5
    ExpertManager(study.model.layers[0]).remove(6)
    study.change(2)
    assert study.table()["expert"].tolist() == [5]
    assert study.measured(5) == pytest.approx(study.by_hand(2, 5, ({2}, {5})), rel=1e-3, abs=1e-6)


def test_halves_without_any_token_are_measured_too(study: Study) -> None:
    study.split(2)
    study.change(5)
    study.model.layers[0].selection_bias[:, 2] = -1e3
    found = study.measured(5)
    assert found["smaller_share"] == found["output_distance"] == found["swap_loss"] == 0 < found["weight_distance"]


def test_the_model_is_bitwise_as_it_was(study: Study) -> None:
    for expert, block in ((2, 0), (5, 0), (1, 1)):
        study.split(expert, block)
        study.change(expert, block)
    before = {name: value.clone() for name, value in study.model.state_dict().items()}
    tables = [(moe._root.tolist(), moe._child.tolist(), moe._depth) for moe in study.model.layers]
    objects, random = [id(parameter) for parameter in study.model.parameters()], torch.get_rng_state()
    assert len(study.table()) == 3
    after = study.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert tables == [(moe._root.tolist(), moe._child.tolist(), moe._depth) for moe in study.model.layers]
    assert objects == [id(parameter) for parameter in study.model.parameters()]
    assert torch.equal(random, torch.get_rng_state())


def test_only_the_first_examples_count(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.split(2)
    study.change(5)
    whole = study.table()
    monkeypatch.setattr(module, "EVALUATION_BATCH", 50)
    first = study.table()
    study.examples = Examples(study.examples.x[:50], study.examples.y[:50])
    pd.testing.assert_frame_equal(first, study.table(), check_exact=True)
    assert not first.equals(whole)


def test_a_log_read_from_a_file_gives_the_same(study: Study, tmp_path: Path) -> None:
    study.split(2)
    ExpertManager(study.model.layers[0]).remove(0)
    study.note("remove", 0, None)
    log = pd.DataFrame(study.rows, columns=SURGERY_COLUMNS)
    log.to_csv(tmp_path / "log.csv", index=False)
    read = halves(study.model, pd.read_csv(tmp_path / "log.csv"), study.examples)
    pd.testing.assert_frame_equal(read, study.table(), check_dtype=False)
    assert len(read) == 1


def test_the_columns_hold_where_there_is_nothing_to_measure(study: Study) -> None:
    log = pd.DataFrame([{"operation": "split", "block": 0, "expert": 5, "parent": 2, "step": 4}])
    reference = Reference(ReferenceSpec((1, 8), 4, (), None))
    empty = [study.table(), halves(study.model, log[:0], study.examples), halves(reference, log, study.examples)]
    gone = halves(study.model, log, study.examples)  # the checkpoint has no such expert
    for table in (*empty, gone):
        assert table.empty and table.columns.tolist() == HALVES_COLUMNS


def test_splits_that_halve_have_even_shares(study: Study) -> None:
    moe, routing = study.model.layers[0], predict(study.model, study.examples.x)[0].routings[0]
    tokens = routing.tokens[0][(routing.experts[0] == 2).any(-1)]
    ExpertManager(moe).split(2, *halve(tokens, random_direction(16, torch.Generator().manual_seed(0))))
    study.note("split", 5, 2)
    assert study.measured(5)["smaller_share"] == len(tokens) // 2 / len(tokens)
