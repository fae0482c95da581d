"""Sections of parameters: the types of their values, and how values as read from YAML become checked objects."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from phasegate.errors import UserError, one_line, printable
from phasegate.files import read_bounded

LARGEST = 1 << 16  # widths and numbers of experts; a larger one is a slip
MOST = 10_000_000  # steps and other counts
MOST_VALUES = 100_000  # of a file, with aliases followed


def _no_bool(value: object) -> object:
    """Python takes True for 1; a parameter file must not."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    return value


Count = Annotated[int, Field(ge=1, le=MOST, strict=True)]
Index = Annotated[int, Field(ge=0, le=MOST, strict=True)]
Size = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
Seeds = Annotated[int, Field(ge=1, le=10_000, strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Probability = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)]
Text = Annotated[str, Field(min_length=1)]
Scalar = bool | int | float | str


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but for mappings merged into others (`<<`), which could take exponential time."""

    merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge into `node` those that it names, unless too many pairs were merged before."""
        super().flatten_mapping(node)
        self.merged += len(node.value)
        if self.merged > MOST_VALUES:
            raise yaml.YAMLError(f"it merges more than {MOST_VALUES:,} values")


class Section(BaseModel):
    """A frozen group of parameters that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SectionT = TypeVar("SectionT", bound=Section)


def override(base: SectionT, changes: Mapping[str, Scalar], where: str) -> SectionT:
    """`base` with some of its values replaced, checked as if it had been written so in full.

    Raises:
        UserError: naming the key under `where`.
    """
    return parse(type(base), {**base.model_dump(), **changes}, where)


def parse(section: type[SectionT], values: object, where: str = "") -> SectionT:
    """Values as read from YAML -> a checked section; `where` is the key they stand under.

    Raises:
        UserError: the first thing wrong, in one sentence.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, section, where)) from None


def load_section(path: Path, key: str, section: type[SectionT]) -> SectionT:
    """A section that an earlier stage wrote under `key` of a YAML file.

    Raises:
        UserError: if the file is missing or does not hold it.
    """
    content = load_yaml(path)
    return parse(section, content.get(key) if isinstance(content, dict) else None, f"{path}: {key}")


def load_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: if there is no such file, or it can't be read, is not YAML, or is of absurd size.
    """
    content = read_bounded(path)
    try:
        values = _Loader(content).get_single_data()
    except Exception as error:  # PyYAML's tags, dates and scanner raise whatever comes up
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    waiting, seen = [values], 0
    while waiting:
        value, seen = waiting.pop(), seen + 1
        if seen > MOST_VALUES:
            raise UserError(f"{path} has more than {MOST_VALUES:,} values: parameters take a few hundred")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return values


def suggestion(value: str, known: Iterable[str], otherwise: str = "it must be one of") -> str:
    """The closest of the known names as a question, or else all of them."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1)
    return f"did you mean {near[0]}?" if near else f"{otherwise} {', '.join(names)}"


class _Brief(Repr):
    """Values as part of a sentence, however large."""

    def repr_int(self, x: int, level: int) -> str:
        """Python writes no number of more than 4,300 digits."""
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"a number of {x.bit_length():,} bits"


_brief = _Brief()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80


def _explain(error: ValidationError, section: type[Section], where: str) -> str:
    """The first of pydantic's findings as a sentence with key, value and what would be right."""
    first = error.errors(include_url=False)[0]
    key = ".".join(part for part in (where, *map(_word, first["loc"])) if part)
    message, name = first["msg"], _word(first["loc"][-1]) if first["loc"] else ""
    match first["type"]:
        case "extra_forbidden":
            allowed = _fields(section, first["loc"][:-1])
            return f"{key} is not a parameter; {suggestion(name, allowed, otherwise='known there:')}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            sentence = message.removeprefix("Value error, ")
            return f"{key}: {sentence}" if key else sentence
        case "literal_error":
            known = re.findall("'([^']*)'", first["ctx"]["expected"])
            value = first["input"] if isinstance(first["input"], str) else ""
            return f"{key} is {_brief.repr(first['input'])}: {suggestion(value[:80], known)}"
        case _:
            return f"{key or 'the file'} is {_brief.repr(first['input'])}: {message[0].lower()}{message[1:]}"


def _word(part: int | str) -> str:
    """A key of a parameter file as part of a sentence."""
    return printable(str(part)[:80])


def _fields(section: type[Section], path: tuple[int | str, ...]) -> list[str]:
    """The parameters of the section at `path` below `section`."""
    annotation: Any = section
    for part in path:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            annotation = annotation.model_fields[str(part)].annotation
        else:  # dict[str, Section], whose values may be annotated
            annotation = get_args(annotation)[1]
            annotation = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return list(annotation.model_fields)
