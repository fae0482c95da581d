"""The surgery study: planned operations at the same steps, done in each of the ways that there are."""

from phasegate.control import Plan
from phasegate.params import Params
from phasegate.phase import Arm, continuations
from phasegate.sections import override
from phasegate.stage import BASELINES, MODELS, PREPARED, run
from phasegate.surgeon import Treatment
from phasegate.trials import run_trials

OTHER_SPLITS = {
    "split_principal": {"split_direction": "principal", "hyperplanes": "fixed"},
    "split_loss": {"split_direction": "loss", "hyperplanes": "fixed"},
    "split_trained": {"split_direction": "random", "hyperplanes": "trained"},
    "split_balanced": {"split_direction": "random", "hyperplanes": "balanced"},
}


def main(params: Params) -> None:
    """Growth by three kinds of surgery; by splits with other hyperplanes; and splits that are followed by pruning.

    A merge can only take back a split, so its candidates are the halves; `remove` may take any expert.
    """
    operations = params.surgery.operations
    half = operations // 2
    grow, by_usage, by_loss = Plan(operations), Plan(half, half, "usage"), Plan(half, half, "loss")
    arms = [
        Arm("split", Treatment(grow)),
        Arm("clone", Treatment(grow, grow="clone")),
        Arm("reinit", Treatment(grow, grow="reinit")),
        Arm("remove_by_usage", Treatment(by_usage)),
        Arm("remove_by_loss", Treatment(by_loss)),
        Arm("merge", Treatment(by_loss, prune="merge")),
    ]
    trials = continuations(PREPARED, BASELINES, "surgery", arms, params.seeds, params.p7b)
    for name, changes in OTHER_SPLITS.items():
        schedule = override(params.p7b, changes, "p7b")
        trials += continuations(PREPARED, BASELINES, "surgery", [Arm(name, Treatment(grow))], params.seeds, schedule)
    run_trials(trials, MODELS / "surgery", "surgery")


if __name__ == "__main__":
    run(main)
