"""Run phase 7c.1: a model that started too small grows while it is trained."""

from phasegate.base.paths import MODELS
from phasegate.params import Params
from phasegate.stage import run
from phasegate.surgery.growing import grown, late_trials, load_rates, operators
from phasegate.trials.run import run_trials


def main(params: Params) -> None:
    """Compare births at three steps, other ways to grow, and models that stay small or were large at the start."""
    rates, times, known = load_rates(), params.p7c1, operators(params)
    arms = {
        "small": known["small"],
        "large": known["large"],
        "birth": known["birth"],
        "birth_early": ("early", grown(params, "birth", times.early)),
        "birth_late": ("late", grown(params, "birth", times.late)),
        "birth_short": ("short", grown(params, "birth", times.at)),
        "handover": known["handover"],
        "upcycle": known["upcycle"],
        "upcycle_carried": known["upcycle_carried"],
        "reinit": known["reinit"],
        "split": known["split"],
    }
    plans = {
        name: (*arms[name], rates[name if name in rates else "birth"]) for name in params.decisions.phases["p7c1"].arms
    }
    run_trials(late_trials(params, "p7c1", params.seeds.all, plans), MODELS / "p7c1")


if __name__ == "__main__":
    run(main)
