"""The pipeline as a picture: the stages of dvc.yaml, and an arrow from each to those that read what it writes.

`dvc dag` draws the same with every arrow; here an arrow is left out where a longer way says as much, and the stages
that evaluate one phase each are one.
"""

from collections.abc import Mapping
from typing import Any

from phasegate.changes import expanded


def mermaid(stages: Mapping[str, Any]) -> str:
    """A Mermaid flowchart of the `stages` of dvc.yaml."""
    after = arrows(stages)
    lines = ["flowchart LR"]
    for stage in stages:
        lines += [f"    {stage} --> {other}" for other in stages if other in after[stage]]
    return "\n".join(lines)


def arrows(stages: Mapping[str, Any]) -> dict[str, set[str]]:
    """For each stage those that read its outputs, without those that are reached by a longer way too."""
    single = expanded(stages)
    made = {out: name.split("@")[0] for name, stage in single.items() for out in stage.outs}
    direct: dict[str, set[str]] = {name: set() for name in stages}
    for name, stage in single.items():
        for dep in stage.deps & made.keys():
            direct[made[dep]].add(name.split("@")[0])

    def reached(stage: str) -> set[str]:
        return direct[stage] | {far for other in direct[stage] for far in reached(other)}

    return {
        stage: {other for other in others if not any(other in reached(between) for between in others - {other})}
        for stage, others in direct.items()
    }
