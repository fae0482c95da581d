"""Save phases as named DVC experiments, so that DVC's own commands compare them: `make phases`.

    python -m phasegate.tools.experiments                         phase-7a, phase-7b1, ..., phase-surgery
    python -m phasegate.tools.experiments p7b2/clone p7b1/noise   phase-7b2-clone, phase-7b1-noise

Such an experiment is the last commit with another `headline`: only its params.yaml, dvc.lock, metrics.json and
reports/headline_curve.csv differ. Nothing is trained and no cache is needed: DVC runs the stage headline alone.
"""

import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from phasegate.base.errors import UserError, report_user_errors
from phasegate.params import Params, load_params
from phasegate.params.fields import parse
from phasegate.params.names import PRIMARY, START
from phasegate.params.phases import Headline
from phasegate.tools.command import output
from phasegate.tools.plan import refuse_stale


def main(params: Params) -> None:
    """Save the arms that the command line names, or the primary arm of every phase, and print their verdicts."""
    wanted = list(dict.fromkeys(headline(name, params) for name in sys.argv[1:] or (START, *params.claims())))
    if edited := output("git", "status", "--porcelain", "--untracked-files=no", "-z").split("\0")[0][3:]:
        raise UserError(f"{edited} changed since the last commit: `git commit -a` keeps it, `git restore .` drops it")
    refuse_stale()
    with TemporaryDirectory() as folder:  # DVC's own, of --temp, need a whole clone, in a folder whose path is ASCII
        place = share(Path(folder).absolute())
        for choice in wanted:
            name = f"phase-{choice.phase.removeprefix('p')}" + (f"-{choice.arm}" if choice.arm != PRIMARY else "")
            print(f"{name}: {summary(save(name, choice, place))}", flush=True)


def headline(name: str, params: Params) -> Headline:
    """Parse `p7b2/clone`, or `p7b2` for its primary arm; raise UserError for an unknown phase or arm."""
    phase, _, arm = name.partition("/")
    choice = parse(Headline, {"phase": phase, "arm": arm or PRIMARY}, "headline")
    params.check_headline(choice)
    return choice


def share(folder: Path) -> Path:
    """Make a repository of this one's last commit and objects: DVC is lost in a worktree of git's in a submodule."""
    objects = output("git", "rev-parse", "--git-path", "objects").removesuffix("\n")
    commit, _, below = output("git", "rev-parse", "HEAD", "--show-prefix").removesuffix("\n").partition("\n")
    output("git", "init", "--quiet", "--template=", "--object-format=sha1", folder=folder)
    (folder / ".git/shared").symlink_to(Path(objects).absolute())  # whose path may have what the next file can't
    (folder / ".git/objects/info/alternates").write_text("../shared\n", encoding="utf-8")
    for key, value in re.findall(r"^(user\.(?:name|email))=(.*)", output("git", "config", "--list"), re.MULTILINE):
        output("git", "config", key, value, folder=folder)
    output("git", "reset", "--quiet", "--hard", commit, folder=folder)
    return folder / below


def save(name: str, choice: Headline, place: Path) -> dict[str, Any]:
    """Save one experiment, run in the repository at `place`, instead of all others of its name; return its metrics."""
    output("git", "reset", "--quiet", "--hard", folder=place)
    words = ["dvc", "exp", "run", "--allow-missing", "--single-item", "headline", "--name", name]
    output(*words, *(f"--set-param=headline.{key}={value}" for key, value in choice), folder=place)
    # A bundle brings the objects: `git fetch` obeys settings of transfers, and goes to submodules and their remotes.
    saved, bundle = ("git", "for-each-ref", f"refs/exps/*/*/{name}", "--format"), str(place / ".dvc/tmp/bundle")
    reference, commit = output(*saved, "%(refname) %(objectname)", folder=place).split()
    output("git", "bundle", "create", bundle, reference, "^HEAD", folder=place)
    output("git", "bundle", "unbundle", bundle)
    output("git", "update-ref", reference, commit)
    for other in {*output(*saved, "%(refname)").split()} - {reference}:  # DVC refuses a name that two experiments have
        output("git", "update-ref", "-d", other)
    return dict(json.loads((place / "metrics.json").read_text(encoding="utf-8")))


def summary(metrics: dict[str, Any]) -> str:
    """Write the metrics of a headline in a few words."""
    accuracy = f"{metrics['accuracy']:.2f} %" if metrics["n_seeds"] else "no trial finished"
    return ", ".join([metrics["arm"], *[metrics[name] for name in ("verdict", "word") if name in metrics], accuracy])


if __name__ == "__main__":
    with report_user_errors("experiments"):
        main(load_params())
