"""Run phase 7c.2: classes arrive in the middle of training, and a model grows when they do."""

from phasegate.base.paths import MODELS
from phasegate.params import Params
from phasegate.signals.ground_truth import MeasuredPolicy
from phasegate.stage import run
from phasegate.surgery.continuation import Arm
from phasegate.surgery.controllers import Policy, TimedPolicy
from phasegate.surgery.growing import grown, late_trials, load_rates, restart
from phasegate.surgery.surgeon import Treatment
from phasegate.trials.run import run_trials


def main(params: Params) -> None:
    """Compare a controller that measures whether to grow with growth when told, at a time that is drawn, and none."""
    rates, arrival, truth, growing = load_rates(), params.p7c2, params.p7b4, params.p7c
    policy = MeasuredPolicy(truth.price, truth.certainty, 1, arrival.recovery_steps, arrival.repeats, 1)
    yoked = TimedPolicy(tuple(range(arrival.at, growing.steps - growing.settle + 1, growing.act_every)))

    def growing_by(policy: Policy) -> Arm:
        return Arm(Treatment(policy, "birth", None, count=growing.added("birth"), expert_rate=rates["birth"]))

    arms = {
        "stay": ("few", Arm(), rates["small"]),
        "large": ("few_large", Arm(), rates["large"]),
        "measured": ("few", growing_by(policy), rates["small"]),
        "informed": ("few", grown(params, "birth", arrival.at), rates["birth"]),
        "yoked": ("few", growing_by(yoked), rates["small"]),
        "restart": None,
        "split": ("few", grown(params, "split", arrival.at), rates["split"]),
    }
    trials, seeds = [], params.seeds.all
    for name in params.decisions.phases["p7c2"].arms:
        if plan := arms[name]:
            trials += late_trials(params, "p7c2", seeds, {name: plan})
        else:
            trials += [restart(params, "p7c2", name, seed, rates["large"]) for seed in seeds]
    run_trials(trials, MODELS / "p7c2")


if __name__ == "__main__":
    run(main)
