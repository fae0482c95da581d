"""phasegate: phase experiments on a mixture-of-experts classifier.

`phasegate.load` gives a trained model, for use outside the pipeline: see `phasegate.inference`, docs/models.md.
"""

import importlib
import os

PARENT = os.getppid()  # who started this process; read before anything slow is imported, for it may be killed meanwhile


def __getattr__(name: str) -> object:
    """What `phasegate.inference` offers, imported when asked for: stages import this package, many without torch.

    Type checkers read `__init__.pyi` instead.
    """
    if name in ("Classifier", "load"):
        return getattr(importlib.import_module("phasegate.inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
