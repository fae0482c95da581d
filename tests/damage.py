"""Damage files: bytes that flip, values that lie, things of another kind under a file's name."""

import copy
import io
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

DEEP = 100_000  # levels of nesting
ODD: list[Any] = [None, "", " ", [], {}, [[]], [{}], [None], ["a"], {"a": 1}, "abc", "ключ", "\x1b[2J", "a\nb", True]
ODD += [False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, "1", "conv"]
ODD += [float("nan"), float("inf"), -float("inf"), "../../etc/passwd", "/dev/zero", "x" * 100_000]
PLACE = "placeholder_of_a_snippet"
BOMBS: list[str] = []  # YAML with aliases of aliases: a list, and mappings that are merged
MERGED = ("{a: 1}", "{{<<: [{}]}}")
for (start, later), copies, depth in ((("[1]", "[{}]"), 9, 30), (MERGED, 2, 20), (MERGED, 10, 12)):
    parts = [f"a{i}: &a{i} {later.format(', '.join([f'*a{i - 1}'] * copies))}" for i in range(1, depth)]
    BOMBS.append(f"{{a0: &a0 {start}, {', '.join(parts)}}}")


class Evil:
    """What ends the process when its pickle is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (66,)


def put(tree: dict[str, Any], key: str, value: object) -> None:
    """Set a value of nested dicts; its key is dotted."""
    *path, name = key.split(".")
    reduce(dict.__getitem__, path, tree)[name] = value


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Content with flipped bits, lost, added or foreign parts."""
    if content and draw.random() < 0.15:
        flipped = bytearray(content)
        for _ in range(draw.choice([1, 1, 3, 30])):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    at = draw.choice([draw.randrange(len(content) + 1), max(0, len(content) - draw.randrange(1, 9))])
    length = draw.choice([1, 8, 100, 5000])
    before = draw.choice([content[:at], content[:at], content[:at], content, b""])
    middle = draw.choice([b"", b"", draw.randbytes(length), bytes(length), content[:at]])
    return before + middle + draw.choice([content[at:], content[at + length :], content, b""])


def damaged_tree(tree: Any, draw: random.Random, values: Sequence[Any]) -> Any:
    """A copy of nested dicts and lists in which some entries are changed, moved, removed or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        found = list(_spots(tree))
        if not found:
            return draw.choice(values)
        inside, key = draw.choice(found)
        elsewhere, other = draw.choice(found)
        match draw.choice(["set"] * 8 + ["delete", "rename", "move", "copy", "list", "dict", "add", "whole"]):
            case "set":
                inside[key] = draw.choice(values)
            case "delete":
                del inside[key]
            case "rename" if isinstance(inside, dict):
                names = [f"{key}x", f"{key}"[1:], f"{key}".upper(), "", " ", "ключ", "\u202e", 3, None, True]
                inside[draw.choice(names)] = inside.pop(key)
            case "move" | "copy":
                elsewhere[other] = copy.deepcopy(inside[key])
            case "list":
                inside[key] = [inside[key]] * draw.randrange(3)
            case "dict":
                inside[key] = {str(key): inside[key]}
            case "add" if isinstance(inside, dict):
                inside |= {f"more_{number}": inside[key] for number in range(draw.choice([1, 1000]))}
            case "add":
                inside += [inside[key]] * draw.choice([1, 1000])
            case "whole" if draw.random() < 0.1:
                return draw.choice(values)
    return tree


def _spots(tree: Any) -> Any:
    """Every (container, key) of a tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _spots(value)


def damage_file(path: Path, draw: random.Random) -> None:
    """Damage the bytes of a file, or put something else in the place of a file or a folder."""
    if not path.is_dir() and draw.random() < 0.7:
        path.write_bytes(damaged_bytes(path.read_bytes(), draw))
        return

    def claim_much() -> None:
        with path.open("wb") as file:
            file.truncate(1 << 40)  # takes no room

    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    links = (path.parent / "nowhere", path, path.parent, "/dev/zero", "/proc/self/mem")
    kinds: list[Callable[[], object]] = [lambda: None, path.mkdir, lambda: os.mkfifo(path), claim_much]
    kinds += [partial(path.symlink_to, target) for target in links]
    kinds += [partial(path.write_bytes, content) for content in (b"", pickle.dumps(Evil()), zipped.getvalue())]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    draw.choice(kinds)()
