"""Train a few steps of every kind, and hash all that is left: the same on every x86-64 processor with AVX2.

    python -m tests.bits                      compare with tests/bits.json
    python -m tests.bits --write              write tests/bits.json
    python -m tests.bits --emulate EPYC-v1    compare on emulated processors, one or more (`make test-bits`)

QEMU emulates no AVX-512. That it is not used follows from the settings in `phasegate/__init__.py`; a native run on a
processor that has it shows so.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import phasegate
from phasegate.base.files import sha256
from phasegate.evaluation.evaluate import evaluate_phase
from phasegate.model.classifier import ModelSpec
from phasegate.model.references import ReferenceSpec
from phasegate.params.fields import override
from phasegate.params.phases import EntropyLabels, GroundTruth, RandomLabels, Schedule, UsageLabels
from phasegate.pretraining.pretrain import pretrain
from phasegate.records.tables import write_table
from phasegate.signals.ground_truth import MeasuredPolicy, PredictedPolicy
from phasegate.signals.predictor import SURVEY, learn
from phasegate.signals.signal_scores import score_signals
from phasegate.signals.survey import survey
from phasegate.surgery.continuation import Arm, run_arm
from phasegate.surgery.controllers import HeadPolicy, InformedPolicy, LabelPolicy, PlannedPolicy, TimedPolicy
from phasegate.surgery.growing import Plan, grow
from phasegate.surgery.in_a_row import in_a_row
from phasegate.surgery.surgeon import Treatment
from phasegate.surgery.tasks import Tasks
from tests.models import ARCHITECTURE
from tests.small_study import content
from tests.tiny_data import TRAINING, write_tiny_data

COMMITTED = Path(__file__).with_suffix(".json")
QEMU = "qemu-x86_64"
SCHEDULE = Schedule(
    steps=6, lr_scale=0.5, act_every=1, settle=2, cooldown=1, min_experts=4, max_experts=7,
    eval_every=3, split_direction="principal", hyperplanes="fixed", sibling_balance=0.01,
)  # fmt: skip
TRUTH = GroundTruth(
    recovery_steps=1, repeats=2, surveys=1, survey_every=2, surveyed=1, candidates=1, every=1,
    certainty=0.9, price=1e-8, usage=UsageLabels(grow_above=1.3, prune_below=0.7),
)  # fmt: skip
NOISE = RandomLabels(grow=0.4, prune=0.3, loss_weight=1.0, head_lr=0.02)
ENTROPY = EntropyLabels(grow_below=1.0, prune_above=1.0, head_lr=0.02)
TASKS = ((0, 0, 1, 1), (0, 1, 0, 1))


def kinds(base: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Every kind of training by name, in an order in which each finds in `base` what it starts from."""
    line, image = write_tiny_data(base / "line"), write_tiny_data(base / "image", (2, 9, 9))
    begin = partial(pretrain, phase="p7a", arm="a", seed=0, training=override(TRAINING, {"steps": 4, "warmup": 1}, ""))
    wide = override(ARCHITECTURE, {"stem": "conv", "n_shared": 1, "top_k": 3}, "")
    yield "mlp", partial(begin, prepared=line, spec=ModelSpec(ARCHITECTURE, (1, 8), (4,)), keep_optimizer=True)
    yield "conv_1d", partial(begin, prepared=line, spec=ModelSpec(wide, (1, 8), (4,)))
    yield "conv_2d", partial(begin, prepared=image, spec=ModelSpec(wide, (2, 9, 9), (4,)))
    yield "reference_mlp", partial(begin, prepared=line, spec=ReferenceSpec((1, 8), 4, (6,), None))
    yield "reference_cnn", partial(begin, prepared=image, spec=ReferenceSpec((2, 9, 9), 4, None, (5, 7)))
    course: dict[str, Any] = {"prepared": line, "start": base / "mlp", "seed": 0, "schedule": SCHEDULE}
    yield "survey", partial(survey, **course, truth=TRUTH, steps=0)
    yield "predictor", partial(learn, surveys=(base / "survey" / SURVEY,), seed=0)
    scored = partial(score_signals, **course, survey=base / "survey", head=base / "predictor")
    yield "signals", partial(scored, dead=1, plugins=())
    (base / "heads").mkdir()
    (base / "heads/seed-0").symlink_to(base / "predictor")
    arms = {
        "noise_head": Arm(Treatment(HeadPolicy(NOISE, acts="sample", detach=False), grow="reinit")),
        "entropy_head": Arm(Treatment(HeadPolicy(ENTROPY, acts="argmax"))),
        "clone": Arm(Treatment(LabelPolicy(NOISE), grow="clone")),
        "merge": Arm(Treatment(PlannedPolicy(grow=1, prune=1), prune="merge")),
        "entropy_loss": Arm(entropy_weight=0.1),
        "task_gates": Arm(tasks=Tasks(TASKS, 0.5, own_gates=True)),
        "task_heads": Arm(tasks=Tasks(TASKS, 0.5, own_gates=False)),
        "oracle": Arm(Treatment(MeasuredPolicy(1e-8, 0.9, 1, 1, 2, 1))),
        "predicted": Arm(Treatment(PredictedPolicy(base / "heads", 1e-8, 0.9))),
    }
    for name, arm in arms.items():
        yield name, partial(run_arm, **course, phase="p7b", name=name, arm=arm)
    for direction, hyperplanes in (("loss", "balanced"), ("random", "trained")):
        name, chosen = f"hyperplanes_{hyperplanes}", {"split_direction": direction, "hyperplanes": hyperplanes}
        changed = course | {"schedule": override(SCHEDULE, chosen, "")}
        yield name, partial(run_arm, **changed, phase="p7b", name=name, arm=Arm(Treatment(PlannedPolicy(grow=2))))
    early = Plan(ModelSpec(ARCHITECTURE, (1, 8), (4,)), TRAINING, SCHEDULE, until=2, classes=3)
    grown: dict[str, Any] = {"prepared": line, "phase": "p7c1", "seed": 0}
    yield "early", partial(grow, **grown, start=None, name="early", plan=early)
    for way, count, steps in (("birth", 3, 30), ("handover", 8, 90), ("birth", 2, 108), ("upcycle", 7, 6)):
        schedule = override(SCHEDULE, {"steps": steps, "max_experts": 12}, "")
        treatment = Treatment(TimedPolicy((3,)), way, None, count=count, expert_rate=4.0)  # type: ignore[arg-type]
        plan = replace(early, schedule=schedule).then(Arm(treatment), rate=2.0)
        yield f"{way}_{steps}", partial(grow, **grown, start=base / "early", name=way, plan=plan)
    yield "dead", partial(run_arm, **course, phase="p7c3", name="dead", arm=Arm(Treatment(InformedPolicy()), dead=1))
    (base / "models/all").mkdir(parents=True)
    for name in ("mlp", "merge", "task_gates", "birth_30", "handover_90", "dead"):
        (base / "models/all" / name).symlink_to(base / name)
    yield "evaluation", partial(evaluate_phase, base / "models", line)
    yield "in_a_row", lambda folder: write_table(folder / "rows.csv", in_a_row(line, base / "mlp", 0, "split", 3), None)


def digests(base: Path) -> Iterator[tuple[str, str]]:
    """The name of each kind, and a sha256 of the files that it leaves below `base`, as soon as it is done."""
    os.environ["PHASEGATE_DEVICE"] = "cpu"
    for name, run in kinds(base):
        folder = base / name
        folder.mkdir()
        run(folder)
        yield name, sha256(json.dumps(content(folder), sort_keys=True).encode())


def compare() -> int:
    """Print what has other bits than those committed, and return 1 if anything has, else 0."""
    known, status, begun = json.loads(COMMITTED.read_text()), 0, time.monotonic()
    with TemporaryDirectory() as folder:
        for name, digest in digests(Path(folder)):
            same = known.get(name) == digest
            status |= not same
            said = "the same" if same else f"differs: {known.get(name, 'nothing')[:16]} is committed"
            print(f"{name:28} {digest[:16]} {said} ({time.monotonic() - begun:.0f} s)", flush=True)
    return status


def emulate(processor: str) -> int:
    """Compare under an emulated processor, and return 1 if anything differs, else 0."""
    print(f"as {processor}, where a step takes seconds:", flush=True)
    with TemporaryFile("w+") as said:  # QEMU complains of what it lacks
        words = [QEMU, "-cpu", processor, sys.executable, "-m", "tests.bits"]
        environment = os.environ | {"NUMBA_USE_LLVMLITE_MEMORY_MANAGER": "1"}  # see compiled.py
        status = subprocess.run(words, stderr=said, env=environment, check=False).returncode
        if status not in (0, 1):
            said.seek(0)
            print("".join(line for line in said if "TCG doesn't support" not in line), file=sys.stderr)
    return status


def find_emulator() -> str:
    """Install the emulator where that is allowed; return "", or a sentence that says what to do."""
    if not shutil.which(QEMU) and shutil.which("apt-get") and os.geteuid() == 0:
        for words in (["update"], ["install", "--yes", "--no-install-recommends", "qemu-user"]):
            subprocess.run(["apt-get", "--quiet", *words], stdout=subprocess.DEVNULL, check=False)
    if not shutil.which(QEMU):
        return f"there is no {QEMU} here: install QEMU's user emulation, as with `sudo apt-get install qemu-user`"
    version = re.search(r"version (\d+)\.(\d+)", subprocess.check_output([QEMU, "--version"], text=True))
    if not version or (int(version[1]), int(version[2])) < (7, 2):
        return f"this {QEMU} is too old to emulate AVX2: install QEMU 7.2 or newer"
    return ""


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description="Compare the bits of every kind of training.")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--emulate", nargs="+", default=[], metavar="PROCESSOR")
    options = parser.parse_args()
    wrong = phasegate.UNPINNED or ("" if phasegate.PROMISED else "no x86-64 with AVX2: nothing is promised here")
    if wrong := wrong or (find_emulator() if options.emulate else ""):
        print(f"bits: {wrong}", file=sys.stderr)
        return 2
    if options.write:
        with TemporaryDirectory() as folder:
            COMMITTED.write_text(json.dumps(dict(digests(Path(folder))), indent=2) + "\n")
        return 0
    return max(map(emulate, options.emulate)) if options.emulate else compare()


if __name__ == "__main__":
    sys.exit(main())
