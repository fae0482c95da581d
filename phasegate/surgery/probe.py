"""Look at a layer as it runs on some examples; passes are made when their results are first asked for.

Shapes: B examples, S tokens per example, N = B * S tokens, D model width, E experts, K chosen.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.model.classifier import Model
from phasegate.model.moe import MoE, Routing
from phasegate.model.routing_statistics import ExpertSignals, expert_signals
from phasegate.training.batches import Examples
from phasegate.training.predictions import EVALUATION_BATCH


class Probe:
    """Show what one layer does on a split, as the model stands now.

    Results are kept, so a probe must not outlive a training step or a surgery. Examples beyond the first
    `EVALUATION_BATCH` are left out.
    """

    def __init__(self, model: Model, block: int, examples: Examples) -> None:
        self.model, self.block = model, block
        self.examples = Examples(examples.x[:EVALUATION_BATCH], examples.y[:EVALUATION_BATCH])

    @property
    def layer(self) -> MoE:
        return self.model.layers[self.block]

    @property
    def length(self) -> int:
        """Return S, the tokens per example."""
        return self.stream.shape[1] // len(self.examples)

    @property
    def stream(self) -> Tensor:
        """Return what the layer's block is given, (1, N, D)."""
        return self._pass[0]

    @property
    def routing(self) -> Routing:
        """Return how the layer routes its tokens, without a graph."""
        return self._pass[1]

    @property
    def losses(self) -> Tensor:
        """Return the loss of every example on the first task, nats (B,)."""
        return self._pass[2]

    @cached_property
    def _pass(self) -> tuple[Tensor, Routing, Tensor]:
        given: list[Tensor] = []
        hook = self.model.blocks[self.block].register_forward_pre_hook(lambda block, args: given.append(args[0]))
        with hook, torch.no_grad():
            output = self.model.eval()(self.examples.x)
            losses = F.cross_entropy(output.logits[0], self.examples.y, reduction="none")
        return given[0], output.routings[self.block], losses

    @cached_property
    def signals(self) -> ExpertSignals:
        return expert_signals(self.routing, self.layer.n_routed)

    @cached_property
    def visits(self) -> Tensor:
        """Return the gate of every token for every expert that it runs, else zero, (N, E)."""
        routing = self.routing
        empty = routing.tokens.new_zeros(routing.tokens.shape[1], self.layer.n_routed)
        return empty.scatter(1, routing.experts[0], routing.gates[0])

    @cached_property
    @torch.no_grad()
    def outputs(self) -> Tensor:
        """Return what each chosen expert puts out for a token, without its gate, (N, K, D)."""
        return self.layer.outputs(self.routing.tokens, self.routing.experts)[0]

    @cached_property
    @torch.no_grad()
    def contributions(self) -> Tensor:
        """Return what each chosen expert adds to a token, gate included, (N, K, D)."""
        return self.routing.gates[0].unsqueeze(-1) * self.outputs

    @cached_property
    def slopes(self) -> Tensor:
        """Return the gradient of the mean loss with respect to the layer's output, (N, D)."""
        outputs: list[Tensor] = []
        hook = self.layer.register_forward_hook(lambda layer, x, y: outputs.append(y[0]))
        with hook, torch.enable_grad():
            logits = self.model.eval()(self.examples.x).logits[0]
            (slopes,) = torch.autograd.grad(F.cross_entropy(logits, self.examples.y), outputs)
        return slopes[0]

    def tokens_of(self, e: int) -> Tensor:
        """Return the tokens that expert index e runs, (M, D)."""
        return self.routing.tokens[0][(self.routing.experts[0] == e).any(-1)]

    def share_of_copy(self, e: int) -> float:
        """Return what gate either copy of expert index e would get on its tokens, relative to the expert's own gate.

        Where the expert is a token's last choice, one of the two is chosen; elsewhere both are, and the last choice
        goes. An expert without tokens has halves.
        """
        gates, runs = self.routing.gates[0], self.routing.experts[0] == e  # (N, K)
        copies = gates / (1 + gates - gates[:, -1:]).clamp(min=1)  # below one by a selection bias alone
        copies[:, -1] /= 2
        own = gates[runs].sum()
        return float(copies[runs].sum() / own) if own else 0.5

    def per_expert(self, values: Tensor) -> Tensor:
        """Sum values of token slots (N, K) by the expert that they belong to -> (E,)."""
        return values.new_zeros(self.layer.n_routed).index_add(0, self.routing.experts[0].flatten(), values.flatten())
