"""README and docs as the tests read them: their blocks by language, and the commands in these."""

import re
import shlex
from pathlib import Path

from tests.small_study import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page, what sets variables before it left out."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[sum("=" in word for word in words[:1]) :] for words in found if words]
