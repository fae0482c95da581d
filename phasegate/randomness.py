"""Random numbers without hidden state: every draw has a generator seeded by what it is for.

A trial resumed at step 400 draws what it would have drawn undisturbed, and two arms with the same seed see the
same batches, since a draw depends on its name and step alone, not on the draws before it.
"""

import hashlib

import torch


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed from a seed, a purpose and, for repeated draws, a step."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one purpose, as in `generator(seed, "batches", epoch)`."""
    return torch.Generator().manual_seed(derived_seed(*key))


def seed_default_generators(seed: int) -> None:
    """What `torch.manual_seed` does for the devices that trials run on, fast enough for every step.

    (That function also queues a call with a formatted stack trace for every kind of device that is absent.)
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
