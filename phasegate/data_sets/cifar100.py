"""Load CIFAR-100: see `cifar.py`."""

from functools import partial

from phasegate.data_sets.cifar import CIFAR100, load_cifar

load = partial(load_cifar, form=CIFAR100)
