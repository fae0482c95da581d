"""A parameter that can't be right is refused with its key, its value and what would be right."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from phasegate import memory
from phasegate.errors import UserError
from phasegate.params import Params, load_params
from phasegate.sections import parse

PATH = Path(__file__).parents[1] / "params.yaml"


def refused(**changes: Any) -> str:
    """The sentence with which params.yaml is refused under changes, keyed by dotted path with __ for the dot."""
    values = yaml.safe_load(PATH.read_text())
    for key, value in changes.items():
        *path, name = key.split("__")
        section = values
        for part in path:
            section = section[part]
        section[name] = value
    with pytest.raises(UserError) as error:
        parse(Params, values)
    return str(error.value)


def test_the_committed_parameters_are_right() -> None:
    assert load_params(PATH).seeds >= 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": 0}, "seeds is 0: input should be greater than or equal to 1"),
        ({"seeds": 1}, "seeds is 1: 7b.4's control head learns from the other seeds, so it must be at least 2"),
        ({"seeds": True}, "seeds is True: input should be a valid integer"),
        ({"training__lr": float("nan")}, "training.lr is nan"),
        ({"training__warmup": 3000}, "warmup is 3000: it must be less than steps = 3000"),
        ({"model__top_k": 13}, "top_k is 13: it must be at most n_routed = 12"),
        ({"p7a__n_routed": 13}, "p7a.n_routed is 13, but no candidate of q2 has that many experts"),
        ({"p7b__settle": 600}, "act_every + settle is 640: it must be at most steps = 600"),
        ({"p7b__split_direction": "best"}, "p7b.split_direction is 'best'"),
        ({"p7b__hyperplanes": "free"}, "p7b.hyperplanes is 'free'"),
        ({"p7b__sibling_balance": -1}, "p7b.sibling_balance is -1"),
        ({"p7b__min_experts": 13}, "p7b.min_experts is 13: p7a.n_routed = 12 is below it"),
        ({"p7b__cooldown": 200}, "p7b.cooldown is 200: it must be at most 160"),
        ({"surgery__operations": 3}, "surgery.operations is 3: input should be a multiple of 2"),
        ({"surgery__operations": 12}, "surgery.operations is 12, but p7b has time for 11"),
        ({"p7b__max_experts": 19}, "added to p7a.n_routed = 12 it must be at most p7b.max_experts = 19"),
        ({"p7b1__grow": 0.9}, "grow + prune is 1.1: it must be at most 1"),
        ({"p7b2__labels__grow_below": 2}, "grow_below is 2.0: it must be at most prune_above = 1.03"),
        ({"p7b4__recovery_steps": 161}, "p7b4.recovery_steps is 161: it must be at most p7b.settle = 160"),
        ({"p7b4__surveys": 4}, "the last of p7b4.surveys = 4, one every survey_every = 440, is at step 1320"),
        (
            {"p7b__steps": 1200},
            "survey_every is 440: the last of surveys = 2 is at step 440, before p7b's last decision",
        ),
        ({"p7b__steps": 1200}, "at step 1040, and heads know no later times: it must be at least 1040"),
        ({"p7b4__survey_every": 439}, "p7b4.survey_every is 439: the last of surveys = 2 is at step 439, before"),
        ({"p7b4__surveys": 3, "p7b4__survey_every": 219}, "is at step 438, before p7b's last decision at step 440"),
        ({"p7b4__surveys": 3, "p7b4__survey_every": 219}, "heads know no later times: it must be at least 220"),
        ({"p7b4__surveys": 1}, "heads know no later times: surveys must be at least 2"),
        ({"p7b4__repeats": 1}, "p7b4.repeats is 1: input should be greater than or equal to 2"),
        ({"p7b4__usage__grow_above": 0.5}, "prune_below is 0.7: it must be at most grow_above = 0.5"),
        ({"decisions__phases__p7b2__primary": "splt"}, "the primary arm of p7b2 is 'splt': did you mean split?"),
        ({"p7b__act_evry": 3}, "p7b.act_evry is not a parameter; did you mean act_every?"),
        ({"references__mnist1d__mlp__lrr": 1}, "references.mnist1d.mlp.lrr is not a parameter; did you mean lr?"),
        ({"p7b__eval_every": 601}, "eval_every is 601: it must be at most steps = 600"),
        ({"data__name": "mnst1d"}, "data.name is 'mnst1d': did you mean mnist1d?"),
        ({"data__name": "imagenet"}, "'imagenet': it must be one of mnist1d, fashion_mnist, cifar10, cifar100, npz"),
        ({"model__stem": 7}, "model.stem is 7: it must be one of mlp, conv"),
        ({"own__arms": {"a": {"signal": "weight_norm"}}}, "own.arms.a: signal is 'weight_norm', the name of a"),
        ({"own__arms": {"a": {"signal": "counterfactual_head"}}}, "the file plugins/counterfactual_head.py another"),
        ({"own__arms": {"a": {"signal": "measured_change"}}}, "give the file plugins/measured_change.py another"),
        ({"headline__arm": "prmary"}, "arm is 'prmary', no arm of p7b2: did you mean primary?"),
        ({"training__steps": 10**12}, "training.steps is 1000000000000: input should be less than or equal to"),
        ({"model__width": 10**5}, "model.width is 100000: input should be less than or equal to 65536"),
        ({"seeds": 10**5}, "seeds is 100000: input should be less than or equal to 10000"),
        ({"seeds": "x" * 10**6}, "seeds is 'xxxxx"),
        ({"training__lr": 10**400}, "training.lr is 1000"),
        ({"training__lr": 1 << 20_000}, "training.lr is a number of 20,001 bits: "),
        ({"model__stem": 1 << 20_000}, "model.stem is a number of 20,001 bits: it must be one of mlp, conv"),
        ({"training__lr": [[1] * 10**4] * 10**4}, "training.lr is [[1, 1, 1"),
    ],
)
def test_what_can_not_be_right_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    found = refused(**changes)
    assert sentence in found and "\n" not in found and len(found) < 300


DEEP, DATE = "[" * 100_000, "seeds: 2026-13-45"
BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = BOMB.replace("[1,1,1,1,1,1,1,1,1,1]", "{x: 1}").replace("[", "{<<: [").replace("]", "]}")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is None: input should be"),
        (b"- 1", "the file is [1]: input should be"),
        (b"seeds: [", "is not valid YAML: while parsing"),
        (b"\xff\xfe\x00seeds", "the file is '"),
        (b"seeds: \xc3", "is not valid YAML"),
        (b"\x00", "is not valid YAML"),
        (DATE.encode(), "is not valid YAML: month must be in 1..12"),
        (b"seeds: !!bool perhaps", "is not valid YAML: 'perhaps'"),
        (b"seeds: !!timestamp x", "is not valid YAML"),
        (b"seeds: !!int x", "is not valid YAML"),
        (b"seeds: !!python/object/apply:os.system ['touch harmed']", "is not valid YAML: could not determine"),
        (b"? [1]\n: 2", "is not valid YAML"),
        (DEEP.encode(), "is not valid YAML"),
        (BOMB.encode(), "has more than 100,000 values"),
        (MERGES.encode(), "is not valid YAML: it merges more than 100,000 values"),
        (b"a: &a [*a]", "has more than 100,000 values"),
        (b"#" * (1 << 20) + b"\nseeds: 1", "has more than 1,048,576 bytes"),
        (None, "can't be read: it is no regular file"),
    ],
)
def test_a_file_that_holds_no_parameters_is_refused_in_one_sentence(
    tmp_path: Path, content: bytes | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_params(path)
    assert sentence in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
    assert [other.name for other in tmp_path.iterdir()] == ["params.yaml"]


def test_a_file_other_than_the_studys_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    for path, sentence in (
        ("params.yaml", "seeds is missing"),
        ("reports/params.yaml", "reports/params.yaml: seeds is"),
    ):
        Path(path).write_text("data: {}")
        with pytest.raises(UserError, match=f"^{sentence}"):
            load_params(Path(path))


def test_a_model_that_can_not_fit_into_memory_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = yaml.safe_load(PATH.read_text())
    memory.refuse_too_large(parse(Params, values))
    values["q2"]["candidates"]["few"]["expert_width"] = 60_000
    values["q2"]["candidates"]["few"]["width"] = 60_000
    with pytest.raises(UserError, match=r"^q2.candidates.few.n_routed is 6: .* needs 643.7 GiB"):
        memory.refuse_too_large(parse(Params, values))
    values["q2"]["candidates"] = {}
    grown = memory.training_bytes(parse(Params, values).model, values["p7b"]["max_experts"])
    monkeypatch.setattr(memory, "memory", lambda: grown - 1)
    with pytest.raises(UserError, match=r"^p7b.max_experts is 20: "):
        memory.refuse_too_large(parse(Params, values))


def test_the_limit_of_a_container_counts_as_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = memory.memory()
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "memory.max")
    assert memory.memory() >= physical
    for text, expected in (("max", memory.memory()), ("1000000", 1_000_000)):
        (tmp_path / "memory.max").write_text(f"{text}\n")
        assert memory.memory() == expected
