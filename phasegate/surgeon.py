"""What happens when a controller acts: it decides, the operation is carried out, and its effect is logged."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from phasegate import hyperplanes
from phasegate.checkpoint import below
from phasegate.control import Allowed, Control, HeadControl, Proposal, Situation
from phasegate.counterfactual import Forked, Forks, removals
from phasegate.counterfactual_head import describe
from phasegate.errors import Diverged, UserError
from phasegate.expert_manager import ExpertManager, Surgery, SurgeryRefused
from phasegate.model import Model, Output
from phasegate.moe import Routing
from phasegate.oracle import example_losses
from phasegate.phase_params import Grow, Prune
from phasegate.plugins import Plugin
from phasegate.probe import Probe
from phasegate.randomness import derived_seed, generator
from phasegate.signals import expert_signals, routing_kl
from phasegate.training import EVALUATION_BATCH, PROBE, Course, correct, predict


@dataclass(frozen=True)
class Treatment:
    """Who decides, how an expert is added, and how one is taken away."""

    control: Control
    grow: Grow | Plugin = "split"
    prune: Prune | Plugin = "remove"

    def files(self, seed: int) -> tuple[Path, ...]:
        """What it reads in the trial of a seed: what its control does, and files of one's own."""
        own = (way.path for way in (self.grow, self.prune) if isinstance(way, Plugin))
        return (*self.control.files(seed), *own)


class Surgeon:
    """Operates on the layers of one model in training, as one controller per layer decides.

    Args:
        optimizer: of the model; the controllers' heads, if any, join it.
    """

    def __init__(self, model: Model, optimizer: Optimizer, treatment: Treatment, course: Course) -> None:
        self.model, self.optimizer, self.treatment = model, optimizer, treatment
        self.course, self.schedule, self.seed = course, course.schedule, course.seed
        self.log: list[dict[str, Any]] = []
        self._touched: dict[tuple[int, int], int] = {}  # (block, expert id) -> step of its last surgery
        self._born: dict[tuple[int, int], int] = {}  # (block, expert id) -> step, of those made in this phase
        torch.manual_seed(derived_seed(self.seed, "control head"))
        control, width = treatment.control, model.spec.architecture.width
        self.controllers = [control.build(width, self.seed, course.gate.x.device) for _ in model.layers]
        if isinstance(control, HeadControl):
            heads = [parameter for controller in self.controllers for parameter in controller.parameters()]
            factor = control.labels.head_lr / (self.schedule.lr_scale * course.training.lr)
            optimizer.add_param_group({"params": heads, "lr_factor": factor, "weight_decay": 0.0})

    def state_dict(self) -> dict[str, Any]:
        """What a snapshot must hold besides model and optimizer: tensors, and what JSON can hold."""
        controllers = {
            f"controllers.{block}.{key}": value
            for block, controller in enumerate(self.controllers)
            for key, value in controller.state_dict().items()
        }
        touched, born = ([[*key, step] for key, step in steps.items()] for steps in (self._touched, self._born))
        return {"log": self.log, "touched": touched, "born": born, **controllers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        self.log = state["log"]
        self._touched, self._born = (
            {(block, expert): step for block, expert, step in state[name]} for name in ("touched", "born")
        )
        for block, controller in enumerate(self.controllers):
            controller.load_state_dict(below(state, f"controllers.{block}."))

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
        for block in range(len(self.model.layers)):
            probe, draws = Probe(self.model, block, self.course.signal), generator(self.seed, "decision", step, block)
            if not probe.losses.isfinite().all():
                raise Diverged("a loss on the signal split is not finite", step)
            proposal = self.controllers[block].propose(self.situation(probe, step, draws))
            if proposal is not None:
                self._carry_out(proposal, probe, step, draws)

    def situation(self, probe: Probe, step: int, draws: torch.Generator) -> Situation:
        """What the controller of the probed layer is shown."""
        return Situation(
            signals=expert_signals(probe.routing, probe.layer.n_routed),
            allowed=self._allowed(probe.block, step),
            loss_after=partial(self._loss_after, probe),
            draws=draws,
            features=partial(self._features, probe.block, step),
            removals=partial(removals, probe),
            forks=partial(self._forks, probe, step),
            expert_size=probe.layer.weights(0).numel(),
            probe=probe,
        )

    def _carry_out(self, proposal: Proposal, probe: Probe, step: int, draws: torch.Generator) -> None:
        """Do one operation between two measurements."""
        block, gate = probe.block, self.course.gate
        before, right_before = self._glance(), correct(self.model, gate)
        manager = ExpertManager(probe.layer, self.optimizer)
        surgery = self._operate(manager, proposal, probe, draws)
        after, right_after = self._glance(), correct(self.model, gate)
        if proposal.action == "grow":
            self._born[block, surgery.expert] = step
        for expert in (surgery.expert, surgery.parent):
            if expert is not None:
                self._touched[block, expert] = step
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
                "accuracy_before": 100 * right_before / len(gate),
                "accuracy_after": 100 * right_after / len(gate),
                "routing_kl": routing_kl(probs_before, probs_after, surgery.family_source),
                "recovery_steps": 0 if right_after >= right_before else math.nan,
            }
        )

    def _operate(self, manager: ExpertManager, proposal: Proposal, probe: Probe, draws: torch.Generator) -> Surgery:
        """Carry out a proposal by the arm's kind of surgery, on the probed layer or on a copy of it."""
        e = proposal.expert
        expert = int(manager.moe.expert_id[e])
        match self.treatment.grow if proposal.action == "grow" else self.treatment.prune:
            case Plugin() as own:
                return _operate_own(own, manager, proposal, probe, draws)
            case "split":
                return manager.split(expert, *self._plane(probe, e, draws))
            case "clone":
                return manager.clone(expert)
            case "reinit":
                return manager.reinit(draws)
            case "remove":
                return manager.remove(expert)
            case "merge":
                sibling = manager.sibling(expert)
                assert sibling is not None, "only experts with a sibling may be merged"
                load = probe.visits.count_nonzero(0)
                both = load[e] + load[manager.moe.expert_id == sibling].sum()
                return manager.merge(expert, sibling, float(load[e] / both) if both else 0.5)

    def _plane(self, probe: Probe, e: int, draws: torch.Generator) -> tuple[Tensor, float]:
        """The hyperplane that halves the probed tokens of expert index e."""
        tokens, direction = probe.tokens_of(e), self.schedule.split_direction
        if direction == "random":
            return hyperplanes.halve(tokens, hyperplanes.random_direction(tokens.shape[1], draws).to(tokens))
        if direction == "principal":
            return hyperplanes.halve(tokens, hyperplanes.principal_direction(tokens))
        slopes = (probe.visits[:, e, None] * probe.slopes)[(probe.routing.experts[0] == e).any(-1)]
        every = -(-len(tokens) // EVALUATION_BATCH) or 1  # an image may be many tokens, and the kernel is square
        some = tokens[::every]
        kernel = hyperplanes.gradient_kernel(probe.layer, e, some, slopes[::every])
        return hyperplanes.halve(tokens, hyperplanes.loss_direction(some, kernel))

    def _loss_after(self, probe: Probe, proposal: Proposal) -> float:
        """Mean signal loss (nats) right after an operation, which is done on a copy of the layer."""
        draws = generator(self.seed, "tried", probe.block)
        with self.model.spare_layer(probe.block) as spare:
            self._operate(ExpertManager(spare), proposal, probe, draws)
            return float(example_losses(self.model, probe.examples).mean())

    def _features(self, block: int, step: int) -> Tensor:
        """What a counterfactual head reads, (E, F), from the gate split."""
        ages = torch.tensor([step - self._born.get((block, e), -self.course.training.steps) for e in self._ids(block)])
        return describe(Probe(self.model, block, self.course.gate), ages, step / self.schedule.steps)

    def _forks(self, probe: Probe, step: int, proposals: list[Proposal], steps: int, repeats: int) -> Forked:
        """Measured changes by each proposal, done in the arm's way; what is random is drawn for every repeat."""

        def operate(manager: ExpertManager, repeat: int, proposal: Proposal) -> None:
            self._operate(manager, proposal, probe, generator(self.seed, "fork", step, probe.block, repeat))

        forks = Forks(self.model, self.optimizer, self.course, steps, repeats)
        return forks.measure(probe.block, step, [partial(operate, proposal=proposal) for proposal in proposals])

    def _ids(self, block: int) -> list[int]:
        return [int(expert) for expert in self.model.layers[block].expert_id]

    def _allowed(self, block: int, step: int) -> Allowed:
        """Within the bounds on the number of experts; none that surgery touched lately."""
        moe, schedule = self.model.layers[block], self.schedule
        experts = moe.expert_id.tolist()
        touched = [self._touched.get((block, expert), -schedule.cooldown) for expert in experts]
        rest = {expert: last + schedule.cooldown <= step for expert, last in zip(experts, touched, strict=True)}
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

    def _glance(self) -> Output:
        """The model's output on the first examples of the signal split."""
        return predict(self.model, self.course.signal.x[:PROBE])[0]


def _operate_own(
    own: Plugin, manager: ExpertManager, proposal: Proposal, probe: Probe, draws: torch.Generator
) -> Surgery:
    """Carry out a proposal by a surgery of one's own, which has to change the number of experts by one.

    Raises:
        UserError: if it doesn't, or asks the manager for something impossible.
    """
    before = manager.moe.n_routed
    try:
        surgery = own.function()(manager, int(manager.moe.expert_id[proposal.expert]), probe, draws)
    except SurgeryRefused as error:
        raise UserError(f"{own.path}: {error}") from None
    wanted = before + (1 if proposal.action == "grow" else -1)
    if not isinstance(surgery, Surgery) or manager.moe.n_routed != wanted:
        raise UserError(
            f"{own.path}: to {proposal.action}, operate must return the manager's Surgery and leave {wanted} experts; "
            f"it returned {surgery!r:.80} and left {manager.moe.n_routed}"
        )
    return replace(surgery, operation=own.name, n_routed_before=before, n_routed_after=wanted)
