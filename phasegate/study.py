"""What the study consists of: its phases, their arms and the signals that it scores, by name."""

ARMS: dict[str, tuple[str, ...]] = {
    "p7b1": ("noise_acting", "noise", "noise_detached", "random_acting", "random_split", "random_clone"),
    "p7b2": (
        *("split", "clone", "reinit", "split_thresholds", "clone_thresholds", "reinit_thresholds"),
        "entropy_loss",
    ),
    "p7b3": ("task_gates", "heads", "single"),
    "p7b4": ("counterfactual_head", "oracle", "frequency", "keep"),
    "surgery": (
        *("split", "clone", "reinit", "remove_by_usage", "remove_by_loss", "merge"),
        *("split_principal", "split_loss", "split_trained", "split_balanced"),
    ),
}
"""The arms of each phase that is decided on."""
OWN = "own"
"""The phase of the arms that `params.yaml` describes; it may be empty, and its first arm decides it."""
START, START_ARMS = "p7a", ("baseline", "continue")
"""The phase whose checkpoints all later phases start from; its second arm is the control."""
PRIMARY = "primary"
"""Stands for the arm that decides a phase."""
EVALUATED_PHASES = ("references", "p7a", "continue", *ARMS, OWN)
"""Everything that leaves checkpoints to be evaluated."""
SIGNALS = (
    *("random_labels", "routing_entropy", "usage_frequency", "zero_hits"),
    *("gate_times_norm", "weight_norm", "taylor_saliency", "gradmax"),
)
"""The signals of the literature, functions of `importance`; the first is the control."""
PREDICTED, MEASURED = "counterfactual_head", "measured_change"
"""What is scored beside them: the predictions of a control head, and the measurement itself."""
