"""Define the errors that people read, and print them."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError  # which takes a while, and stages begin here


class UserError(ValueError):
    """Describe in one sentence a file or a value that cannot be used: its name, its value and what would be right."""


class Diverged(FloatingPointError):
    """Report that a number of a training stopped being finite: which one, and at which step."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} at step {step}")
        self.what, self.step = what, step


@contextmanager
def report_user_errors(program: str) -> Iterator[None]:
    """End the program with one sentence and exit code 2 on a `UserError` or an OSError; bugs keep their traceback.

    What the terminal or file behind a stream cannot show is written as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        sentence = str(error)
    except OSError as error:  # a full disk, a file that vanished, no permission
        sentence = f"{error.filename or 'a file'}: {error.strerror or error}"
    else:
        return
    print(f"{program}: {visible(sentence)}", file=sys.stderr)
    sys.exit(2)


def one_line(error: BaseException, at_most: int = 200) -> str:
    """Return the message of any exception as part of a sentence."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = printable(message) or type(error).__name__
    return text if len(text) <= at_most else f"{text[:at_most]}…"


def printable(text: str) -> str:
    """Return a text on one line, with escapes for characters that cannot be seen."""
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """Return a text with escapes for what acts on terminals: all that can't be seen but line breaks and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def first_finding(error: "ValidationError") -> str:
    """Return the first thing that pydantic finds wrong, with its key."""
    first = error.errors(include_url=False, include_input=False)[0]
    key, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"{key!r}: {message}" if key else message
