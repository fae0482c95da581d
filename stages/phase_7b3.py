"""Phase 7b.3: the expert count fixed, several tasks with parameters of their own."""

from phasegate.data import load_meta
from phasegate.params import Params
from phasegate.phase import Arm, Tasks, continuations
from phasegate.stage import BASELINES, MODELS, PREPARED, run
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """Further tasks from the data set's label maps, with gates of their own or shared ones."""
    meta = load_meta(PREPARED)
    label_maps, weight = tuple(meta.tasks.values()), params.p7b3.task_weight
    arms = [
        Arm("task_gates", tasks=Tasks(label_maps, weight, own_gates=True)),
        Arm("heads", tasks=Tasks(label_maps, weight, own_gates=False)),
        Arm("single"),
    ]
    trials = continuations(PREPARED, BASELINES, "p7b3", arms, params.seeds, params.p7b)
    run_trials(trials, MODELS / "p7b3", "p7b3")


if __name__ == "__main__":
    run(main)
