"""Run the surgery study: planned operations at the same steps, done in each way that there is."""

from functools import partial

from phasegate.params import Params
from phasegate.params.fields import override
from phasegate.stage import run
from phasegate.surgery.continuation import Arm, run_phase
from phasegate.surgery.controllers import PlannedPolicy
from phasegate.surgery.surgeon import Treatment


def main(params: Params) -> None:
    """Compare kinds of growth, splits by other hyperplanes, pruning of trained experts, and splits that merges undo."""
    operations = params.surgery.operations
    half = operations // 2
    grow = PlannedPolicy(operations)
    changed = partial(override, params.p7b, where="p7b")
    arms = {
        "split": Arm(Treatment(grow)),
        "clone": Arm(Treatment(grow, grow="clone")),
        "clone_carried": Arm(Treatment(grow, grow="clone", moments="carried")),
        "reinit": Arm(Treatment(grow, grow="reinit")),
        "remove_by_usage": Arm(Treatment(PlannedPolicy(0, half, "usage"))),
        "remove_by_loss": Arm(Treatment(PlannedPolicy(0, half, "loss"))),
        "merge": Arm(Treatment(PlannedPolicy(half, half, "loss"), prune="merge")),
        "split_loss": Arm(Treatment(grow), schedule=changed({"split_direction": "loss", "hyperplanes": "fixed"})),
        "split_trained": Arm(
            Treatment(grow), schedule=changed({"split_direction": "random", "hyperplanes": "trained"})
        ),
        "split_balanced": Arm(
            Treatment(grow), schedule=changed({"split_direction": "random", "hyperplanes": "balanced"})
        ),
    }
    run_phase("surgery", arms, params)


if __name__ == "__main__":
    run(main)
