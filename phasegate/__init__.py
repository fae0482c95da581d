"""Run phase experiments on a mixture-of-experts classifier.

`phasegate.load` loads a trained model outside the pipeline: see `phasegate.inference` and docs/models.md.

Numpy and torch choose their kernels by the processor, and kernels round differently. They read the settings below when
they are imported or first used, and everything that imports them imports this module first. With these settings, every
x86-64 processor with AVX2 gives the same bits. Elsewhere nothing is set, and nothing of the kind is promised.
"""

import importlib
import os
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

from phasegate.base import processor

if TYPE_CHECKING:
    from phasegate.inference import Classifier as Classifier
    from phasegate.inference import load as load

NUMPY = tuple(map(int, version("numpy").split(".")[:2]))
PROMISED = processor.has_avx2()
PINNED = {
    "MKL_CBWR": "COMPATIBLE",  # torch's products, and what solves equations
    "ATEN_CPU_CAPABILITY": "avx2",  # its other functions
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # its convolutions
    "OPENBLAS_CORETYPE": "Haswell",  # products of numpy and scipy
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"  # numpy's functions
    if NUMPY >= (2, 4)
    else "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",  # it warns of unknown names
}


def _pin() -> str:
    """Set the environment; return "", or a sentence if numpy or torch were imported before, without it."""
    early = [name for name in ("numpy", "torch") if name in sys.modules]
    unset = [name for name, value in PINNED.items() if os.environ.get(name) != value]
    os.environ.update(PINNED)
    if not (early and unset):
        return ""
    return f"{' and '.join(early)} came before phasegate, so bits may differ between processors: import phasegate first"


UNPINNED = _pin() if PROMISED else ""


def __getattr__(name: str) -> object:
    """Import what `phasegate.inference` offers only when it is asked for: many stages do without torch."""
    if name in ("Classifier", "load"):
        return getattr(importlib.import_module("phasegate.inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
