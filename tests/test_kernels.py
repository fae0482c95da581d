"""Compiled kernels give the same bits in any company and on any width of vectors, and they are what torch computes."""

import copy
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from phasegate.model.classifier import Model, ModelSpec, Network
from phasegate.model.kernels import compiled
from phasegate.model.kernels.functions import all_finite, product
from phasegate.model.moe import MoE, Routing
from phasegate.model.references import ReferenceSpec, build
from phasegate.params.fields import override
from phasegate.params.pretraining import Training
from phasegate.surgery.operations import ExpertManager
from phasegate.training.adamw import AdamW
from phasegate.training.loop import make_optimizer
from phasegate.training.losses import load_balance
from tests.models import ARCHITECTURE, seeds
from tests.small_study import ROOT

sizes = st.one_of(st.integers(0, 70), st.sampled_from([128, 257, 600]))


@settings(max_examples=80)
@given(seeds, sizes, sizes, sizes, st.booleans(), st.booleans(), st.booleans())
def test_a_product_and_its_gradients_are_torchs(
    seed: int, m: int, n: int, k: int, left: bool, right: bool, started: bool
) -> None:
    torch.manual_seed(seed)
    a, b = (torch.randn(k, m).T if left else torch.randn(m, k)), (torch.randn(n, k).T if right else torch.randn(k, n))
    inputs, slope = [a, b, *([torch.randn(n)] if started else [])], torch.randn(m, n)
    results = []
    for dtype in (torch.float32, torch.float64):
        given = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        c = product(*given)
        results.append([c, *torch.autograd.grad((c * slope).sum(), given)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, check_dtype=False, rtol=1e-4, atol=2e-4)
    assert all(torch.equal(product(a[i : i + 1], *inputs[1:])[0], results[0][0][i]) for i in range(0, m, 7))


def test_a_product_has_any_number_of_columns() -> None:
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 70_001)
    wide, slope = product(a, b), torch.zeros(3, 70_001)
    slope[1, 69_000] = 1
    assert torch.equal(wide[:, -9:], product(a, b[:, -9:]))
    torch.testing.assert_close(wide, a @ b)
    assert torch.equal(torch.autograd.grad(wide, a, slope)[0][1], b[:, 69_000])
    assert torch.equal(product(b.T, torch.ones(4, 1))[:, 0], product(torch.ones(1, 4), b)[0])


def test_operands_may_lie_in_memory_as_they_like() -> None:
    a, b, start = torch.randn(3, 8), torch.randn(8, 5), torch.randn(5)
    wanted, twice = product(a, b, start), torch.stack([start, start], -1)
    for one in (a, a.T.contiguous().T, torch._neg_view(-a)):
        for other in (b, b.T.contiguous().T, torch._neg_view(-b)):
            for begin in (start, twice[:, 0], torch._neg_view(-start)):
                found, of_negatives = product(one, other, begin), any(x.is_neg() for x in (one, other, begin))
                torch.testing.assert_close(found, wanted)
                assert of_negatives or torch.equal(found, wanted)
    expanded = product(a, b[:, :1].expand(8, 5), start[:1].expand(5))
    assert torch.equal(expanded, product(a, b[:, :1], start[:1]).expand(3, 5))
    learnt = a.clone().requires_grad_()
    for slope in (wanted, torch._neg_view(-wanted), wanted.T.contiguous().T, wanted.double()):
        (found,) = torch.autograd.grad(product(learnt, b), learnt, slope)
        assert torch.equal(found, product(wanted, b.T))


def test_other_shapes_and_types_go_to_torch_which_says_what_is_wrong() -> None:
    a, b, start = torch.randn(3, 8), torch.randn(8, 5), torch.randn(5)
    for one, other, begin in (
        (a[0], b, start), (a, b[:, 0], start[:1]), (a, b.expand(2, 8, 5), start), (a, b, start.double()),
        (a.double(), b.double(), None), (a.bfloat16(), b.bfloat16(), None), (a, b, start[:1]),
        (a.to("meta"), b.to("meta"), None),
    ):  # fmt: skip
        wanted = one @ other if begin is None else one @ other + begin
        found = product(one, other, begin)
        assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
        assert found.is_meta or torch.equal(found, wanted)
    for bad in ((a, b.double(), None), (a, b.half(), None), (a, b, start[:4]), (a, b[:7], None), (a[:, :7], b, None)):
        with pytest.raises(RuntimeError, match=r"dtype|size|shape"):
            product(*bad)
    with FakeTensorMode() as mode:  # whose tensors have no memory
        assert product(mode.from_tensor(a), mode.from_tensor(b)).shape == (3, 5)
    nothing, learnt, slope = torch._efficientzerotensor(3, 8), a.clone().requires_grad_(), torch.ones(3, 5)
    assert torch.equal(product(nothing, b), torch.zeros(3, 5))
    whole = product(learnt, b)
    assert torch.equal(torch.autograd.grad(whole, learnt, nothing[:, :5], retain_graph=True)[0], torch.zeros(3, 8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(product(a, b)) is not Tensor
        with pytest.raises(TypeError, match=r"^a gradient can't be traced alone"):
            torch.autograd.grad(whole, learnt, slope)


def test_the_default_type_and_device_are_not_those_of_kernels() -> None:
    code = (
        "import phasegate, torch; torch.set_default_dtype(torch.bfloat16); torch.set_default_device('meta');"
        "from phasegate.model.kernels.functions import product; from phasegate.training.adamw import AdamW;"
        "kind = {'dtype': torch.float32, 'device': 'cpu'}; a = torch.ones(2, 70_001, requires_grad=True, **kind);"
        "product(a.T, torch.ones(2, 70_001, **kind)[:, :9]).sum().backward(); product(a[:, :2], a).sum().backward();"
        "optimizer = AdamW([a], 0.1); optimizer.step(); print(optimizer.state[a]['step'].item())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1.0\n"


def test_a_gradient_that_nobody_needs_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(5, 4), torch.randn(4, 3, requires_grad=True)
    loss, calls = product(a, b).sum(), list[object]()

    def multiply(*operands: Tensor) -> Tensor:
        calls.append(operands)
        return torch.zeros(4, 3)

    monkeypatch.setattr("phasegate.model.kernels.functions.multiply", multiply)
    torch.autograd.grad(loss, b)
    assert len(calls) == 1


def digest() -> str:
    """A hash of what every kernel computes, for a child process to compare."""
    torch.manual_seed(0)
    moe, found = MoE(40, 5, 33, 2), []
    for moe.top_k in (2, 1):
        for e in range(3):
            ExpertManager(moe).split(e, torch.randn(40), 0.0)
        optimizer = AdamW(moe.parameters(), 0.01)
        for _ in range(2):
            y, routing = moe(torch.randn(1, 50, 40))
            loss = (y * torch.linspace(-1, 1, 2000).view_as(y)).sum() + load_balance(routing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found += [y, routing.gates, *[p.grad for p in moe.parameters()], *moe.parameters()]
    found.append(product(torch.randn(600, 300), torch.randn(77, 300).T))
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in found)).hexdigest()


def child(call: str, **environment: str) -> str:
    code = f"import torch; torch.set_num_threads(1); from tests.test_kernels import *; print({call})"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_another_width_of_vectors_gives_the_same_bits() -> None:
    assert child("digest()", PHASEGATE_VECTORS="avx2") == digest()


@settings(max_examples=30)
@given(seeds, st.integers(1, 12), st.integers(1, 4), st.integers(1, 2), st.integers(1, 40))
def test_balancing_loss_and_gradient_are_the_formulas(seed: int, families: int, top_k: int, gates: int, n: int) -> None:
    torch.manual_seed(seed)
    top_k = min(top_k, families)
    logits = torch.randn(gates, n, families, requires_grad=True)
    chosen = logits.argsort(-1, descending=True)[..., :top_k]
    shares = nn.functional.one_hot(chosen, families).double().mean((1, 2))
    wanted = families * (logits.double().softmax(-1).mean(1) * shares).sum()
    found = load_balance(Routing(logits, logits, chosen, chosen, chosen))
    for one, other in ((found, wanted), [torch.autograd.grad(loss, logits)[0] for loss in (found, wanted)]):
        torch.testing.assert_close(one, other, check_dtype=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrong", [3, -1, 2**40])
def test_a_loss_of_families_that_are_not_there_is_refused(wrong: int) -> None:
    logits, chosen = torch.randn(1, 4, 3), torch.zeros(1, 4, 2, dtype=torch.int64)
    chosen[0, 3, 1] = wrong
    with pytest.raises(IndexError, match=r"^1 index of families out of range: there are 3 families$"):
        load_balance(Routing(logits, logits, chosen, chosen, chosen))
    with pytest.raises(RuntimeError, match="dtype"):
        load_balance(Routing(logits, logits, chosen.short(), chosen, chosen))
    flat, deep = chosen[..., 0], chosen[..., :1]
    found = [load_balance(Routing(logits, logits, families, flat, flat)) for families in (flat, deep)]
    torch.testing.assert_close(*found)


def networks() -> Iterator[tuple[str, Network]]:
    torch.manual_seed(0)
    for shape in ((1, 40), (3, 12, 9)):
        for stem in ("mlp", "conv"):
            model = Model(ModelSpec(override(ARCHITECTURE, {"stem": stem, "n_shared": 1}, ""), shape, (10,)))
            for moe in model.layers:
                ExpertManager(moe).split(1, torch.randn(16), 0.1)
            yield f"{stem} {shape}", model
        for hidden, channels in (((33,), None), (None, (7, 9))):
            yield f"{hidden or channels} {shape}", build(ReferenceSpec(shape, 10, hidden, channels))


@pytest.mark.parametrize(("name", "model"), list(networks()))
def test_a_prediction_is_the_same_bits_in_any_batch(name: str, model: Network) -> None:
    x = torch.randn(2_100, *model.spec.input_shape)
    with torch.no_grad():
        whole = model.eval()(x).logits[0]
        for size in (7, 2_048):
            assert torch.equal(torch.cat([model(rows).logits[0] for rows in torch.split(x, size)]), whole)
        assert torch.equal(torch.cat([model(row[None]).logits[0] for row in x[:100]]), whole[:100])


def test_a_convolution_and_its_slopes_are_torchs() -> None:
    for name, model in networks():
        if "33" not in name:
            x, y = torch.randn(5, *model.spec.input_shape, requires_grad=True), torch.randint(10, (5,))
            found = []
            for network, inputs in ((model.eval(), x), (copy.deepcopy(model).double(), x.double())):
                logits = network(inputs).logits[0]
                convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv1d | nn.Conv2d)]
                weights = [weight for conv in convolutions for weight in conv.parameters()]
                found.append([logits, *torch.autograd.grad(F.cross_entropy(logits, y), [inputs, *weights])])
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, check_dtype=False, rtol=1e-4, atol=1e-4)


def test_thirty_splits_in_a_row_change_no_bit() -> None:
    torch.manual_seed(0)
    moe, x = MoE(16, 5, 8, 2), torch.randn(1, 300, 16)
    before = moe(x)[0]
    for step in range(30):
        ExpertManager(moe).split(int(moe.expert_id[step % moe.n_routed]), torch.randn(16), float(torch.randn(())))
        assert torch.equal(moe(x)[0], before)


def test_the_order_of_experts_changes_no_bit() -> None:
    torch.manual_seed(0)
    moe, x = MoE(16, 5, 8, 2), torch.randn(1, 300, 16)
    before, order = moe(x)[0], torch.tensor([3, 1, 4, 0, 2])
    for tensor in (moe.w_in, moe.w_out, moe.family_of):
        tensor.data = tensor.data[order].contiguous()
    moe.refresh()
    assert torch.equal(moe(x)[0], before)


def test_the_optimizer_is_torchs(training: Training) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 5))]
    models.append(copy.deepcopy(models[0]))
    ours = make_optimizer(models[0].parameters(), training)
    groups = [{key: group[key] for key in ("weight_decay",)} for group in ours.param_groups]
    for group, dims in zip(groups, (2, 1), strict=True):
        group["params"] = [p for p in models[1].parameters() if p.dim() == dims]
    optimizers = [ours, torch.optim.AdamW(groups, lr=training.lr, fused=True)]
    assert isinstance(ours, AdamW) and [g["weight_decay"] for g in groups] == [training.weight_decay, 0]
    for step in range(60):
        x, lr = torch.randn(20, 33), training.lr * (1 - step / 60)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr / 3
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    optimizers[1].load_state_dict(ours.state_dict())  # which is torch's, in form
    ours.load_state_dict(optimizers[1].state_dict())
    assert ours.state[next(models[0].parameters())]["step"] == 60


def test_an_optimizer_does_not_step_on_parameters_that_have_become_others() -> None:
    layer = nn.Linear(40, 30)
    optimizer = AdamW(layer.parameters(), 0.01)
    for dtype in (torch.float64, torch.bfloat16):
        layer.to(dtype)(torch.ones(2, 40, dtype=dtype)).sum().backward()
        with pytest.raises(TypeError, match=f"^a parameter is now {dtype} on cpu: make a new optimizer$"):
            optimizer.step()
    layer = nn.Linear(4, 3)
    optimizer = AdamW(layer.parameters(), 0.01)
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    layer.weight.data = torch.zeros(300, 4)
    for _ in ("gradient and moments", "moments"):  # that are still of the old size
        with pytest.raises(TypeError, match=r"^a parameter of shape \(3, 4\) is now \(300, 4\): make a new optimizer$"):
            optimizer.step()
        layer.weight.grad = torch.ones(300, 4)


@given(st.integers(1, 100), st.data(), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_one_number_that_is_not_finite_is_found(size: int, data: st.DataObject, bad: float) -> None:
    tensors = [torch.full((size,), 3e38), torch.zeros(0), torch.randn(3, 3).T]
    assert all_finite(tensors)
    tensors[0][data.draw(st.integers(0, size - 1))] = bad
    assert not all_finite(tensors)


def compilation() -> Any:
    """What compiling gives, from the kept file if there is one: compiling takes a minute."""
    made = list[object]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "Kernels", lambda *kept: made.append(kept))
        compiled.kernels.__wrapped__()
    return made[0]


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of compilations, which take no time; the folder of kept kernels is `tmp_path`, and empty."""
    made, calls = compilation(), list[str]()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "PLACE", Path(os.devnull) / "nowhere")

    def compile_at_once(processor: str, features: str) -> object:
        calls.append(processor)
        return made

    monkeypatch.setattr(compiled, "_compile", compile_at_once)
    return calls


def load() -> None:
    kernels, found = compiled.kernels.__wrapped__(), torch.tensor([-1, 7])
    kernels.find_not_finite(found.data_ptr(), found.data_ptr() + 8, 0)
    assert found.tolist() == [-1, 7]


HARMS: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("harm", HARMS)
def test_kept_kernels_that_are_not_whole_are_compiled_again(compilations: list[str], tmp_path: Path, harm: str) -> None:
    load()
    load()
    assert len(compilations) == 1
    (kept,) = tmp_path.iterdir()
    HARMS[harm](kept)
    load()
    assert len(compilations) == 2


def test_kernels_of_another_processor_or_of_other_code_are_not_run(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    real = compiled.target()
    monkeypatch.setattr(compiled, "target", lambda: ("another", real[1]))
    load()
    monkeypatch.setattr(compiled, "version", lambda package: "0.0")
    load()
    assert compilations == [real[0], "another", "another"] and len(list(tmp_path.iterdir())) == 3


def test_kernels_live_in_memory_where_nothing_can_be_written(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file/below"))
    monkeypatch.setattr(compiled, "PLACE", tmp_path / "file/here")
    load()
    assert len(compilations) == 1 and [path.name for path in tmp_path.iterdir()] == ["file"]


def compile_beside_another(place: Path) -> str:
    """Compile kernels at the same time as another process, in no time; both keep them in one folder."""
    made = compilation()

    def compile_when_both_do(*target: str) -> object:
        (place / f"compiles-{os.getpid()}").touch()
        while len(list(place.glob("compiles-*"))) < 2:
            time.sleep(0.01)
        return made

    os.environ.pop("NUMBA_CACHE_DIR", None)
    vars(compiled).update(PLACE=place, _compile=compile_when_both_do)
    load()
    return "done"


def test_two_processes_may_compile_together(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(child, [f"compile_beside_another(Path({str(tmp_path)!r}))"] * 2)) == ["done"] * 2
    assert len(list(tmp_path.glob("kernels-*.bin"))) == 1


def test_the_lock_of_an_editor_beside_the_kernels_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "HERE", tmp_path / "kernels")
    shutil.copytree(ROOT / "phasegate/model/kernels", compiled.HERE)
    (compiled.HERE / ".#source.py").symlink_to("somebody@somewhere.1234:1")
    assert compiled.kernels.__wrapped__()
