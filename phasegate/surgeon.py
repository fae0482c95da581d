"""What happens when a controller acts: it decides, the operation is carried out, and its effect is logged."""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from phasegate import hyperplanes
from phasegate.control import Allowed, Control, Controller, HeadControl, Proposal, Situation
from phasegate.expert_manager import ExpertManager, Surgery
from phasegate.model import Model, Output
from phasegate.moe import Routing
from phasegate.params import Schedule
from phasegate.randomness import derived_seed, generator
from phasegate.signals import ExpertSignals, expert_signals, routing_kl
from phasegate.training import EVALUATION_BATCH, PROBE, Examples, correct, predict

Grow = Literal["split", "clone", "reinit"]
Prune = Literal["remove", "merge"]


@dataclass(frozen=True)
class Treatment:
    """Who decides, how an expert is added, and how one is taken away."""

    control: Control
    grow: Grow = "split"
    prune: Prune = "remove"


class Surgeon:
    """Operates on the layers of one model in training, as one controller per layer decides.

    Args:
        optimizer: of the model; the controllers' heads, if any, join it.
        rate: the model's peak learning rate, relative to which the heads' is set.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        treatment: Treatment,
        schedule: Schedule,
        rate: float,
        seed: int,
        signal: Examples,
        gate: Examples,
    ) -> None:
        self.model, self.optimizer, self.treatment = model, optimizer, treatment
        self.schedule, self.seed, self.gate = schedule, seed, gate
        self.signal = Examples(signal.x[:EVALUATION_BATCH], signal.y[:EVALUATION_BATCH])
        self.log: list[dict[str, Any]] = []
        self._rests_until: dict[tuple[int, int], int] = {}  # (block, expert id) -> step
        torch.manual_seed(derived_seed(seed, "control head"))
        control, width = treatment.control, model.spec.architecture.width
        self.controllers: list[Controller] = [control.build(width, gate.x.device) for _ in model.layers]
        if isinstance(control, HeadControl):
            heads = [parameter for controller in self.controllers for parameter in controller.parameters()]
            factor = control.labels.head_lr / rate
            optimizer.add_param_group({"params": heads, "lr_factor": factor, "weight_decay": 0.0})

    def loss(self, routings: tuple[Routing, ...], step: int) -> Tensor | float:
        """What the controllers add to the training loss."""
        if not isinstance(self.treatment.control, HeadControl):
            return 0.0
        draws = generator(self.seed, "labels", step)
        total: Tensor | float = 0.0
        for controller, moe, routing in zip(self.controllers, self.model.layers, routings, strict=True):
            total = total + controller.loss(expert_signals(routing, moe.n_routed), draws)
        return total

    def recovered(self, step: int, accuracy: float) -> None:
        """Note which operations' loss of gate accuracy (percent) has been made good by this step."""
        for row in self.log:
            if math.isnan(row["recovery_steps"]) and accuracy >= row["accuracy_before"]:
                row["recovery_steps"] = step - row["step"]

    @torch.no_grad()
    def act(self, step: int) -> None:
        """Ask each controller for one operation on its layer, do it, and log what it did."""
        for block, moe in enumerate(self.model.layers):
            signals = expert_signals(self._routing(block), moe.n_routed)
            draws = generator(self.seed, "decision", step, block)
            loss_after = partial(self._loss_after, block, signals)
            proposal = self.controllers[block].propose(
                Situation(signals, self._allowed(block, step), loss_after, draws)
            )
            if proposal is not None:
                self._carry_out(proposal, block, step, signals, draws)

    def _carry_out(
        self, proposal: Proposal, block: int, step: int, signals: ExpertSignals, draws: torch.Generator
    ) -> None:
        """Do one operation between two measurements."""
        before, right_before = self._probe(), correct(self.model, self.gate)
        surgery = self._operate(block, self.optimizer, proposal, signals, draws)
        after, right_after = self._probe(), correct(self.model, self.gate)
        for expert in (surgery.expert, surgery.parent):
            if expert is not None:
                self._rests_until[block, expert] = step + self.schedule.cooldown
        change = (after.logits[0] - before.logits[0]).norm() / before.logits[0].norm()
        probs_before, probs_after = (output.routings[block].probs[0] for output in (before, after))
        self.log.append(
            {
                "step": step,
                "block": block,
                "operation": surgery.operation,
                "expert": surgery.expert,
                "parent": surgery.parent,
                "n_routed_before": surgery.n_routed_before,
                "n_routed_after": surgery.n_routed_after,
                "output_change": float(change),
                "accuracy_before": 100 * right_before / len(self.gate),
                "accuracy_after": 100 * right_after / len(self.gate),
                "routing_kl": routing_kl(probs_before, probs_after, surgery.family_source),
                "recovery_steps": 0 if right_after >= right_before else math.nan,
            }
        )

    def _operate(
        self,
        block: int,
        optimizer: Optimizer | None,
        proposal: Proposal,
        signals: ExpertSignals,
        draws: torch.Generator,
    ) -> Surgery:
        """Carry out a proposal by the arm's kind of surgery."""
        moe = self.model.layers[block]
        manager, e = ExpertManager(moe, optimizer), proposal.expert
        expert = int(moe.expert_id[e])
        match self.treatment.grow if proposal.action == "grow" else self.treatment.prune:
            case "split":
                return manager.split(expert, *self._plane(block, e, draws))
            case "clone":
                return manager.clone(expert)
            case "reinit":
                return manager.reinit(draws)
            case "remove":
                return manager.remove(expert)
            case "merge":
                sibling = manager.sibling(expert)
                assert sibling is not None, "only experts with a sibling may be merged"
                both = signals.load[e] + signals.load[moe.expert_id == sibling].sum()
                return manager.merge(expert, sibling, float(signals.load[e] / both) if both else 0.5)

    def _plane(self, block: int, e: int, draws: torch.Generator) -> tuple[Tensor, float]:
        """The hyperplane that halves the signal tokens of expert index e."""
        moe, direction = self.model.layers[block], self.schedule.split_direction
        routing, slopes = self._slopes(block) if direction == "loss" else (self._routing(block), None)
        slot = routing.experts[0] == e  # (N, K)
        tokens = routing.tokens[0][slot.any(-1)]
        if direction == "random":
            return hyperplanes.halve(tokens, hyperplanes.random_direction(tokens.shape[1], draws).to(tokens))
        if slopes is None:
            return hyperplanes.halve(tokens, hyperplanes.principal_direction(tokens))
        gradients = routing.gates[0][slot][:, None] * slopes[slot.any(-1)]
        every = -(-len(tokens) // EVALUATION_BATCH) or 1  # an image may be many tokens, and the kernel is square
        some = tokens[::every]
        kernel = hyperplanes.gradient_kernel(moe, e, some, gradients[::every])
        return hyperplanes.halve(tokens, hyperplanes.loss_direction(some, kernel))

    def _slopes(self, block: int) -> tuple[Routing, Tensor]:
        """A layer's routing, and the gradient of the signal loss with respect to its output (N, D)."""
        outputs: list[Tensor] = []
        hook = self.model.layers[block].register_forward_hook(lambda moe, x, y: outputs.append(y[0]))
        with hook, torch.enable_grad():
            output = self.model.eval()(self.signal.x)
            (slopes,) = torch.autograd.grad(F.cross_entropy(output.logits[0], self.signal.y), outputs)
        return Routing(*(tensor.detach() for tensor in output.routings[block])), slopes[0]

    def _loss_after(self, block: int, signals: ExpertSignals, proposal: Proposal) -> float:
        """Mean signal loss (nats) right after an operation, which is done on a copy of the layer."""
        whole, original = self.model.blocks[block], self.model.layers[block]
        whole.moe = copy.deepcopy(original)
        try:
            self._operate(block, None, proposal, signals, generator(self.seed, "tried", block))
            return float(F.cross_entropy(predict(self.model, self.signal.x)[0].logits[0], self.signal.y))
        finally:
            whole.moe = original

    def _allowed(self, block: int, step: int) -> Allowed:
        """Within the bounds on the number of experts; none that surgery touched lately."""
        moe, schedule = self.model.layers[block], self.schedule
        experts = moe.expert_id.tolist()
        rest = {expert: self._rests_until.get((block, expert), 0) <= step for expert in experts}
        rested = torch.tensor([rest[expert] for expert in experts])
        if self.treatment.prune == "merge":
            siblings = map(ExpertManager(moe).sibling, experts)
            prunable = torch.tensor([sibling is not None and rest[sibling] for sibling in siblings])
        else:
            prunable = (moe.path != 0).any(1).cpu() | (moe.n_families > moe.top_k)
        return Allowed(
            grow=rested & (moe.n_routed < schedule.max_experts),
            prune=rested & prunable & (moe.n_routed > schedule.min_experts),
        )

    def _routing(self, block: int) -> Routing:
        return predict(self.model, self.signal.x)[0].routings[block]

    def _probe(self) -> Output:
        """The model's output on the first examples of the signal split."""
        return predict(self.model, self.signal.x[:PROBE])[0]
