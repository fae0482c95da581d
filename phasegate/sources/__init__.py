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

SOURCES: dict[str, Callable[[Path], Raw]] = {
    "mnist1d": lambda path: load_mnist1d(),
    "fashion_mnist": load_fashion_mnist,
    "npz": load_npz,
    "cifar10": partial(load_cifar, form=CIFAR10),
    "cifar100": partial(load_cifar, form=CIFAR100),
}


def load_source(name: str, path: Path) -> Raw:
    """Load a data set by name, from `path`: a folder that keeps downloads, or the user's own file.

    Raises UserError for an unknown name or data that can't be used.
    """
    if name not in SOURCES:
        raise UserError(f"data set is {name!r}: it must be one of {', '.join(SOURCES)}")
    try:
        if not path.exists():
            raise UserError(f"data path is {str(path)!r}, which does not exist")
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"data path is {str(path)!r}, which is neither a file nor a folder")
        return SOURCES[name](path)
    except OSError as error:
        raise UserError(f"data path is {str(path)!r}, which can't be used ({error.strerror or error})") from error
