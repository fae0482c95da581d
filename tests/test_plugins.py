"""A signal or a surgery of your own is one file, and a sentence says what is wrong with it."""

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phasegate.base.errors import UserError
from phasegate.params import Params, load_params
from phasegate.params.check import check
from phasegate.params.phases import Schedule
from phasegate.params.plugins import Plugin
from phasegate.plugin import Probe
from phasegate.records.tables import read_table
from phasegate.signals.plugin_arms import SignalPolicy, plugin_arms, plugin_signals, standardised
from phasegate.signals.signal_scores import scorings
from phasegate.surgery.continuation import continuations, run_arm
from phasegate.surgery.controllers import Action, Allowed, Situation
from phasegate.surgery.surgeon import Treatment
from phasegate.training import checkpoint
from phasegate.training.batches import load_examples
from tests.small_study import ROOT

Write = Callable[[str, str], object]
Run = Callable[[Params], None]
SCORES = "import torch\nfrom phasegate.plugin import Scores\ndef signal(probe, draws):\n    return {}\n"
NOT_PYTHON = "plugins/loud.py, which plugins.arms.mine.signal names, is not Python"
OPERATE = "def operate(manager, expert, probe, draws):\n    return {}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes a file into the folder `plugins` of the current folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins").mkdir()
    return lambda name, text: Path(f"plugins/{name}.py").write_text(text)


@pytest.fixture
def probe(prepared: Path, baselines: Path) -> Probe:
    _, signal, gate = load_examples(prepared, torch.device("cpu"))
    model: Any = checkpoint.load(baselines / "seed-0", gate).model
    return Probe(model, 0, signal)


def with_arm(**arm: Any) -> Params:
    params = load_params(ROOT / "params.yaml").model_dump()
    return Params.model_validate(params | {"plugins": params["plugins"] | {"arms": {"mine": arm}}})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"import os.path, phasegate.model.moe\n{SCORES}", ""),
        ("from os import stat as signal", ""),
        ("signal: object = print", ""),
        ("def signal(:", f"{NOT_PYTHON}: invalid syntax \\(loud.py, "),
        ("-" * 200_000, f"{NOT_PYTHON}: MemoryError"),
        ("signal = '\0'", f"{NOT_PYTHON}: source code string"),
        ("signals = 1", "plugins/loud.py, which .* names, does not define the function signal"),
        ("from plugins.louder import signal", "plugins/loud.py, .* imports from plugins: it must be a file by itself"),
        ("from .louder import signal", "plugins/loud.py, .* imports from plugins: it must be a file by itself"),
        (f"{SCORES}    import plugins.louder", "plugins/loud.py, .* imports from plugins: it must be"),
        ("from phasegate.old import signal", "phasegate.old, which does not exist: import .* from phasegate.plugin"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(write: Write, text: str, sentence: str) -> None:
    write("loud", text)
    with pytest.raises(UserError, match=sentence) if sentence else nullcontext():
        Plugin("loud", "signal").check("plugins.arms.mine.signal")


def test_a_file_is_read_once_and_its_bytes_go_to_every_worker(write: Write) -> None:
    write("mine", "from dataclasses import dataclass\n@dataclass\nclass C:\n    x: 'int' = 1\nsignal = C")
    plugin = Plugin("mine", "signal")
    write("mine", "signal = 2")
    assert pickle.loads(pickle.dumps(plugin)).function()().x == 1 and Plugin("mine", "signal").function() == 2
    assert plugin != Plugin("mine", "signal")


@pytest.mark.parametrize(
    ("arm", "sentence"),
    [
        ({"signal": "lod"}, r"plugins.arms.mine.signal is 'lod', but .* no file plugins/lod.py: did you mean loud\?"),
        ({"grow": "splitt"}, r"plugins.arms.mine.grow is 'splitt', but .* plugins/splitt.py: did you mean split\?"),
        ({"grow": "loudr"}, r"plugins.arms.mine.grow is 'loudr', .*: did you mean loud\?"),
        ({"prune": "split"}, r"plugins.arms.mine.prune is 'split', .*: it must be one of remove, merge, none, loud"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(write: Write, arm: dict[str, str], sentence: str) -> None:
    write("loud", SCORES)
    with pytest.raises(UserError, match=sentence):
        check(with_arm(**{"signal": "loud"} | arm))


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ("torch.ones(5)", "signal must return Scores, not tensor"),
        ("Scores(None, None)", "signal must return Scores"),
        ("Scores(torch.ones(4), None)", "prune must be a tensor of 5 finite numbers, not Tensor of shape \\(4,\\): "),
        ("Scores(None, torch.ones(5) / 0)", r"grow must be .* numbers, not Tensor of shape \(5,\): tensor\(\[inf, "),
        ("Scores(torch.ones(5).to_sparse(), None)", "prune must be a tensor of 5 finite numbers, not Tensor: "),
        ("Scores(None, torch.ones(5) * 1j)", "grow must be a tensor of 5 finite numbers, not Tensor: "),
        ("Scores([1] * 5, None)", "prune must be a tensor of 5 finite numbers, not list: \\[1, 1, "),
    ],
)
def test_a_signal_that_gives_no_scores_is_named(write: Write, probe: Probe, values: str, wrong: str) -> None:
    write("mine", SCORES.format(values))
    with pytest.raises(UserError, match=rf"plugins/mine.py: {wrong}"):
        propose(probe, torch.ones(5, dtype=torch.bool))


def propose(probe: Probe, allowed: Tensor) -> object:
    """Return what the signal `mine` proposes."""
    unasked: Any = None
    controller = SignalPolicy(Plugin("mine", "signal"), 1.0, -1.0).build(unasked, unasked, unasked)
    return controller.propose(Situation(probe, Allowed(allowed, allowed), torch.Generator(), 0, unasked, unasked))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ("Scores(None, torch.tensor([0, 0, 9, 0, 8.]))", (Action.GROW, 2)),
        ("Scores(torch.tensor([5, 5, 5, 4, -9.]), None)", (Action.PRUNE, 4)),
        ("Scores(torch.tensor([5, 5, 5, 4, -9.]), torch.tensor([0, 0, 9, 0, 8.]))", (Action.PRUNE, 4)),
        ("Scores(torch.ones(5), torch.ones(5))", None),
    ],
)
def test_the_expert_furthest_beyond_its_threshold_is_chosen(
    write: Write, probe: Probe, scores: str, expected: tuple[Action, int] | None
) -> None:
    write("mine", SCORES.format(scores))
    everyone = torch.ones(5, dtype=torch.bool)
    assert propose(probe, everyone) == expected
    if expected:
        everyone[expected[1]] = False
        assert propose(probe, everyone) != expected


def test_scores_are_standardised_whatever_their_scale() -> None:
    scores = torch.tensor([1.0, 2, 3, 4])
    assert torch.allclose(standardised(scores), standardised(1e-6 * scores + 7e-6))
    assert standardised(scores).mean() == 0 and standardised(scores).std(correction=0) == 1


@pytest.fixture
def run(tmp_path: Path, prepared: Path, baselines: Path, schedule: Schedule) -> Run:
    """Return a function that runs a trial of the arm `mine`."""
    trial = partial(run_arm, tmp_path, prepared=prepared, start=baselines / "seed-0", phase="plugins", name="mine")
    return lambda params: trial(arm=plugin_arms(params, "p7b")["mine"], seed=0, schedule=schedule)


def test_the_shipped_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.chdir(ROOT)
    run(with_arm(signal="loudest", grow_above=0.5, prune_below=-0.5, grow="noisy_clone"))
    done = read_table(tmp_path / "surgeries.csv")
    assert set(done["operation"]) == {"noisy_clone", "remove"}
    assert (done.loc[done["operation"] == "noisy_clone", "output_change"] > 0).all()


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ("manager.split(expert, probe.tokens_of(0)[0] * float('nan'), 0.0)", "direction must be 16 finite numbers"),
        ("manager.remove(expert)", "to grow, operate must return the manager's Surgery and leave 6 experts"),
        ("None", "operate must return the manager's Surgery"),
    ],
)
def test_a_surgery_that_does_something_else_is_named(write: Write, run: Run, returned: str, sentence: str) -> None:
    write("cut", OPERATE.format(returned))
    write("mine", SCORES.format("Scores(None, torch.arange(probe.layer.n_routed) * 1.0)"))
    with pytest.raises(UserError, match=rf"plugins/cut.py: .*{sentence}"):
        run(with_arm(signal="mine", grow="cut", grow_above=0))


def test_the_files_of_an_arm_are_inputs_of_its_trials_and_of_the_scores() -> None:
    params = with_arm(signal="loudest", grow="noisy_clone")
    arms = plugin_arms(params, "p7b")
    assert isinstance(arms["mine"].treatment, Treatment) and arms["mine"].treatment.prune == "remove"
    [trial] = continuations(Path("p"), Path("b"), "plugins", arms, range(1), params.p7b)
    files = {Path("plugins/loudest.py"), Path("plugins/noisy_clone.py")}
    assert files <= set(trial.inputs)
    course = range(1), params.p7b, params.p7c3.dead
    [scoring] = scorings(Path("p"), Path("b"), Path("s"), Path("h"), *course, plugin_signals(params))
    assert files & set(scoring.inputs) == {Path("plugins/loudest.py")}


def test_the_first_arm_of_plugins_decides_its_phase() -> None:
    params = with_arm(signal="loudest")
    assert params.claims()["plugins"].primary == "mine" and "plugins" not in load_params(ROOT / "params.yaml").claims()
    headline = params.headline.model_copy(update={"phase": "plugins"})
    params.check_headline(headline)
    with pytest.raises(UserError, match=r"headline.phase is plugins, but plugins.arms is empty"):
        load_params(ROOT / "params.yaml").check_headline(headline)
