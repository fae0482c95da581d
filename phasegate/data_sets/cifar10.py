"""Load CIFAR-10: see `cifar.py`."""

from functools import partial

from phasegate.data_sets.cifar import CIFAR10, load_cifar

load = partial(load_cifar, form=CIFAR10)
