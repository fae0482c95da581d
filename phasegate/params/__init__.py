"""Parse params.yaml into typed, checked, frozen objects."""

from phasegate.params.study import Params, load_params

__all__ = ["Params", "load_params"]
