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
