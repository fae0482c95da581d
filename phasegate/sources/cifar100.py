"""Load CIFAR-100: see `cifar.py`."""

from functools import partial

from phasegate.sources.cifar import CIFAR100, load_cifar

load = partial(load_cifar, form=CIFAR100)
