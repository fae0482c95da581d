"""Data sets as their sources publish them: generated, downloaded or the user's own. No pickle is loaded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from phasegate.errors import UserError
from phasegate.sources.cifar import CIFAR10, CIFAR100, load_cifar
from phasegate.sources.fashion_mnist import load_fashion_mnist
from phasegate.sources.mnist1d import load_mnist1d
from phasegate.sources.npz import load_npz
from phasegate.sources.raw import Raw

__all__ = ["Raw", "load_cifar", "load_fashion_mnist", "load_mnist1d", "load_npz", "load_source"]

USER_SOURCES: dict[str, Callable[[Path], Raw]] = {
    "npz": load_npz,
    "cifar10": partial(load_cifar, form=CIFAR10),
    "cifar100": partial(load_cifar, form=CIFAR100),
}


def load_source(name: str, raw_dir: Path, path: Path | None) -> Raw:
    """Load a data set by name: mnist1d, fashion_mnist, or from a user's `path` npz, cifar10 or cifar100.

    `raw_dir` keeps downloads. Raises UserError for an unknown name or data that can't be used.
    """
    if name == "mnist1d":
        return load_mnist1d()
    if name == "fashion_mnist":
        return load_fashion_mnist(raw_dir)
    if name not in USER_SOURCES:
        raise UserError(f"data set is {name!r}: it must be mnist1d, fashion_mnist, {', '.join(USER_SOURCES)}")
    if path is None or not path.exists():
        raise UserError(f"data path is {str(path)!r}: data set {name} needs the path of an existing file")
    return USER_SOURCES[name](path)
