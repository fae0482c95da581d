"""Archives in the exact form of CIFAR's binary version, of images made up: learnable, and quick to make."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np

from phasegate.sources.cifar import CifarFormat

NOISE = 40  # standard deviation of an example's patches about those of its class, which has 74


def write_archive(path: Path, form: CifarFormat, seed: int = 0) -> Path:
    """Write a .tar.gz with the files that the form lists, each of the published size; returns its path.

    An image (3, 32, 32) is made of 4 x 4 even patches, which have their class's colours and noise. Every label is
    as frequent as the others; coarse labels, where the form has them, are a shuffled fifth of the fine ones.
    """
    generator = np.random.default_rng(seed)
    kinds = list(form.names.values())
    coarse = generator.permutation(kinds[-1]) % kinds[0]  # of every fine label; not stored by a form of one kind
    centres = generator.uniform(0, 255, (kinds[-1], 3, 4, 4))
    with gzip.open(path, "wb", compresslevel=1) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
        for file, labels in form.names.items():
            _add(archive, f"{form.folder}/{file}", "".join(f"label {label}\n" for label in range(labels)).encode())
        for file, records in {**form.train, **form.test}.items():
            fine = generator.permutation(records) % kinds[-1]
            patches = centres[fine] + generator.normal(0, NOISE, (records, 3, 4, 4))
            pixels = patches.clip(0, 255).astype(np.uint8).repeat(8, axis=2).repeat(8, axis=3)
            stored = np.stack([coarse[fine], fine][-len(kinds) :], axis=1).astype(np.uint8)
            _add(archive, f"{form.folder}/{file}", np.hstack([stored, pixels.reshape(records, -1)]).tobytes())
    return path


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
