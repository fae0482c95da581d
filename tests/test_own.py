"""Whoever brings a signal or a surgery writes one file, and is told in a sentence what is wrong with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phasegate import checkpoint
from phasegate.check import check
from phasegate.control import Allowed, Situation
from phasegate.errors import UserError
from phasegate.own import SignalControl, arms, signals, standardised
from phasegate.params import Params, load_params
from phasegate.phase import continuations, run_arm
from phasegate.phase_params import Schedule
from phasegate.plugins import Plugin
from phasegate.probe import Probe
from phasegate.scoring import scorings
from phasegate.surgeon import Treatment
from phasegate.table_files import read_table
from phasegate.training import load_examples

ROOT = Path(__file__).parent.parent
SCORES = "import torch\nfrom phasegate.importance import Scores\ndef signal(probe, draws):\n    return {}\n"
OPERATE = "def operate(manager, expert, probe, draws):\n    return {}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes files into the folder `plugins` of the current one, which is empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins").mkdir()

    def file(name: str, text: str) -> None:
        (tmp_path / f"plugins/{name}.py").write_text(text)

    return file


@pytest.fixture
def probe(prepared: Path, baselines: Path) -> Probe:
    _, signal, gate = load_examples(prepared, torch.device("cpu"))
    model: Any = checkpoint.load(baselines / "seed-0", gate).model
    return Probe(model, 0, signal)


def with_arm(**arm: Any) -> Params:
    params = load_params(ROOT / "params.yaml").model_dump()
    return Params.model_validate(params | {"own": {"hypothesis": "It pays.", "arms": {"mine": arm}}})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, r"own.arms.mine.signal is 'loud', but there is no file plugins/loud.py: did you mean louder\?"),
        ("def signal(:", "plugins/loud.py, which own.arms.mine.signal names, is not Python: invalid syntax"),
        ("signals = 1", "plugins/loud.py, which .* names, does not define the function signal"),
        ("from plugins.louder import signal", "plugins/loud.py, .* imports from plugins: it must be a file by itself"),
        ("from .louder import signal", "plugins/loud.py, .* imports from plugins: it must be a file by itself"),
        (f"{SCORES}    import plugins.louder", "plugins/loud.py, .* imports from plugins: it must be"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_anything_runs(
    write: Callable[[str, str], None], text: str | None, sentence: str
) -> None:
    write("louder", SCORES)
    if text:
        write("loud", text)
    with pytest.raises(UserError, match=sentence):
        Plugin("loud", "signal").check("own.arms.mine.signal")
    Plugin("louder", "signal").check("own.arms.mine.signal")


@pytest.mark.parametrize(
    ("arm", "sentence"),
    [
        ({"grow": "splitt"}, r"own.arms.mine.grow is 'splitt', but .* plugins/splitt.py: did you mean split\?"),
        ({"prune": "marge"}, r"own.arms.mine.prune is 'marge', .*: did you mean merge\?"),
        ({"grow": "loudr"}, r"own.arms.mine.grow is 'loudr', .*: did you mean loud\?"),
        ({"prune": "split"}, r"own.arms.mine.prune is 'split', .*: it must be one of remove, merge, loud"),
    ],
)
def test_a_misspelt_surgery_is_compared_with_the_built_in_ones_and_the_files(
    write: Callable[[str, str], None], arm: dict[str, str], sentence: str
) -> None:
    write("loud", SCORES)
    with pytest.raises(UserError, match=sentence):
        check(with_arm(signal="loud", **arm))


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ("torch.ones(5)", "signal must return Scores, not tensor"),
        ("Scores(None, None)", "signal must return Scores"),
        ("Scores(torch.ones(4), None)", "prune must be a tensor of 5 finite numbers"),
        ("Scores(None, torch.ones(5) / 0)", "grow must be a tensor of 5 finite numbers"),
        ("Scores([1] * 5, None)", "prune must be a tensor of 5 finite numbers"),
    ],
)
def test_a_signal_that_gives_no_scores_is_named(
    write: Callable[[str, str], None], probe: Probe, values: str, wrong: str
) -> None:
    write("mine", SCORES.format(values))
    controller = SignalControl(Plugin("mine", "signal"), 1.0, -1.0).build(16, 0, torch.device("cpu"))
    with pytest.raises(UserError, match=rf"plugins/mine.py: {wrong}"):
        controller.propose(situation(probe, torch.ones(5, dtype=torch.bool)))


def situation(probe: Probe, allowed: Tensor) -> Situation:
    unasked: Any = None
    return Situation(
        *(unasked, Allowed(allowed, allowed), unasked, torch.Generator(), unasked, unasked, unasked, 1), probe=probe
    )


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ("Scores(None, torch.tensor([0, 0, 9, 0, 8.]))", ("grow", 2)),
        ("Scores(torch.tensor([5, 5, 5, 4, -9.]), None)", ("prune", 4)),
        ("Scores(torch.tensor([5, 5, 5, 4, -9.]), torch.tensor([0, 0, 9, 0, 8.]))", ("prune", 4)),
        ("Scores(torch.ones(5), torch.ones(5))", None),
    ],
)
def test_the_expert_furthest_beyond_its_threshold_is_chosen(
    write: Callable[[str, str], None], probe: Probe, scores: str, expected: tuple[str, int] | None
) -> None:
    write("mine", SCORES.format(scores))
    controller = SignalControl(Plugin("mine", "signal"), 1.0, -1.0).build(16, 0, torch.device("cpu"))
    everyone = torch.ones(5, dtype=torch.bool)
    assert controller.propose(situation(probe, everyone)) == expected
    if expected:
        everyone[expected[1]] = False
        assert controller.propose(situation(probe, everyone)) != expected


def test_scores_are_standardised_whatever_their_scale() -> None:
    scores = torch.tensor([1.0, 2, 3, 4])
    assert torch.allclose(standardised(scores), standardised(1e-6 * scores + 7e-6))
    assert standardised(scores).mean() == 0 and standardised(scores).std(correction=0) == 1


def test_an_arm_of_ones_own_runs_with_the_shipped_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path, baselines: Path, schedule: Schedule
) -> None:
    monkeypatch.chdir(ROOT)
    [arm] = arms(with_arm(signal="loudest", grow_above=0.5, prune_below=-0.5, grow="noisy_clone"))
    run_arm(tmp_path, prepared=prepared, start=baselines / "seed-0", phase="own", arm=arm, seed=0, schedule=schedule)
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
def test_a_surgery_that_does_not_do_what_was_asked_is_named(
    tmp_path: Path,
    write: Callable[[str, str], None],
    prepared: Path,
    baselines: Path,
    schedule: Schedule,
    returned: str,
    sentence: str,
) -> None:
    write("cut", OPERATE.format(returned))
    write("mine", SCORES.format("Scores(None, torch.arange(probe.layer.n_routed) * 1.0)"))
    [arm] = arms(with_arm(signal="mine", grow="cut", grow_above=0))
    with pytest.raises(UserError, match=rf"plugins/cut.py: .*{sentence}"):
        run_arm(tmp_path, prepared=prepared, start=baselines / "seed-0", phase="own", arm=arm, seed=0,
                schedule=schedule)  # fmt: skip


def test_the_files_of_an_arm_are_inputs_of_its_trials_and_of_the_scores() -> None:
    params = with_arm(signal="loudest", grow="noisy_clone")
    [arm] = arms(params)
    assert isinstance(arm.treatment, Treatment) and arm.treatment.prune == "remove"
    [trial] = continuations(Path("p"), Path("b"), "own", [arm], 1, params.p7b)
    files = {Path("plugins/loudest.py"), Path("plugins/noisy_clone.py")}
    assert files <= set(trial.inputs)
    [scoring] = scorings(Path("p"), Path("b"), Path("s"), Path("h"), 1, params.p7b, signals(params))
    assert files & set(scoring.inputs) == {Path("plugins/loudest.py")}


def test_the_first_arm_of_ones_own_decides_its_phase() -> None:
    params = with_arm(signal="loudest")
    assert params.claims()["own"].primary == "mine" and "own" not in load_params(ROOT / "params.yaml").claims()
    headline = params.headline.model_copy(update={"phase": "own"})
    params.check_headline(headline)
    with pytest.raises(UserError, match=r"headline.phase is own, but own.arms is empty"):
        load_params(ROOT / "params.yaml").check_headline(headline)
