"""One 7b trial: go on from a 7a checkpoint under an arm's treatment.

All trials of all phases share the schedule, the batches of their seed and this code; an arm only says what is
added: a controller that may operate, a regulariser, further tasks. The arm that adds nothing is the control.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from phasegate import checkpoint, execution
from phasegate.checkpoint import RECORD, WEIGHTS, Checkpoint, Record
from phasegate.control import Allowed, Control, Controller, Proposal
from phasegate.data import fit_file
from phasegate.expert_manager import ExpertManager, Surgery, halving_plane
from phasegate.logs import CURVE, SURGERIES, SURGERY_COLUMNS, Curve
from phasegate.model import Model, Output
from phasegate.moe import MoE, Routing, routing_entropy
from phasegate.multitask import add_tasks, further_losses
from phasegate.params import Schedule
from phasegate.randomness import derived_seed, generator
from phasegate.signals import expert_signals, routing_kl
from phasegate.training import (
    EVALUATION_BATCH,
    Batches,
    Examples,
    correct,
    cosine,
    fit,
    load_examples,
    main_loss,
    nudge_selection,
    predict,
)
from phasegate.trials import Trial

PROBE = 256  # signal examples on which the output's change is measured


@dataclass(frozen=True)
class Tasks:
    """Further tasks: label maps (class -> task label), their weight, and whether each has gates of its own."""

    label_maps: tuple[tuple[int, ...], ...]
    weight: float
    own_gates: bool


@dataclass(frozen=True)
class Arm:
    """A named variation of a phase."""

    name: str
    control: Control | None = None
    grow: Literal["split", "clone", "reinit"] = "split"
    entropy_weight: float = 0.0  # of the routing entropy in the loss
    tasks: Tasks | None = None


def continuations(
    prepared: Path, baselines: Path, phase: str, arms: list[Arm], seeds: int, schedule: Schedule
) -> list[Trial]:
    """The trials of all arms and seeds: seed s goes on from `baselines`/seed-s."""
    return [
        Trial(
            f"{arm.name}/seed-{seed}",
            run_arm,
            {"prepared": prepared, "start": start, "phase": phase, "arm": arm, "seed": seed, "schedule": schedule},
            (fit_file(prepared), start / WEIGHTS, start / RECORD),
        )
        for arm in arms
        for seed in range(seeds)
        for start in [baselines / f"seed-{seed}"]
    ]


def run_arm(folder: Path, *, prepared: Path, start: Path, phase: str, arm: Arm, seed: int, schedule: Schedule) -> None:
    """Run one trial and leave a checkpoint, a learning curve and the log of surgeries in `folder`."""
    train, signal, gate = load_examples(prepared, execution.device())
    trial = _Trial(checkpoint.load(start, gate, train.x.device), arm, seed, schedule, signal, gate)
    batches = Batches(train, trial.training.batch, derived_seed(seed, "7b"), trial.training)
    rates = cosine(schedule.lr_scale * trial.training.lr, schedule.steps)
    trial.curve.measure(0)
    fit(trial.model, trial.optimizer, batches, trial.objective, rates, trial.after_step)
    record = Record(phase, arm.name, seed, trial.training, trial.n_routed_start)
    checkpoint.save(folder, trial.model, None, record, gate)
    trial.curve.table().to_csv(folder / CURVE, index=False)
    pd.DataFrame(trial.surgeries, columns=SURGERY_COLUMNS).to_csv(folder / SURGERIES, index=False)


class _Trial:
    """The moving parts of a trial: the loss of a step, and what happens after it."""

    def __init__(
        self, start: Checkpoint, arm: Arm, seed: int, schedule: Schedule, signal: Examples, gate: Examples
    ) -> None:
        assert isinstance(start.model, Model) and start.optimizer is not None, "not a 7a checkpoint"
        self.model, self.optimizer, self.training = start.model, start.optimizer, start.record.training
        self.arm, self.seed, self.schedule, self.signal, self.gate = arm, seed, schedule, signal, gate
        self.device = gate.x.device
        self.n_routed_start = self.model.n_routed
        self.curve = Curve(self.model, gate)
        self.surgeries: list[dict[str, Any]] = []
        self._rests_until: dict[tuple[int, int], int] = {}  # (block, expert id) -> step
        self._add_tasks()
        for moe in self.model.layers:
            for hyperplane in (moe.node_weight, moe.node_offset):
                hyperplane.requires_grad_(schedule.hyperplanes == "trained")
        self.controllers = self._add_controllers()

    def _add_tasks(self) -> None:
        tasks = self.arm.tasks
        self._label_maps = [torch.tensor(m, device=self.device) for m in tasks.label_maps] if tasks else []
        if tasks:
            torch.manual_seed(derived_seed(self.seed, "task heads"))
            add_tasks(self.model, self.optimizer, [max(m) + 1 for m in tasks.label_maps], tasks.own_gates)

    def _add_controllers(self) -> list[Controller]:
        """One per block; their heads train with the model's optimizer, at a learning rate of their own."""
        control = self.arm.control
        if control is None:
            return []
        torch.manual_seed(derived_seed(self.seed, "control head"))
        width = self.model.spec.architecture.width
        controllers = [control.build(width, self.device) for _ in self.model.layers]
        parameters = [parameter for controller in controllers for parameter in controller.parameters()]
        if parameters:
            factor = control.labels.head_lr / (self.schedule.lr_scale * self.training.lr)
            self.optimizer.add_param_group({"params": parameters, "lr_factor": factor, "weight_decay": 0.0})
        return controllers

    def objective(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        """The control arm's loss, plus what the arm adds to it."""
        output = self.model(x, n_tasks=1 + len(self._label_maps))
        nudge_selection(self.model, output)
        loss = main_loss(self.model, output, y, self.training.label_smoothing)
        if self.arm.tasks:
            loss = loss + self.arm.tasks.weight * further_losses(output, y, self._label_maps)
        if self.arm.entropy_weight:
            entropies = [routing_entropy(routing.probs).mean() for routing in output.routings]
            loss = loss + self.arm.entropy_weight * torch.stack(entropies).mean()
        if self.arm.control and self.arm.control.head:
            draws = generator(self.seed, "labels", step)
            for controller, moe, routing in zip(self.controllers, self.model.layers, output.routings, strict=True):
                loss = loss + controller.loss(expert_signals(routing, moe.n_routed), draws)
        return loss

    def after_step(self, step: int, loss: Tensor) -> None:
        """Operate where the controllers say so, and take a point of the learning curve."""
        self.curve.add_loss(loss)
        schedule = self.schedule
        if step % schedule.act_every == 0 and step <= schedule.steps - schedule.settle:
            for block in range(len(self.controllers)):
                self._act(block, step)
        if step % schedule.eval_every == 0 or step == schedule.steps:
            accuracy = 100 * self.curve.measure(step) / len(self.gate)
            for surgery in self.surgeries:
                if math.isnan(surgery["recovery_steps"]) and accuracy >= surgery["accuracy_before"]:
                    surgery["recovery_steps"] = step - surgery["step"]

    @torch.no_grad()
    def _act(self, block: int, step: int) -> None:
        """Ask the controller of a block for one operation on its layer, do it, and log what it did."""
        moe = self.model.layers[block]
        routing = self._probe(EVALUATION_BATCH).routings[block]
        draws = generator(self.seed, "decision", step, block)
        proposal = self.controllers[block].propose(
            expert_signals(routing, moe.n_routed), self._allowed(block, step), draws
        )
        if proposal is None:
            return
        before, right_before = self._probe(PROBE), correct(self.model, self.gate)
        surgery = self._operate(moe, proposal, routing, draws)
        after, right_after = self._probe(PROBE), correct(self.model, self.gate)
        for expert in (surgery.expert, surgery.parent):
            if expert is not None:
                self._rests_until[block, expert] = step + self.schedule.cooldown
        change = (after.logits[0] - before.logits[0]).norm() / before.logits[0].norm()
        probs_before, probs_after = (output.routings[block].probs[0] for output in (before, after))
        self.surgeries.append(
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

    def _operate(self, moe: MoE, proposal: Proposal, routing: Routing, draws: torch.Generator) -> Surgery:
        """Carry out a proposal by the arm's kind of surgery."""
        manager = ExpertManager(moe, self.optimizer)
        expert = int(moe.expert_id[proposal.expert])
        if proposal.action == "prune":
            return manager.remove(expert)
        if self.arm.grow == "clone":
            return manager.clone(expert)
        if self.arm.grow == "reinit":
            return manager.reinit(draws)
        tokens = routing.tokens[0][(routing.experts[0] == proposal.expert).any(-1)]
        return manager.split(expert, *halving_plane(tokens, self.schedule.split_direction, draws))

    def _allowed(self, block: int, step: int) -> Allowed:
        """Within the bounds on the number of experts; none that surgery touched lately."""
        moe, schedule = self.model.layers[block], self.schedule
        rested = torch.tensor([self._rests_until.get((block, expert), 0) <= step for expert in moe.expert_id.tolist()])
        has_sibling = (moe.path != 0).any(1).cpu()
        removable = has_sibling | (moe.n_families > moe.top_k)
        return Allowed(
            grow=rested & (moe.n_routed < schedule.max_experts),
            prune=rested & removable & (moe.n_routed > schedule.min_experts),
        )

    def _probe(self, examples: int) -> Output:
        """The model's output on the first examples of the signal split."""
        return predict(self.model, self.signal.x[:examples])[0]
