"""Run phase experiments on a mixture-of-experts classifier.

`phasegate.load` loads a trained model outside the pipeline: see `phasegate.inference` and docs/models.md.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phasegate.inference import Classifier as Classifier
    from phasegate.inference import load as load


def __getattr__(name: str) -> object:
    """Import what `phasegate.inference` offers only when it is asked for: many stages do without torch."""
    if name in ("Classifier", "load"):
        return getattr(importlib.import_module("phasegate.inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
