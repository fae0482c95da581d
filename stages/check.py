"""Check params.yaml before anything runs, and write its schema.

The schema changes with the code alone, so a changed parameter reruns this stage and the stages that use it. It depends
on the whole file, since `dvc.lock` would repeat each value.
"""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path

from phasegate.base.errors import UserError
from phasegate.base.files import write_atomic
from phasegate.base.paths import SCHEMA
from phasegate.params import Params
from phasegate.params.check import check
from phasegate.params.fields import suggestion
from phasegate.params.names import PLUGINS
from phasegate.stage import run
from phasegate.verdicts import growth
from phasegate.verdicts.attribution import ACCOUNTS
from phasegate.verdicts.wording import reach


def main(params: Params) -> None:
    """Check what the parameters need from outside: arms that stages define, memory, and files in `plugins/`.

    It also says, before anything runs, what the seeds can decide.
    """
    for phase, claim in params.decisions.phases.items():
        defined = arms_of(phase)
        for place, arm in enumerate(claim.arms):
            if arm not in defined:
                raise UserError(f"decisions.phases.{phase}.arms has {arm!r}: {suggestion(arm, defined)}")
            if arm in claim.arms[:place]:
                raise UserError(f"decisions.phases.{phase}.arms has {arm!r} twice: name each arm once")
        if "yoked" in claim.arms and (repeated := repeated_arm(phase)) not in (None, *claim.arms):
            raise UserError(f"decisions.phases.{phase}.arms lacks {repeated!r}, whose operations yoked repeats: add it")
    needed = {arm for account in ACCOUNTS.values() for contrast in account.values() for arm in contrast}
    for arm in sorted(needed | {f"{growth.PHASE}/{growth.LARGE}"}):
        phase, _, name = arm.partition("/")
        if name not in params.arms()[phase]:
            raise UserError(f"decisions.phases.{phase}.arms lacks {name!r}, with which other arms are compared: add it")
    for phase, claim in params.claims().items():
        key = PLUGINS if phase == PLUGINS else f"decisions.phases.{phase}"
        named = {f"{key}.assay.better": claim.assay.better, f"{key}.assay.worse": claim.assay.worse}
        named |= {f"{key}.control": claim.control}
        check_runs(named | {f"{key}.controls.{arm}": name for arm, name in claim.controls.items()}, params)
    for name, seeds in (("q1", params.q1.seeds), ("q2", params.q2.seeds), ("p7c", params.p7c.seeds)):
        if shared := sorted({*seeds.all} & {*params.seeds.all}):
            raise UserError(
                f"{name}.seeds has {shared[0]}, which `seeds` has too: no search may choose by the seeds of verdicts"
            )
    check(params)
    print(reach(params.seeds.count, params.decisions))
    write_atomic(SCHEMA, schema())


def check_runs(named: Mapping[str, str], params: Params) -> None:
    """Raise `UserError` for an arm, by the key that names it, that no phase lists."""
    known = [f"{phase}/{arm}" for phase, arms in params.arms().items() for arm in arms]
    for key, arm in named.items():
        if arm not in known:
            raise UserError(f"{key} is {arm!r}, which no phase runs: {suggestion(arm, known)}")


def arms_of(phase: str) -> list[str]:
    """Return the names of the arms that the script of a phase defines, without running it: it imports torch."""
    tree = ast.parse(_script(phase))
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id="arms")], value=ast.Dict(keys=keys)):
                return [str(key.value) for key in keys if isinstance(key, ast.Constant)]
    raise AssertionError(f"stages/{phase}.py defines no dictionary of arms")


def repeated_arm(phase: str) -> str | None:
    """Return the arm whose operations the arm `yoked` of a phase repeats, by the script of the phase."""
    found = re.search(rf'YokedPolicy\(MODELS / "{phase}/(\w+)"\)', _script(phase))
    return found[1] if found else None


def _script(phase: str) -> str:
    return Path(__file__).with_name(f"{phase}.py").read_text(encoding="utf-8")


def schema() -> str:
    """Return the JSON schema of the parameters, by which editors can check params.yaml."""
    return json.dumps(Params.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    run(main)
