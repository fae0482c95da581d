"""Carry out what controllers propose: check that it is allowed, do the operation, and log its effect."""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phasegate.base.errors import Diverged, UserError
from phasegate.model.classifier import Model, Output
from phasegate.model.moe import Routing
from phasegate.model.routing_statistics import expert_signals, routing_kl
from phasegate.params.phases import Grow, GrowMany, Prune
from phasegate.params.plugins import Plugin
from phasegate.surgery.controllers import Action, Allowed, Policy, Proposal, Situation, in_order
from phasegate.surgery.hyperplanes import cut
from phasegate.surgery.moments import set_expert_rate
from phasegate.surgery.operations import ExpertManager, Moments, Surgery, SurgeryRefused
from phasegate.surgery.probe import Probe
from phasegate.training import checkpoint, randomness
from phasegate.training.course import Course
from phasegate.training.predictions import PROBE, correct, predict


@dataclass(frozen=True)
class Treatment:
    """Say who decides, how an expert is added and how one is removed (None: never), and what Adam's moments become."""

    policy: Policy
    grow: Grow | GrowMany | Plugin | None = "split"
    prune: Prune | Plugin | None = "remove"
    moments: Moments = "scaled"
    count: int = 1  # experts that are added when the arm grows
    expert_rate: float | None = None  # of expert matrices from the first operation on; None: as it is

    @property
    def at_once(self) -> int:
        """Return how many experts one operation of growth adds."""
        return self.count if self.grow in get_args(GrowMany) else 1

    def files(self, seed: int) -> tuple[Path, ...]:
        """List the files that a trial of this seed reads: the files of the policy, and plugins."""
        plugins = (way.path for way in (self.grow, self.prune) if isinstance(way, Plugin))
        return (*self.policy.files(seed), *plugins)


class Surgeon:
    """Operate on the layers of one model in training, as one controller per layer decides."""

    def __init__(self, model: Model, optimizer: Optimizer, treatment: Treatment, course: Course) -> None:
        self.model, self.optimizer, self.treatment, self.course = model, optimizer, treatment, course
        self.log: list[dict[str, Any]] = []  # a row per operation: it says which experts rest, and how old they are
        torch.manual_seed(randomness.derived_seed(course.seed, "control head"))
        self.controllers = [treatment.policy.build(model, optimizer, course) for _ in model.layers]
        self._learn = any(list(controller.parameters()) for controller in self.controllers)

    def state_dict(self) -> dict[str, Any]:
        """Return what a snapshot must hold besides model and optimizer: tensors, and values that JSON can hold."""
        controllers = nn.ModuleList(self.controllers).state_dict()
        return {"log": self.log} | {f"controllers.{key}": value for key, value in controllers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore such a state."""
        self.log = state["log"]
        self._set_expert_rate()
        nn.ModuleList(self.controllers).load_state_dict(checkpoint.below(state, "controllers."))

    def loss(self, routings: tuple[Routing, ...], step: int) -> Tensor | float:
        """Return what the controllers add to the training loss."""
        total: Tensor | float = 0.0
        if self._learn:
            draws = randomness.generator(self.course.seed, "labels", step)
            for controller, moe, routing in zip(self.controllers, self.model.layers, routings, strict=True):
                total = total + controller.loss(expert_signals(routing, moe.n_routed), draws)
        return total

    def mark_recovered(self, step: int, accuracy: float) -> None:
        """Note in the log which operations' loss of gate accuracy (percent) is made good at this step."""
        for row in self.log:
            if math.isnan(row["recovery_steps"]) and accuracy >= row["accuracy_before"]:
                row["recovery_steps"] = step - row["step"]

    @torch.no_grad()
    def act(self, step: int) -> None:
        """Ask each controller for operations on its layer, do them, and log them.

        Growth of one expert at a time is asked for as often as the arm adds experts.
        """
        for block, controller in enumerate(self.controllers):
            draws = randomness.generator(self.course.seed, "decision", step, block)
            for _ in range(self.treatment.count // self.treatment.at_once):
                probe = Probe(self.model, block, self.course.signal)
                if not probe.losses.isfinite().all():
                    raise Diverged("a loss on the signal split is not finite", step)
                if not (plan := in_order(controller.plan(self.situation(probe, step, draws)))):
                    break
                for proposal in plan:
                    self.log.append({"step": step, "block": block} | self._carry_out(proposal, probe, draws))
                    probe = Probe(self.model, block, self.course.signal)
        self._set_expert_rate()

    def _set_expert_rate(self) -> None:
        if self.log and self.treatment.expert_rate is not None:
            set_expert_rate(self.model, self.optimizer, self.treatment.expert_rate)

    def situation(self, probe: Probe, step: int, draws: torch.Generator) -> Situation:
        """Describe the probed layer to its controller."""
        rows = [row for row in self.log if row["block"] == probe.block]
        born = {row["expert"]: row["step"] for row in rows if row["n_routed_after"] > row["n_routed_before"]}
        touched = {expert: row["step"] for row in rows for expert in (row["expert"], row["parent"])}
        resting = {expert for expert, last in touched.items() if step < last + self.course.schedule.cooldown}
        experts, unborn = probe.layer.expert_id.tolist(), -self.course.training.steps
        ages = torch.tensor([step - born.get(expert, unborn) for expert in experts])
        allowed, count = self._allowed(probe, resting), self.treatment.count
        return Situation(
            probe, allowed, draws, step, ages, partial(self._operate, probe), count, self.treatment.expert_rate
        )

    def _allowed(self, probe: Probe, resting: set[int | None]) -> Allowed:
        """Mask the experts that may be operated on: within the bounds on their number, and not touched lately."""
        moe, schedule, experts = probe.layer, self.course.schedule, probe.layer.expert_id.tolist()
        rested = torch.tensor([expert not in resting and not moe.under_way for expert in experts])
        at_once = 1
        if self.treatment.prune == "merge":
            siblings = map(ExpertManager(moe).sibling, experts)
            prunable = torch.tensor([sibling is not None and sibling not in resting for sibling in siblings])
        else:
            prunable = (moe.path != 0).any(1).cpu() | (moe.n_families > moe.top_k)
            at_once = max(1, min(moe.n_routed - schedule.min_experts, moe.n_families - moe.top_k))
        grown = self.treatment.at_once + (0 if self.treatment.grow == "handover" else moe.n_routed)
        return Allowed(
            grow=rested & (self.treatment.grow is not None and moe.n_routed < grown <= schedule.max_experts),
            prune=rested & prunable & (self.treatment.prune is not None and moe.n_routed > schedule.min_experts),
            at_once=at_once,
        )

    def _carry_out(self, proposal: Proposal, probe: Probe, draws: torch.Generator) -> dict[str, Any]:
        """Do one operation between two measurements, and return its row of the log."""
        before, right_before = self._measure()
        dead = not probe.layer.weights(proposal.expert).count_nonzero()
        surgery = self._operate(probe, ExpertManager(probe.layer, self.optimizer), proposal, draws)
        after, right_after = self._measure()
        change = (after.logits[0] - before.logits[0]).norm() / before.logits[0].norm()
        probs_before, probs_after = (output.routings[probe.block].probs[0] for output in (before, after))
        return asdict(surgery) | {
            "dead": dead,
            "output_change": float(change),
            "accuracy_before": 100 * right_before / len(self.course.gate),
            "accuracy_after": 100 * right_after / len(self.course.gate),
            "routing_kl": routing_kl(probs_before, probs_after, surgery.family_source),
            "recovery_steps": 0 if right_after >= right_before else math.nan,
        }

    def _measure(self) -> tuple[Output, int]:
        """Return the output on the first examples of the signal split, and how many gate examples are right."""
        return predict(self.model, self.course.signal.x[:PROBE])[0], correct(self.model, self.course.gate)

    def _operate(self, probe: Probe, manager: ExpertManager, proposal: Proposal, draws: torch.Generator) -> Surgery:
        """Carry out a proposal by the arm's kind of surgery, on the probed layer or on a copy of it."""
        e = proposal.expert
        expert = int(manager.moe.expert_id[e])
        manager.moments = self.treatment.moments
        match self.treatment.grow if proposal.action == Action.GROW else self.treatment.prune:
            case Plugin() as plugin:
                return _operate_by_plugin(plugin, manager, proposal, probe, draws)
            case "split":
                return manager.split(expert, *cut(probe, e, self.course.schedule.split_direction, draws))
            case "clone":
                return manager.clone(expert, probe.share_of_copy(e))
            case "reinit":
                return manager.reinit(draws)
            case "birth" | "handover" as way:
                return manager.birth(self.treatment.count, way == "handover", draws)
            case "upcycle":
                return manager.upcycle(self.treatment.count, draws)
            case "remove":
                return manager.remove(expert)
            case "merge":
                sibling = manager.sibling(expert)
                assert sibling is not None, "only experts with a sibling may be merged"
                load = probe.visits.count_nonzero(0)
                both = load[e] + load[manager.moe.expert_id == sibling].sum()
                return manager.merge(expert, sibling, float(load[e] / both) if both else 0.5)
            case None:
                raise AssertionError("an arm proposes only what it does")


def _operate_by_plugin(
    plugin: Plugin, manager: ExpertManager, proposal: Proposal, probe: Probe, draws: torch.Generator
) -> Surgery:
    """Carry out a proposal by a plugin; `UserError` unless it changes the number of experts by one."""
    before = manager.moe.n_routed
    try:
        surgery = plugin.function()(manager, int(manager.moe.expert_id[proposal.expert]), probe, draws)
    except SurgeryRefused as error:
        raise UserError(f"{plugin.path}: {error}") from None
    wanted = before + (1 if proposal.action == Action.GROW else -1)
    if not isinstance(surgery, Surgery) or manager.moe.n_routed != wanted:
        raise UserError(
            f"{plugin.path}: to {proposal.action.name.lower()}, operate must return the manager's Surgery and leave "
            f"{wanted} experts; it returned {surgery!r:.80} and left {manager.moe.n_routed}"
        )
    return replace(surgery, operation=plugin.name, n_routed_before=before, n_routed_after=wanted)
