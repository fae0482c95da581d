"""Draw random numbers without hidden state: every draw has a generator that is seeded by its purpose.

A draw depends on its name and its step alone, not on earlier draws. So a trial that resumes at step 400 draws what it
would have drawn undisturbed, and two arms with the same seed see the same batches.
"""

import hashlib

import torch


def derived_seed(*key: int | str) -> int:
    """Derive a 63-bit seed from a seed, a purpose and, for repeated draws, a step."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator for one purpose, as in `generator(seed, "batches", epoch)`."""
    return torch.Generator().manual_seed(derived_seed(*key))


def seed_default_generators(seed: int) -> None:
    """Seed the default generators of the CPU and of initialized GPUs, faster than `torch.manual_seed`."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
