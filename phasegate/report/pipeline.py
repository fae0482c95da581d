"""The pipeline as a picture: the stages of dvc.yaml, and an arrow from each to those that read what it writes.

`dvc dag` draws the same with every arrow; here an arrow is left out where a longer way says as much, and the stages
that evaluate one phase each are one.
"""

from collections.abc import Mapping
from typing import Any


def mermaid(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """A Mermaid flowchart of the `stages` of dvc.yaml."""
    after = arrows(stages)
    lines = ["flowchart LR"]
    for stage in stages:
        lines += [f"    {stage} --> {other}" for other in stages if other in after[stage]]
    return "\n".join(lines)


def arrows(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """For each stage those that read its outputs, without those that are reached by a longer way too."""
    direct = {
        stage: {
            other
            for other in stages
            if other != stage and any(_within(dep, out) for dep in _paths(stages[other]) for out in _outputs(values))
        }
        for stage, values in stages.items()
    }

    def reached(stage: str) -> set[str]:
        return direct[stage] | {far for other in direct[stage] for far in reached(other)}

    return {
        stage: {other for other in others if not any(other in reached(between) for between in others - {other})}
        for stage, others in direct.items()
    }


def _paths(values: Mapping[str, Any]) -> list[str]:
    """What a stage reads; of a matrix of stages, what all of them read."""
    return _filled(values, values["deps"])


def _outputs(values: Mapping[str, Any]) -> list[str]:
    """What a stage writes, likewise."""
    listed = [*values.get("outs", []), *values.get("metrics", [])]
    return _filled(values, [next(iter(out)) if isinstance(out, dict) else out for out in listed])


def _filled(values: Mapping[str, Any], paths: list[str]) -> list[str]:
    found = paths
    for key, items in values.get("matrix", {}).items():
        found = [path.replace(f"${{item.{key}}}", item) for path in found for item in items]
    return found


def _within(dependency: str, output: str) -> bool:
    """Whether an output is what is read, or part of it, or holds it."""
    return f"{dependency}/".startswith(f"{output}/") or f"{output}/".startswith(f"{dependency}/")
