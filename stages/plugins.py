"""Run the arms that `plugins.arms` describes, with signals and surgeries from `plugins/`. There may be none."""

from phasegate.params import Params
from phasegate.params.names import PLUGINS
from phasegate.signals.plugin_arms import plugin_arms
from phasegate.stage import run
from phasegate.surgery.continuation import run_phase


def main(params: Params) -> None:
    """Continue the 7a checkpoints under every arm that the parameters describe."""
    run_phase(PLUGINS, plugin_arms(params), params)


if __name__ == "__main__":
    run(main)
