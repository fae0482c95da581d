"""Train the control heads of phase 7b.4: from other seeds' surveys they predict what surgery would do, and how surely.

Labels are few and noisy, with known standard errors, and a decision needs the standard error of the prediction. So a
head is a Gaussian process (Rasmussen & Williams 2006, chapters 2 and 5). A change is the sum of a function of the
features, a part that all experts of a seed share, a part of the expert itself, and the noise of the label.

Shapes: E experts, F features, C changes (the kinds of `CHANGES`), n measured experts, S sizes.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from phasegate.base.errors import UserError, one_line
from phasegate.base.files import write_atomic
from phasegate.records.tables import read_table
from phasegate.records.trial_folder import finished
from phasegate.signals.features import CHANGES, FEATURES
from phasegate.signals.forks import Estimate
from phasegate.signals.roots import root
from phasegate.trials.trial import Trial

SIZES = {"constant": 1.0, "linear": 1.0, "smooth": 0.5, "reach": 1.0, "seed": 0.2, "expert": 0.2}
"""Standard deviations of the parts of a change, relative to its root mean square; and the reach of the smooth part,
relative to the typical distance of two experts. Training starts from these values, and draws the sizes towards them."""
SEED, EXPERT = list(SIZES).index("seed"), list(SIZES).index("expert")
SPREAD = 1.0  # of the logarithms of the sizes, a priori
STEPS, RATE = 50, 0.1
MOST_ROWS = 1000
UNKNOWN = 1e6  # variance of a label that was not measured
HEAD, SURVEY = "head.safetensors", "survey.csv"
ERRORS = tuple(f"{change}_error" for change in CHANGES)


@dataclass(frozen=True, eq=False)
class CounterfactualHead:
    """Predict changes (E, C) from features (E, F), in nats with standard errors: a Gaussian process per change."""

    centre: Tensor  # (F,) of the features
    scale: Tensor  # (F,)
    unit: Tensor  # (C,) nats
    seen: Tensor  # (n, F) standardised features
    log_sizes: Tensor  # (C, S) of the parts of `SIZES`
    factor: Tensor  # (C, n, n) Cholesky factor of the labels' covariance
    weights: Tensor  # (C, n) its inverse times the labels

    @torch.no_grad()
    def predict(self, features: Tensor) -> Estimate:
        """Predict the changes (E, C) of the experts of a seed that was never seen, with standard errors."""
        x = standardised(features, self.centre, self.scale)
        shared = covariance(x, self.seen, self.log_sizes)  # (C, E, n)
        known = torch.linalg.solve_triangular(self.factor, shared.mT, upper=False).square().sum(1)  # (C, E)
        prior = covariance(x, x, self.log_sizes).diagonal(dim1=-2, dim2=-1)
        unknown = (2 * self.log_sizes[:, [SEED, EXPERT]]).exp().sum(1, keepdim=True)
        variance = (prior - known).clamp(min=0) + unknown
        change = (shared @ self.weights[:, :, None])[..., 0]
        return Estimate((change.T * self.unit).float(), (root(variance).T * self.unit).float())


def standardised(features: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """Return features as the process sees them; beyond four standard deviations it does not extrapolate."""
    return ((features.double() - centre) / scale).clamp(-4, 4)


def covariance(x: Tensor, y: Tensor, log_sizes: Tensor) -> Tensor:
    """Return the prior covariance (C, A, B) of the changes at standardised features x (A, F) and y (B, F).

    It has a constant, a linear and a smooth part, with sizes (C, S). The parts of seeds and experts are left out.
    """
    constant, linear, smooth, reach = log_sizes.exp().T[:SEED, :, None, None]
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / x.shape[1]  # see `root`
    products = x @ y.T / x.shape[1]
    prior: Tensor = constant**2 + linear**2 * products + smooth**2 * (-distances / (2 * reach**2)).exp()
    return prior


def heads(surveys: Path, seeds: range) -> list[Trial]:
    """List the trials of all seeds: the head of seed s learns from `surveys`/seed-t of all others that did not fail.

    `UserError` if no survey is left for a head to learn from.
    """
    folders, trials = finished(surveys / f"seed-{seed}" for seed in seeds), []
    for seed in seeds:
        files = tuple(folder / SURVEY for folder in folders if folder != surveys / f"seed-{seed}")
        if not files:
            raise UserError(f"no control head can be trained for seed {seed}: the surveys of all other seeds failed")
        trials.append(Trial("heads", "", seed, learn, {"surveys": files, "seed": seed}, files))
    return trials


def learn(folder: Path, *, surveys: tuple[Path, ...], seed: int) -> None:
    """Train one head on survey files, and write `folder/head.safetensors`."""
    tables = [read_table(file, ("seed", *FEATURES, *CHANGES, *ERRORS)) for file in surveys]
    save_head(train_head(pd.concat(tables, ignore_index=True), seed), folder)


def train_head(surveys: pd.DataFrame, seed: int) -> CounterfactualHead:
    """Train a head on the rows of `surveys`: columns `FEATURES`, seed, and per change a label and its error.

    A blank label was not measured; `UserError` if no label of some kind was. Of more than `MOST_ROWS` rows, that many
    are drawn by `seed`. The sizes of the prior's parts are those with the greatest posterior, under log-normal priors
    around `SIZES`.
    """
    if len(surveys) > MOST_ROWS:
        surveys = surveys.sample(MOST_ROWS, random_state=seed)
    features, labels, errors = (
        torch.tensor(surveys[list(names)].to_numpy(), dtype=torch.float64) for names in (FEATURES, CHANGES, ERRORS)
    )
    known = (labels.isfinite() & errors.isfinite()).T  # (C, n)
    if not known.any(1).all():
        missing = CHANGES[int(known.any(1).int().argmin())]
        raise UserError(f"the surveys hold no measured change of kind {missing}: a control head can't learn it")
    centre, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    seen = standardised(features, centre, scale).contiguous()  # rounding depends on the order in memory
    labels, errors = labels.T.where(known, 0), errors.T.where(known, 0)
    unit = root(labels.square().sum(1) / known.sum(1)).clamp(min=1e-12)
    y, noise = labels / unit[:, None], (errors / unit[:, None]).square().where(known, UNKNOWN)
    seeds = torch.tensor(surveys["seed"].to_numpy())
    same_seed = (seeds[:, None] == seeds).double()
    usual = torch.tensor(list(SIZES.values()), dtype=torch.float64).log()
    log_sizes = usual.repeat(len(CHANGES), 1).requires_grad_()
    optimizer = torch.optim.Adam([log_sizes], lr=RATE, fused=True)
    for _ in range(STEPS):
        factor, weights = _solve(seen, same_seed, noise, y, log_sizes)
        fit = (y * weights).sum() / 2 + factor.diagonal(dim1=-2, dim2=-1).log().sum()
        loss = fit + ((log_sizes - usual) / SPREAD).square().sum() / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    log_sizes = log_sizes.detach()
    factor, weights = _solve(seen, same_seed, noise, y, log_sizes)
    return CounterfactualHead(centre, scale, unit, seen, log_sizes, factor.contiguous(), weights.contiguous())


def _solve(x: Tensor, same_seed: Tensor, noise: Tensor, y: Tensor, log_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor (C, n, n) of the covariance of labels y (C, n), and its inverse times y."""
    of_seed, of_expert = (2 * log_sizes[:, [SEED, EXPERT]]).exp().T[:, :, None]
    total = covariance(x, x, log_sizes) + of_seed[..., None] * same_seed + (of_expert + noise).diag_embed()
    factor = torch.linalg.cholesky(total)
    return factor, torch.cholesky_solve(y[:, :, None], factor)[..., 0]


def save_head(head: CounterfactualHead, folder: Path) -> None:
    """Write `folder/head.safetensors`."""
    write_atomic(folder / HEAD, safetensors.torch.save(vars(head)))


def load_head(folder: Path, device: torch.device | str = "cpu") -> CounterfactualHead:
    """Read the head that `save_head` left in a folder; `UserError` if the file is missing or is not such a head."""
    path = folder / HEAD
    try:
        tensors = safetensors.torch.load_file(path, str(device))
        head = CounterfactualHead(**{name: tensor.double() for name, tensor in tensors.items()})
        n, f, c = len(head.seen), len(FEATURES), len(CHANGES)
        shapes = [(f,), (f,), (c,), (n, f), (c, len(SIZES)), (c, n, n), (c, n)]
        if [tuple(tensor.shape) for tensor in vars(head).values()] != shapes:
            raise ValueError("the sizes of its tensors do not fit together")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the stage that writes it has not ended") from None
    except (SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a control head: {one_line(error)}") from None
    return head
