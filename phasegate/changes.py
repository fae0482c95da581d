"""What `dvc repro` would run now, and why: from what `dvc status --json` says, dvc.yaml, and the last parameters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = ("deleted", "not in cache")  # what DVC says of a file that isn't here
PARAMETERS = "params.yaml"
SAME_AGAIN = ("check", "prepare")
"""Stages that give the same bits wherever they run, so that nothing follows if only their outputs were missing."""
SHOWN = 40  # characters of a parameter's old and new value


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml, and the files that it reads and writes."""

    deps: frozenset[str]
    outs: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """Stages that would run, with the reason of each in a few words, in the order of dvc.yaml."""

    stale: dict[str, str]  # something that they depend on has changed, or will have
    absent: dict[str, str]  # nothing has, but their outputs are not here, or those of stages that they follow


def expanded(stages: Mapping[str, Any]) -> dict[str, Stage]:
    """The stages of dvc.yaml by name, those of a matrix each for itself as DVC calls them: `evaluate@p7b2`."""
    found = {}
    for name, stage in stages.items():
        [(key, values)] = stage.get("matrix", {"": [""]}).items()
        for value in values:
            deps, outs = (
                frozenset(_path(entry).replace(f"${{item.{key}}}", value) for entry in stage.get(kind, []))
                for kind in ("deps", "outs")
            )
            metrics = frozenset(_path(entry) for entry in stage.get("metrics", []))
            found[f"{name}@{value}" if value else name] = Stage(deps, outs | metrics)
    return found


def plan(stages: Mapping[str, Stage], status: Mapping[str, Any], then: Mapping[str, Any], now: Any) -> Plan:
    """What would run, and why.

    Args:
        status: what `dvc status --json` says, by stage.
        then: the parameters with which each stage last ran, by section (`estimates.locked`).
        now: params.yaml as it is.
    """
    made = {out: name for name, stage in stages.items() for out in stage.outs}
    stale: dict[str, str] = {}
    absent: dict[str, str] = {}
    for name in _ordered(stages, made):
        stage = stages[name]
        reasons = list(_reasons(status.get(name, []), made, then.get(name, {}), now)) if name in then else ["never ran"]
        follows = sorted({made[dep] for dep in stage.deps if dep in made and made[dep] in stale} - {"check"})
        missing = sorted(path for path, what in _outs(status, name).items() if what in ABSENT)
        if reasons:
            stale[name] = _list(reasons)
        elif follows:
            stale[name] = f"after {_list(follows)}"
        elif missing:
            absent[name] = f"{_list(missing)} not here"
    remade = {name for name in absent.keys() - set(SAME_AGAIN) if "not in cache" in _outs(status, name).values()}
    for name in _ordered(stages, made):  # what is made anew, and not from the cache, has other clock times in it
        sources = {made[dep] for dep in stages[name].deps if dep in made}
        if (after := sorted(sources & remade)) and name not in stale:
            absent.setdefault(name, f"after {_list(after)}")
            remade.add(name)
    return Plan(_sorted(stale, stages), _sorted(absent, stages))


def _path(entry: str | dict[str, Any]) -> str:
    """A dep or an output as dvc.yaml has it: a path, or a path with settings."""
    return entry if isinstance(entry, str) else next(iter(entry))


def _ordered(stages: Mapping[str, Stage], made: Mapping[str, str]) -> list[str]:
    """The names of the stages, every one after those whose outputs it reads."""
    ordered: dict[str, None] = {}

    def add(name: str) -> None:
        for dep in sorted(stages[name].deps):
            if dep in made and made[dep] not in ordered:
                add(made[dep])
        ordered[name] = None

    for name in stages:
        add(name)
    return list(ordered)


def _sorted(reasons: Mapping[str, str], stages: Mapping[str, Stage]) -> dict[str, str]:
    return {name: reasons[name] for name in stages if name in reasons}


def _reasons(entries: list[Any], made: Mapping[str, str], then: Mapping[str, Any], now: Any) -> Iterator[str]:
    """Why a stage is out of date, parameters first; not that files are missing which a stage makes."""
    for entry in entries:
        if entry == "changed command":
            yield "its command changed"
    for entry in entries:
        keys = entry.get("changed deps", {}).get(PARAMETERS, {}) if isinstance(entry, dict) else {}
        for key in keys if isinstance(keys, dict) else ():
            yield from differences(then.get(key), value_at(now, key), key) or [f"{key} changed"]
    for path, what in _changed(entries, "deps").items():
        if path != PARAMETERS and not (path in made and what in ABSENT):
            yield f"{path} {'is missing' if what in ABSENT else 'changed'}"
    for path, what in _changed(entries, "outs").items():
        if what not in ABSENT:
            yield f"{path} is not as it was written"


def _outs(status: Mapping[str, Any], name: str) -> dict[str, Any]:
    return _changed(status.get(name, []), "outs")


def _changed(entries: list[Any], kind: str) -> dict[str, Any]:
    """Files of a kind, and what DVC says of each."""
    found: dict[str, Any] = {}
    for entry in entries:
        if isinstance(entry, dict):
            found |= entry.get(f"changed {kind}", {})
    return found


def value_at(values: Any, key: str) -> Any:
    """The value under a dotted key; None if there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def differences(then: Any, now: Any, key: str) -> list[str]:
    """`p7b.steps 600 → 700` for every leaf below a key that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        below = dict.fromkeys([*now, *then])
        return [line for name in below for line in differences(then.get(name), now.get(name), f"{key}.{name}")]
    if then == now:
        return []
    change = f"{_short(then)} → {_short(now)}"
    return [f"{key} {change}" if len(change) <= SHOWN else f"{key} changed"]


def _short(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _list(words: list[str]) -> str:
    """The first of some, and how many more there are."""
    return words[0] if len(words) == 1 else f"{words[0]} and {len(words) - 1} more"
