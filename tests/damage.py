"""Damage for files: bytes that flip, values that lie, things of another kind under a file's name."""

import copy
import io
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEEP = 100_000  # levels of nesting


class Evil:
    """What ends the process when its pickle is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (66,)


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Content with flipped bits, lost, added or foreign parts."""
    at, length = draw.randrange(len(content) + 1), draw.choice([1, 8, 100, 5000])

    def flipped() -> bytes:
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 3, 30])):
            if changed:
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)

    ways: list[Callable[[], bytes]] = [
        flipped,
        flipped,
        lambda: content[:at],
        lambda: content[: -draw.randrange(1, 9)],
        lambda: content[at:],
        lambda: content[:at] + content[at + length :],
        lambda: content[:at] + draw.randbytes(length) + content[at:],
        lambda: content[:at] + draw.randbytes(length) + content[at + length :],
        lambda: content[:at] + bytes(length) + content[at + length :],
        lambda: content[:at] + content[:at],
        lambda: content + draw.randbytes(length),
        lambda: content * 2,
        lambda: draw.randbytes(length),
        lambda: b"",
    ]
    return draw.choice(ways)()


def damaged_tree(tree: Any, draw: random.Random, values: Sequence[Any]) -> Any:
    """A copy of nested dicts and lists in which some entries are others, elsewhere, gone or renamed."""
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
                name = draw.choice(
                    [f"{key}x", f"{key}"[1:], f"{key}".upper(), "", " ", "ключ", "\u202e", 3, None, True]
                )
                inside[name] = inside.pop(key)
            case "move" | "copy":
                elsewhere[other] = copy.deepcopy(inside[key])
            case "list":
                inside[key] = [inside[key]] * draw.randrange(3)
            case "dict":
                inside[key] = {str(key): inside[key]}
            case "add":
                for number in range(draw.choice([1, 1000])):
                    if isinstance(inside, dict):
                        inside[f"more_{number}"] = inside[key]
                    else:
                        inside.append(inside[key])
            case "whole" if draw.random() < 0.1:
                return draw.choice(values)
    return tree


def _spots(tree: Any) -> Any:
    """Every (container, key) of a tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _spots(value)


def replaced(path: Path, draw: random.Random) -> None:
    """Put something else where a file is expected."""

    def pickled() -> None:
        path.write_bytes(pickle.dumps(Evil()))

    def zipped() -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
        path.write_bytes(buffer.getvalue())

    kinds: list[Callable[[], object]] = [
        lambda: None,
        lambda: path.touch(),
        lambda: path.mkdir(),
        lambda: path.symlink_to(path.parent / "nowhere"),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to(path.parent),
        lambda: path.symlink_to("/dev/zero"),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/proc/self/mem"),
        lambda: sparse(path, 1 << 40),
        pickled,
        zipped,
    ]
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    draw.choice(kinds)()


def sparse(path: Path, size: int) -> None:
    """A file that claims to be large and takes no room."""
    with path.open("wb") as file:
        file.truncate(size)
