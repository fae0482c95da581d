"""Run phase 7b.3: a fixed number of experts, several tasks with parameters of their own."""

from phasegate.base.paths import PREPARED
from phasegate.params import Params
from phasegate.records.prepared import load_meta
from phasegate.stage import run
from phasegate.surgery.continuation import Arm, run_phase
from phasegate.surgery.tasks import Tasks


def main(params: Params) -> None:
    """Add tasks from the data set's label maps, with gates of their own or shared ones, or until they drown the first.

    The weight of `drowned` is meant to harm: where even it does not show, nothing does.
    """
    label_maps, weight = tuple(load_meta(PREPARED).tasks.values()), params.p7b3.task_weight
    arms = {
        "task_gates": Arm(tasks=Tasks(label_maps, weight, own_gates=True)),
        "heads": Arm(tasks=Tasks(label_maps, weight, own_gates=False)),
        "drowned": Arm(tasks=Tasks(label_maps, 200 * weight, own_gates=True)),
    }
    run_phase("p7b3", arms, params)


if __name__ == "__main__":
    run(main)
