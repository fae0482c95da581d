"""Run the arms that `plugins.arms` describes, with signals and surgeries from `plugins/`. There may be none."""

from phasegate.base.files import write_atomic
from phasegate.base.paths import BASELINES, MODELS, PREPARED
from phasegate.params import Params
from phasegate.params.names import PLUGINS
from phasegate.signals.plugin_arms import plugin_arms
from phasegate.stage import run
from phasegate.surgery.continuation import continuations
from phasegate.surgery.growing import late_trials, load_rates
from phasegate.trials.run import run_trials


def main(params: Params) -> None:
    """Run every arm that the parameters describe, in the phase where it acts."""
    seeds, rates = params.seeds.all, load_rates()
    arms = plugin_arms(params, "p7b") | plugin_arms(params, "p7c3")
    trials = continuations(PREPARED, BASELINES, PLUGINS, arms, seeds, params.p7b)
    arriving = {name: ("few", arm, rates["small"]) for name, arm in plugin_arms(params, "p7c2", rates).items()}
    trials += late_trials(params, PLUGINS, seeds, arriving)
    run_trials(trials, MODELS / PLUGINS)
    if not trials:
        write_atomic(MODELS / PLUGINS / "none", "")  # DVC warns of an empty folder, whenever it saves or hashes one


if __name__ == "__main__":
    run(main)
