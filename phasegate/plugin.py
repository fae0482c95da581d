"""Import from here in `plugins/`: all that a signal or a surgery of your own needs (docs/extending.md)."""

from phasegate.signals.published import Scores
from phasegate.surgery.operations import ExpertManager, Surgery, SurgeryRefused
from phasegate.surgery.probe import Probe

__all__ = ["ExpertManager", "Probe", "Scores", "Surgery", "SurgeryRefused"]
