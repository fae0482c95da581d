"""What can be told of params.yaml before anything runs: the stage `check` asks for it, and so does the git hook.

As a program it waits for no stage that is at work, so that one may commit meanwhile.
"""

from phasegate.errors import told_by
from phasegate.memory import refuse_too_large
from phasegate.params import Params, load_params
from phasegate.phase_params import SURGERIES


def check(params: Params) -> None:
    """Raises UserError for what this machine can't hold, and for files of one's own that can't be used."""
    refuse_too_large(params)
    for name, arm in params.own.arms.items():
        for key, plugin in arm.plugins.items():
            plugin.check(f"own.arms.{name}.{key}", SURGERIES.get(key, ()))


if __name__ == "__main__":
    with told_by("check"):
        check(load_params())
