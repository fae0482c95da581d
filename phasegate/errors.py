"""Errors for people."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A file or a value that can't be used: one sentence with its name, its value and what would be right."""


@contextmanager
def told_by(program: str) -> Iterator[None]:
    """Errors meant for people end a program with one sentence and exit code 2; bugs keep their traceback."""
    try:
        yield
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)


class Diverged(FloatingPointError):
    """A training whose numbers stopped being finite: what did, and at which step."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} at step {step}")
        self.what, self.step = what, step


def one_line(error: BaseException, at_most: int = 200) -> str:
    """What an error of somebody else's says, as part of a sentence."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = printable(said) or type(error).__name__
    return text if len(text) <= at_most else f"{text[:at_most]}…"


def printable(text: str) -> str:
    """A text from a file on one line, with escapes for what can't be seen."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
