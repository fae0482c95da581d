"""Random models for tests, and a check that looking at a model leaves it as it was."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from phasegate.model.classifier import Model, ModelSpec
from phasegate.model.moe import MoE, Routing
from phasegate.params.fields import override
from phasegate.params.pretraining import Architecture
from phasegate.signals.forks import fork_proposals
from phasegate.surgery.controllers import Action, Allowed, Proposal, Situation
from phasegate.surgery.operations import ExpertManager
from phasegate.surgery.probe import Probe
from phasegate.training.batches import Examples
from phasegate.training.course import Course
from phasegate.training.predictions import example_losses

ARCHITECTURE = Architecture(
    stem="mlp", width=16, blocks=2, n_routed=5, n_shared=0, top_k=2, expert_width=8,
    dropout=0.1, balance_loss=0.01, balance_bias=0.001, z_loss=0.001,
)  # fmt: skip
seeds = st.integers(0, 10**6)
stems = st.sampled_from(["mlp", "conv"])
cases = st.fixed_dictionaries({"stem": stems, "top_k": st.integers(1, 3), "n_shared": st.integers(0, 1)})


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(seed: int, examples: int = 20, **changes: Any) -> tuple[Model, Examples]:
    """A random model of two blocks in float64, its selection biased, and random examples."""
    torch.manual_seed(seed)
    model = Model(ModelSpec(override(ARCHITECTURE, changes, ""), (1, 8), (4,))).double().eval()
    for moe in model.layers:
        moe.selection_bias.normal_()
    return model, Examples(torch.randn(examples, 1, 8).double(), torch.randint(0, 4, (examples,)))


def split(moe: MoE, *experts: int) -> None:
    """Split experts of a random model by random hyperplanes, and let the halves differ."""
    for expert in experts:
        ExpertManager(moe).split(expert, torch.randn(16).double(), 0.0)
        moe.w_out.data += 0.1 * torch.randn_like(moe.w_out)


def loss_with(probe: Probe, added: Tensor) -> Tensor:
    """The mean loss if `added` (N, D) is added to what the layer puts out."""

    def add(layer: object, given: object, output: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
        return output[0] + added, output[1]

    with probe.layer.register_forward_hook(add):
        return F.cross_entropy(probe.model.eval()(probe.examples.x).logits[0], probe.examples.y)


def losses_after_removal(probe: Probe, gone: Iterable[int]) -> Tensor:
    """The examples' losses once these experts, by index, have been removed from the layer."""
    model = copy.deepcopy(probe.model)
    manager = ExpertManager(model.layers[probe.block])
    for expert in manager.moe.expert_id[list(gone)].tolist():
        manager.remove(expert)
    return example_losses(model, probe.examples)


def siblings(moe: MoE) -> dict[int, int]:
    """Pairs of leaves whose paths differ in the side of a single node, counted the slow way."""
    pairs = {}
    for a in range(moe.n_routed):
        for b in range(moe.n_routed):
            differ = (moe.path[a] != moe.path[b]).nonzero().flatten().tolist()
            if len(differ) == 1 and moe.path[a, differ[0]] * moe.path[b, differ[0]] == -1:
                pairs[a] = b
    return pairs


@contextmanager
def unchanged(model: nn.Module, optimizer: Optimizer | None = None, may_draw: bool = False) -> Iterator[None]:
    """Fail if a model comes out changed: its tensors, its gradients, which objects hold them, hooks, or randomness."""
    random = torch.get_rng_state()
    before, tensors = _objects(model, optimizer), {name: value.clone() for name, value in _tensors(model, optimizer)}
    yield
    assert may_draw or torch.equal(torch.get_rng_state(), random)
    assert _objects(model, optimizer) == before
    for name, value in _tensors(model, optimizer):
        assert torch.equal(value, tensors[name]), name


def _tensors(model: nn.Module, optimizer: Optimizer | None) -> Iterator[tuple[str, Tensor]]:
    for module_name, module in model.named_modules():  # also what checkpoints leave out
        yield from ((f"{module_name}.{name}", value) for name, value in module.named_buffers(recurse=False))
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
        if parameter.grad is not None:
            yield f"{name}.grad", parameter.grad
        for key, value in optimizer.state.get(parameter, {}).items() if optimizer else ():
            yield f"{name}.{key}", value


def _objects(model: nn.Module, optimizer: Optimizer | None) -> list[Any]:
    parameters = list(model.named_parameters())
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]] if optimizer else []
    hooks = [(id(module), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    held = [(name, id(p), id(p.grad), p.requires_grad) for name, p in parameters]
    return [held, owned, hooks, [name for name, _ in _tensors(model, optimizer)]]


Operation = Callable[[ExpertManager, torch.Generator], object]


def removed(expert: int) -> Operation:
    return lambda manager, draws: manager.remove(expert)


@dataclass
class Forks:
    """Measures any operations on a layer of a model in training, in place of an arm's."""

    model: Model
    optimizer: Optimizer
    course: Course
    steps: int
    repeats: int

    def measure(self, block: int, step: int, operations: Sequence[Operation]) -> tuple[Tensor, Tensor]:
        def operate(manager: ExpertManager, proposal: Proposal, draws: torch.Generator) -> Any:
            return operations[proposal.expert](manager, draws)

        probe, nobody = Probe(self.model, block, self.course.signal), torch.ones(0, dtype=torch.bool)
        situation = Situation(probe, Allowed(nobody, nobody), torch.Generator(), step, nobody, operate)
        plans = [(Proposal(Action.GROW, index),) for index in range(len(operations))]
        return fork_proposals(plans, situation, self.optimizer, self.course, self.steps, self.repeats)
