"""A parameter that can't be right is refused with its key, its value and what would be right."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from phasegate.base import memory
from phasegate.base.errors import UserError
from phasegate.model.classifier import Model, ModelSpec, Network
from phasegate.model.references import ReferenceSpec, build
from phasegate.params import Params, check, load_params
from phasegate.params.fields import Seeds, parse
from phasegate.training.batches import AT_ONCE
from stages import check as check_stage
from tests.damage import BOMBS, put
from tests.small_study import ROOT

PATH = ROOT / "params.yaml"
ALL = "p7b1, p7b2, p7b3, p7b4, surgery, p7c1, p7c2, p7c3"
SHAM = "p7c3: controls names 'shm', no arm: did you mean sham?"


def test_the_committed_parameters_are_right() -> None:
    assert load_params(PATH).seeds.count >= 1


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("seeds.count", 0, "seeds.count is 0: input should be greater than or equal to 1"),
        ("seeds.count", 1, "seeds.count is 1: 7b.4's control head learns from other seeds, so it must be at least 2"),
        ("seeds.first", True, "seeds.first is True: input should be a valid integer"),
        ("training.lr", float("nan"), "training.lr is nan"),
        ("data.name", "npz", "path is data/none, but data set npz is read from a file: give its path"),
        ("data.path", "data/raw/x.npz", "path is data/raw/x.npz, but data set mnist1d needs none: set it to data/none"),
        ("data.layout", "channel_last", "data.layout is 'channel_last': did you mean channels_last?"),
        ("training.warmup", 3000, "warmup is 3000: it must be less than steps = 3000"),
        ("model.top_k", 13, "top_k is 13: it must be at most n_routed = 12"),
        ("p7a.n_routed", 13, "p7a.n_routed is 13, but no candidate of q2 has that many: add one"),
        ("p7b.settle", 600, "act_every + settle is 640: it must be at most steps = 600"),
        ("p7b.split_direction", "best", "p7b.split_direction is 'best'"),
        ("p7b.sibling_balance", -1, "p7b.sibling_balance is -1"),
        ("p7b.min_experts", 21, "min_experts is 21: it must be at most max_experts = 20"),
        ("p7b.min_experts", 13, "p7b.min_experts + surgery.operations / 2 is 17: it must be at most p7a.n_routed = 12"),
        ("p7b.min_experts", 9, "p7b.min_experts + surgery.operations / 2 is 13: it must be at most p7a.n_routed = 12"),
        ("q2.candidates.top_1.top_k", 12, "q2.candidates.top_1 has top_k = n_routed = 12 = p7a.n_routed: no expert"),
        ("decisions.phases.p7b2.claim", "harmles", "decisions.phases.p7b2.claim is 'harmles': did you mean harmless?"),
        ("decisions.phases.p7b2.assay.better", "continue", "p7b2.assay.better is 'continue': string should match"),
        ("decisions.margin", -0.1, "decisions.margin is -0.1: input should be greater than or equal to 0"),
        ("decisions.phases.p7b2.hypothesis", " \n\x1c", "decisions.phases.p7b2.hypothesis: it is blank: state it"),
        ("plugins.hypothesis", "\u200d\u2060\xa0\u3164", "plugins.hypothesis: it is blank: state it before the"),
        ("plugins.hypothesis", "", "plugins.hypothesis: it is blank: state it before the phase runs"),
        ("plugins.hypothesis", "a\x1b[2J", "hypothesis: 'a\\x1b[2J' has the control character \\x1b: leave it out"),
        ("plugins.hypothesis", "a\x85b", "hypothesis: 'a\\x85b' has the control character \\x85: leave it out"),
        ("plugins.hypothesis", "a\u202eb\x9b", "hypothesis: 'a\\u202eb\\x9b' has the control character \\u202e"),
        ("plugins.hypothesis", "a\ud800", "hypothesis: 'a\\ud800' has the control character \\ud800: leave it out"),
        ("p7b.cooldown", 200, "p7b.cooldown is 200: it must be at most p7b.act_every * surgery.operations / 2 = 160"),
        ("surgery.operations", 3, "surgery.operations is 3: input should be a multiple of 2"),
        ("surgery.operations", 12, "is 12: it must be at most (p7b.steps - p7b.settle) / p7b.act_every = 11"),
        ("p7b.max_experts", 19, "n_routed + surgery.operations is 20: it must be at most p7b.max_experts = 19"),
        ("p7b1.grow", 0.9, "grow + prune is 1.1: it must be at most 1"),
        ("p7b2.labels.grow_below", 2, "grow_below is 2.0: it must be at most prune_above = 1.03"),
        ("p7b4.recovery_steps", 161, "p7b4.recovery_steps is 161: it must be at most p7b.settle = 160"),
        ("p7b4.surveys", 4, "(p7b4.surveys - 1) + p7b4.recovery_steps is 1360: it must be at most p7b.steps = 600"),
        ("p7b.steps", 1200, "is 440, the step of the last survey: it must be at least 1040, the step of the last"),
        ("p7b4.survey_every", 439, "(p7b4.surveys - 1) is 439, the step of the last survey: it must be at least 440"),
        ("p7c1.early", 301, "p7c1: early is 301: it must be at most at = 300"),
        ("p7c1.late", 299, "p7c1: at is 300: it must be at most late = 299"),
        ("p7c1.late", 1201, "p7c1.late is 1201: it must be at most p7c.steps - p7c.settle = 1200"),
        ("p7c2.at", 1201, "p7c2.at is 1201: it must be at most p7c.steps - p7c.settle = 1200"),
        ("p7c.settle", 0, "p7c.settle is 0: input should be greater than or equal to 1"),
        ("training.warmup", 1400, "training.warmup + 101 is 1501: it must be at most p7c.steps = 1500, else the"),
        ("q1.candidates.fast.warmup", 1400, "q1.candidates.fast.warmup + 101 is 1501: it must be at most p7c.steps"),
        ("p7c.rates", [1, 2, 1.0000001], "p7c: rates has 1 twice: rates must differ in their first six digits"),
        ("p7c3.dead", 7, "p7c3.dead + p7b.min_experts is 13: it must be at most p7a.n_routed = 12"),
        ("p7c.small", 24, "p7c: small is 24: it must be below large = 24"),
        ("p7c.top_k", 5, "p7c: top_k is 5: it must be at most small = 4"),
        ("p7b4.repeats", 1, "p7b4.repeats is 1: input should be greater than or equal to 2"),
        ("p7b4.certainty", 0.5, "p7b4.certainty is 0.5: input should be greater than 0.5"),
        ("p7b4.usage.grow_above", 0.5, "prune_below is 0.7: it must be at most grow_above = 0.5"),
        ("decisions.phases.p7b2.primary", "splt", "p7b2: primary is 'splt', no arm: did you mean split?"),
        ("decisions.phases", {}, f"decisions: phases lacks p7b1: it must have just {ALL}"),
        ("p7b2", 3, "p7b2 is 3: it must hold names with values, or be {}"),
        ("decisions.phases.p7c3.controls", {"shm": "p7a/continue"}, SHAM),
        ("p7b.act_evry", 3, "p7b.act_evry is not a parameter; did you mean act_every?"),
        ("references.mnist1d.mlp.lrr", 1, "references.mnist1d.mlp.lrr is not a parameter; did you mean lr?"),
        ("p7b.eval_every", 601, "eval_every is 601: it must be at most steps = 600"),
        ("data.name", "mnst1d", "data.name is 'mnst1d': did you mean mnist1d?"),
        ("data.name", "imagenet", "'imagenet': it must be one of mnist1d, fashion_mnist, cifar10, cifar100, npz"),
        ("model.stem", 7, "model.stem is 7: it must be one of mlp, conv"),
        ("plugins.arms", {"a": {"signal": "weight_norm"}}, "plugins.arms.a: signal is 'weight_norm', the name of a"),
        ("plugins.arms", {"a": {"signal": "counterfactual_head"}}, "the file plugins/counterfactual_head.py another"),
        ("plugins.arms", {"a": {"signal": "measured_change"}}, "give the file plugins/measured_change.py another"),
        ("headline.arm", "prmary", "arm is 'prmary', no arm of p7b2: did you mean primary?"),
        ("training.steps", 10**12, "training.steps is 1000000000000: input should be less than or equal to"),
        ("model.width", 10**5, "model.width is 100000: input should be less than or equal to 65536"),
        ("seeds.count", 10**5, "seeds.count is 100000: input should be less than or equal to 10000"),
        ("seeds.first", "x" * 10**6, "seeds.first is 'xxxxx"),
        ("training.lr", 10**400, "training.lr is 1000"),
        ("decisions.phases.p7b2.primary", "x" * 10**6, "p7b2.primary is 'xxxxx"),
        ("training.lr", 1 << 20_000, "training.lr is a number of 20,001 bits: "),
        ("model.stem", 1 << 20_000, "model.stem is a number of 20,001 bits: it must be one of mlp, conv"),
        ("training.lr", [[1] * 10**4] * 10**4, "training.lr is [[1, 1, 1"),
    ],
    ids=lambda value: value[:80] if isinstance(value, str) else "",  # Python writes no number of 20,000 bits
)
def test_what_cannot_be_right_is_refused_in_one_sentence(key: str, value: Any, sentence: str) -> None:
    values = yaml.safe_load(PATH.read_text())
    put(values, key, value)
    with pytest.raises(UserError) as error:
        parse(Params, values)
    assert sentence in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is None: it must hold names"),
        (b"- 1", "the file is [1]: it must hold names"),
        (b"seeds: [", "is not valid YAML: while parsing"),
        (b"\xff\xfe\x00seeds", "the file is '"),
        (b"seeds: \xc3", "is not valid YAML"),
        (b"seeds: 2026-13-45", "line 1: seeds is 2026-13-45, which is read as a date: no parameter is one; write "),
        (b"seeds: !!bool perhaps", "is not valid YAML: 'perhaps'"),
        (b"seeds: !!timestamp x", "line 1: seeds is x, which is read as a date"),
        (b"seeds: !!python/object/apply:os.system ['touch harmed']", "is not valid YAML: could not determine"),
        (b"? [1]\n: 2", "is not valid YAML"),
        (b"[" * 100_000, "is not valid YAML"),
        (BOMBS[0].encode(), "has more than 100,000 values"),
        (BOMBS[2].encode(), "is not valid YAML: it merges more than 100,000 values"),
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
    files = {"params.yaml": "seeds is missing", "reports/params.yaml": "reports/params.yaml: seeds is"}
    for path, sentence in files.items():
        Path(path).write_text("data: {}")
        with pytest.raises(UserError, match=f"^{sentence}"):
            load_params(Path(path))


def test_a_hypothesis_may_have_no_break_spaces_and_joined_emoji() -> None:
    values = yaml.safe_load(PATH.read_text())
    for text in ("Croître coûte\xa0:\u202f2\xa0%.", "It \N{WOMAN}\u200d\N{PERSONAL COMPUTER} grows."):
        put(values, "decisions.phases.p7b2.hypothesis", text)
        assert parse(Params, values).decisions.phases["p7b2"].hypothesis == text


def test_a_course_too_short_for_a_birth_is_refused() -> None:
    values = yaml.safe_load(PATH.read_text())
    values["p7c"] |= {"steps": 700, "settle": 1}
    parse(Params, values)
    values["p7c1"]["at"] = 600
    with pytest.raises(UserError, match=r"^p7c1.at \+ 101 is 701: it must be at most p7c.steps = 700$"):
        parse(Params, values)


def test_a_model_that_cannot_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "memory", lambda: 24 << 30)
    values = yaml.safe_load(PATH.read_text())
    check.refuse_too_large(parse(Params, values))
    values["q2"]["candidates"]["few"] |= {"expert_width": 60_000, "width": 60_000}
    with pytest.raises(UserError, match=r"^q2.candidates.few.n_routed = 6, q2.candidates.few: .* needs 643.7 GiB"):
        check_stage.main(parse(Params, values))
    values["q2"]["candidates"] = {}
    grown = check.model_weights(parse(Params, values).model, values["p7b"]["max_experts"], (1, 1), 2)
    with monkeypatch.context() as patch:
        patch.setattr(check, "memory", lambda: 16 * grown - 1)
        with pytest.raises(UserError, match=r"^p7b.max_experts = 20, model: "):
            check.refuse_too_large(parse(Params, values))
        patch.setattr(check, "memory", lambda: 16 * grown)
        check.refuse_too_large(parse(Params, values))
        with pytest.raises(UserError, match=r"^references.mnist1d.mlp: "):  # of data with large examples
            check.refuse_too_large(parse(Params, values), (3, 100, 100), 10)
        larger = values | {"p7c": values["p7c"] | {"large": 60}}
        with pytest.raises(UserError, match=r"^p7c.small \+ p7c.large = 64: "):
            check.refuse_too_large(parse(Params, larger))
    values["q1"]["candidates"]["fast"] |= {"batch": 10_000}
    check.refuse_too_large(parse(Params, values), (3, 100, 100), 10, 1000)
    with pytest.raises(UserError, match=r"^q1.candidates.fast.batch is 10000: a trial needs 44.7 GiB for batches and"):
        check.refuse_too_large(parse(Params, values), (3, 100, 100), 10, 20_000)
    values["references"]["mnist1d"]["mlp"]["hidden"] = [65_536] * 3
    with pytest.raises(UserError, match=r"^references.mnist1d.mlp: a single trial of this model needs 128.0 GiB"):
        check.refuse_too_large(parse(Params, values))
    values = yaml.safe_load(PATH.read_text())
    values["surgery"]["in_a_row"] = 10_000_000
    with pytest.raises(UserError, match=r"^p7a.n_routed \+ surgery.in_a_row = 10000012, model: a single trial"):
        check.refuse_too_large(parse(Params, values))


@pytest.mark.parametrize("shape", [(1, 40), (3, 32, 32), (20, 1)])
def test_the_estimate_of_memory_counts_the_weights_of_every_model(shape: tuple[int, ...]) -> None:
    params = load_params(PATH)
    for model in (model for models in params.references.values() for model in models.values()):
        real = build(ReferenceSpec(shape, 10, model.hidden, model.channels))
        assert check.reference_weights(model, shape, 10) == pytest.approx(weights(real), rel=0.2)
    for architecture in params.architectures().values():
        for stem in ("mlp", "conv"):
            changed = architecture.model_copy(update={"stem": stem, "blocks": 2})
            real = build(ModelSpec(changed, shape, (10, 10)))
            assert check.model_weights(changed, changed.n_routed, shape, 10) == pytest.approx(weights(real), rel=0.05)


@pytest.mark.parametrize("stem", ["mlp", "conv"])
def test_the_estimate_of_memory_counts_batches_and_activations(stem: str) -> None:
    assert 2 * AT_ONCE == check.DRAWN
    changed = load_params(PATH).model.model_copy(update={"stem": stem, "blocks": 2})
    x, model, kept = torch.zeros(512, 3, 16, 16), Model(ModelSpec(changed, (3, 16, 16), (10,))), dict[int, int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        model(x)
    others = {tensor.data_ptr() for tensor in (x, *model.parameters())}
    numbers = sum(count for place, count in kept.items() if place not in others)
    assert 0.5 < 512 * check.activations(changed, (3, 16, 16)) / numbers < 2


def weights(model: Network) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_limit_of_a_container_or_a_shell_counts_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = memory.memory()
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "memory.max")
    assert memory.memory() >= physical
    for text, expected in (("max", memory.memory()), ("1000000", 1_000_000)):
        (tmp_path / "memory.max").write_text(f"{text}\n")
        assert memory.memory() == expected
    monkeypatch.setattr("resource.getrlimit", lambda _: (999_999, -1))
    assert memory.memory() == 999_999


def test_assays_and_controls_are_arms_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for changed, key in (
        ({"control": "p7c3/leve"}, "control is 'p7c3/leve', which no phase runs: did you mean p7c3/leave"),
        ({"controls": {"sham": "p7a/contine"}}, "controls.sham is 'p7a/contine', which no phase runs: did you mean"),
        ({"assay": {"better": "p7c3/removd", "worse": "p7c3/leave", "margin_pp": 0}}, "assay.better is 'p7c3/removd'"),
    ):
        values = yaml.safe_load(PATH.read_text())
        values["decisions"]["phases"]["p7c3"] |= changed
        with pytest.raises(UserError, match=f"^decisions.phases.p7c3.{key}"):
            check_stage.main(Params.model_validate(values))


@pytest.mark.parametrize(
    ("first", "shared"), [(391, "q1.seeds has 400"), (409, "q1.seeds has 409"), (411, "p7c.seeds has 420")]
)
def test_no_search_may_choose_by_the_seeds_of_verdicts(first: int, shared: str) -> None:
    params = load_params(PATH).model_copy(update={"seeds": Seeds(first=first, count=10)})
    with pytest.raises(UserError, match=f"^{shared}, which `seeds` has too: no search may choose by"):
        check_stage.main(params)
