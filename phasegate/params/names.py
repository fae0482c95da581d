"""Name the parts of the study: its data sets, its phases, its control, and the signals that it scores."""

DATA_SETS = {
    "mnist1d": "MNIST-1D",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "npz": "your own data",
}
"""The data sets, with the names that people read; `data_sets/<name>.py` loads each."""
START = "p7a"
"""The phase whose checkpoints all later phases start from."""
BASELINE, CONTROL = "baseline", "continue"
"""The arms of that phase: the checkpoints themselves, and the same training continued with nothing added."""
CONTINUED = f"{START}/{CONTROL}"
"""The control of every phase that starts from those checkpoints."""
PHASES = ("p7b1", "p7b2", "p7b3", "p7b4", "surgery", "p7c1", "p7c2", "p7c3")
"""The phases that get a verdict; `params.yaml` lists the arms of each."""
PLUGINS = "plugins"
"""The phase of the arms that people describe in `params.yaml`. It may be empty, and its first arm decides it."""
REFERENCES = "references"
"""Published models, trained for comparison: no verdict."""
EVALUATED = (REFERENCES, START, "control", *PHASES, PLUGINS)
"""The folders of `models/` whose checkpoints are evaluated."""
PRIMARY = "primary"
"""Stands for the arm that decides a phase."""
COMPARED = {"p7b": CONTINUED, "p7c2": "p7c2/stay", "p7c3": "p7c3/leave"}
"""What an arm of one's own is compared with, by the phase where it acts."""
RESERVED = {name.partition("/")[2]: name for name in (f"{START}/{BASELINE}", *COMPARED.values())}
RESERVED |= {PRIMARY: "the arm that decides a phase"}
"""Names that no arm of one's own may have, and what they mean beside it."""
SIGNALS = ["random_labels", "routing_entropy", "usage_frequency", "zero_hits", "gate_times_norm", "weight_norm"]
SIGNALS += ["taylor_saliency", "gradmax", "mean_norm", "mean_squared_norm", "aimer", "gradient_squared"]
SIGNALS += ["frequency_times_spread"]
"""The signals of the literature, functions of `signals/published.py`; the first is the control."""
PREDICTED, MEASURED = "counterfactual_head", "measured_change"
"""What is scored beside them: the predictions of a control head, and the measured change itself."""
