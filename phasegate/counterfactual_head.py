"""The control head of phase 7b.4: it learns from other seeds' measurements what surgery would do, and how surely.

Labels are few, noisy, and come with standard errors, and a decision needs the prediction's: so the head is a Gaussian
process (Rasmussen & Williams 2006, chapters 2 and 5). A change is a function of the features, plus something that all
experts of a seed share, plus something of the expert's own that features can't tell, plus the known noise of the label.

Shapes: E experts, F features, C changes (the kinds of `CHANGES`), n measured experts, S sizes.
"""

import math
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from phasegate.counterfactual import Estimate
from phasegate.errors import UserError, one_line
from phasegate.expert_manager import ExpertManager
from phasegate.failure import finished
from phasegate.files import write_atomic
from phasegate.importance import gate_times_norm, gradmax, taylor_saliency
from phasegate.moe import relative_distance
from phasegate.probe import Probe
from phasegate.signals import expert_signals
from phasegate.table_files import read_table
from phasegate.trials import Trial

PRUNE, RECOVERED, GROW = range(3)
CHANGES = ("prune", "recovered", "grow")
"""Changes of the loss: a removal at once, a removal after recovery steps, a split after as many steps."""
FEATURES = (
    *("load", "gate", "entropy", "relative_entropy", "output", "weights_in", "weights_out"),
    *("saliency", "relative_saliency", "relative_gradient", "age", "has_sibling", "sibling_distance"),
    *("layer_entropy", "layer_experts", "model_loss", "progress"),
)
"""What the head reads of each expert; the last four are the same for all experts of a layer."""
SIZES = {"constant": 1.0, "linear": 1.0, "smooth": 0.5, "reach": 1.0, "seed": 0.2, "expert": 0.2}
"""Standard deviations of the parts of a change, relative to its root mean square; and the reach of the smooth part,
relative to the typical distance of two experts. Where training begins, and what it is drawn to."""
SEED, EXPERT = list(SIZES).index("seed"), list(SIZES).index("expert")
SPREAD = 1.0  # of the logarithms of the sizes, a priori
STEPS, RATE = 50, 0.1
MOST_ROWS = 1000
UNKNOWN = 1e6  # variance of a label that was not measured
HEAD, SURVEY = "head.safetensors", "survey.csv"
LEARNED = ("seed", *FEATURES, *CHANGES, *(f"{change}_error" for change in CHANGES))
"""What a head reads of a survey."""


@torch.no_grad()
def describe(probe: Probe, ages: Tensor, progress: float) -> Tensor:
    """The features of a layer's experts, (E, F).

    Args:
        ages: (E,) steps of training since each expert was made.
        progress: the share of the phase that is over.
    """
    layer, draws = probe.layer, torch.Generator()  # none of the signals read here draws
    signals = expert_signals(probe.routing, layer.n_routed)
    saliency, output = taylor_saliency(probe, draws).prune, gate_times_norm(probe, draws).prune
    gradient = gradmax(probe, draws).grow
    assert saliency is not None and output is not None and gradient is not None
    manager, ids = ExpertManager(layer), layer.expert_id.tolist()
    siblings = [manager.sibling(expert) for expert in ids]
    distances = [
        0.0 if other is None else relative_distance(layer.weights(e), layer.weights(ids.index(other)))
        for e, other in enumerate(siblings)
    ]
    columns = [
        signals.load * layer.n_routed,
        signals.gate,
        signals.entropy,
        10 * (signals.entropy / signals.batch_entropy.clamp(min=1e-12) - 1),
        _relative(output),
        _relative(layer.w_in.square().sum((1, 2)).sqrt()),
        _relative(layer.w_out.square().sum((1, 2)).sqrt()),
        saliency.clamp(min=1e-6).log(),
        _relative(saliency),
        _relative(gradient),
        ages.to(saliency).clamp(min=1).log(),
        torch.tensor([float(other is not None) for other in siblings]).to(saliency),
        torch.tensor(distances).to(saliency),
    ]
    shared = [float(signals.batch_entropy), math.log(layer.n_routed), float(probe.losses.mean()), progress]
    return torch.stack([*columns, *(torch.full_like(saliency, value) for value in shared)], dim=1)


def _relative(values: Tensor) -> Tensor:
    """The logarithm of values (E,) relative to their mean; a hundredth of it at least."""
    return (values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)).clamp(min=0.01).log()


class CounterfactualHead(nn.Module):
    """Features (E, F) -> predicted changes with standard errors, (E, C) in nats: a Gaussian process per change.

    Args:
        rows: n, how many measured experts it holds.
    """

    centre: Tensor  # (F,) of the features
    scale: Tensor  # (F,)
    unit: Tensor  # (C,) nats
    seen: Tensor  # (n, F) standardised features
    log_sizes: Tensor  # (C, S) of the parts of `SIZES`
    factor: Tensor  # (C, n, n) Cholesky factor of the labels' covariance
    weights: Tensor  # (C, n) its inverse times the labels

    def __init__(self, rows: int) -> None:
        super().__init__()
        n, f, c = rows, len(FEATURES), len(CHANGES)
        shapes = {"centre": (f,), "scale": (f,), "unit": (c,), "seen": (n, f), "log_sizes": (c, len(SIZES))}
        for name, shape in (shapes | {"factor": (c, n, n), "weights": (c, n)}).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    @torch.no_grad()
    def predict(self, features: Tensor) -> Estimate:
        """Features (E, F) -> changes (E, C), and the standard errors of an expert of a seed never seen."""
        x = self.standardised(features)
        shared = covariance(x, self.seen, self.log_sizes)  # (C, E, n)
        told = torch.linalg.solve_triangular(self.factor, shared.mT, upper=False).square().sum(1)  # (C, E)
        own = covariance(x, x, self.log_sizes).diagonal(dim1=-2, dim2=-1)
        untold = (2 * self.log_sizes[:, [SEED, EXPERT]]).exp().sum(1, keepdim=True)
        variance = (own - told).clamp(min=0) + untold
        change = (shared @ self.weights[:, :, None])[..., 0]
        return Estimate((change.T * self.unit).float(), (variance.sqrt().T * self.unit).float())

    def standardised(self, features: Tensor) -> Tensor:
        """Features as the process sees them; beyond four standard deviations it does not extrapolate."""
        return ((features.double() - self.centre) / self.scale).clamp(-4, 4)


def covariance(x: Tensor, y: Tensor, log_sizes: Tensor) -> Tensor:
    """Prior covariance of the changes at standardised features x (A, F) and y (B, F), seeds and experts apart.

    A constant, a linear and a smooth part, with sizes (C, S) -> (C, A, B).
    """
    constant, linear, smooth, reach = log_sizes.exp().T[:SEED, :, None, None]
    products, distances = x @ y.T / x.shape[1], torch.cdist(x, y).square() / x.shape[1]
    prior: Tensor = constant**2 + linear**2 * products + smooth**2 * (-distances / (2 * reach**2)).exp()
    return prior


def heads(surveys: Path, seeds: int) -> list[Trial]:
    """The trials of all seeds: the head of seed s learns from `surveys`/seed-t of all others that did not fail.

    Raises:
        UserError: if no survey is left for a head to learn from.
    """
    folders = finished(surveys / f"seed-{seed}" for seed in range(seeds))
    others = {
        seed: tuple(folder / SURVEY for folder in folders if folder != surveys / f"seed-{seed}")
        for seed in range(seeds)
    }
    if lonely := [seed for seed, files in others.items() if not files]:
        raise UserError(f"no control head can be trained for seed {lonely[0]}: the surveys of all other seeds failed")
    return [
        Trial(f"seed-{seed}", learn, {"surveys": others[seed], "seed": seed}, others[seed]) for seed in range(seeds)
    ]


def learn(folder: Path, *, surveys: tuple[Path, ...], seed: int) -> None:
    """Train one head on survey files, and write `folder/head.safetensors`."""
    tables = [read_table(file, LEARNED) for file in surveys]
    save_head(train_head(pd.concat(tables, ignore_index=True), seed), folder)


def train_head(surveys: pd.DataFrame, seed: int) -> CounterfactualHead:
    """A head that learns the rows of `surveys`: columns `FEATURES`, seed, and per change a label and its error.

    A blank label is one that was not measured. Of more than `MOST_ROWS`, so many are drawn by `seed`. The sizes of
    the prior's parts are those with the greatest posterior, under log-normal priors around `SIZES`.

    Raises:
        UserError: if no row has a label of some kind.
    """
    if len(surveys) > MOST_ROWS:
        surveys = surveys.sample(MOST_ROWS, random_state=seed)
    features, labels, errors = (
        torch.tensor(surveys[list(columns)].to_numpy(), dtype=torch.float64)
        for columns in (FEATURES, CHANGES, [f"{change}_error" for change in CHANGES])
    )
    known = (labels.isfinite() & errors.isfinite()).T  # (C, n)
    if not known.any(1).all():
        missing = CHANGES[int(known.any(1).int().argmin())]
        raise UserError(f"the surveys hold no measured change of kind {missing}: a control head can't learn it")
    head = CounterfactualHead(len(surveys))
    head.centre.copy_(features.mean(0))
    head.scale.copy_(features.std(0, correction=0).clamp(min=1e-6))
    head.seen.copy_(head.standardised(features))
    labels, errors = labels.T.where(known, 0), errors.T.where(known, 0)
    head.unit.copy_((labels.square().sum(1) / known.sum(1)).sqrt().clamp(min=1e-12))
    y, noise = labels / head.unit[:, None], (errors / head.unit[:, None]).square().where(known, UNKNOWN)
    names = torch.tensor(surveys["seed"].to_numpy())
    same_seed = (names[:, None] == names).double()
    usual = torch.tensor(list(SIZES.values()), dtype=torch.float64).log()
    log_sizes = usual.repeat(len(CHANGES), 1).requires_grad_()
    optimizer = torch.optim.Adam([log_sizes], lr=RATE)
    for _ in range(STEPS):
        factor, weights = _solve(head.seen, same_seed, noise, y, log_sizes)
        fit = (y * weights).sum() / 2 + factor.diagonal(dim1=-2, dim2=-1).log().sum()
        loss = fit + ((log_sizes - usual) / SPREAD).square().sum() / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        head.log_sizes.copy_(log_sizes)
        for kept, found in zip(
            (head.factor, head.weights), _solve(head.seen, same_seed, noise, y, log_sizes), strict=True
        ):
            kept.copy_(found)
    return head


def _solve(x: Tensor, same_seed: Tensor, noise: Tensor, y: Tensor, log_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor (C, n, n) of the covariance of labels y (C, n), and its inverse times y."""
    of_seed, of_expert = (2 * log_sizes[:, [SEED, EXPERT]]).exp().T[:, :, None]
    total = covariance(x, x, log_sizes) + of_seed[..., None] * same_seed + (of_expert + noise).diag_embed()
    factor = torch.linalg.cholesky(total)
    return factor, torch.cholesky_solve(y[:, :, None], factor)[..., 0]


def save_head(head: CounterfactualHead, folder: Path) -> None:
    """Write `folder/head.safetensors`."""
    write_atomic(folder / HEAD, safetensors.torch.save(head.state_dict()))


def load_head(folder: Path) -> CounterfactualHead:
    """The head that `save_head` left in a folder.

    Raises:
        UserError: if the file is missing or is not such a head.
    """
    path = folder / HEAD
    try:
        tensors = safetensors.torch.load_file(path)
        head = CounterfactualHead(len(tensors["seen"]))
        head.load_state_dict(tensors)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the stage that writes it has not ended") from None
    except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a control head: {one_line(error)}") from None
    return head
