"""Define the types of parameters, and turn values read from YAML into checked sections."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from phasegate.base.errors import UserError, printable, visible
from phasegate.params.reading import load_yaml

LARGEST = 1 << 16  # widths and numbers of experts; a larger one is a slip
MOST = 10_000_000  # steps and other counts
NAME = r"^[a-z][a-z0-9_]*$"
GOOD_NAME = "a name has small letters, digits and _, begins with a letter, and has at most 100 characters"
MEANING_ELSE = ("true", "false", "yes", "no", "on", "off", "null", "none", "nan", "inf", "infinity")
"""Names that parsers of YAML or of tables take for values."""
UNREADABLE = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What controls terminals, ends lines, turns the direction of text (CVE-2021-42574) or is half a character."""


def _refuse_other(value: object) -> object:
    if isinstance(value, bool | str):  # Python takes True for 1, and '010' for 10
        raise ValueError(f"{_brief.repr(value)} is not a number")
    return value


def _refuse_unreadable(value: str) -> str:
    if not re.search(r"[^\W_\u115f\u1160\u3164\uffa0]", value):  # fillers of Hangul are letters that show nothing
        raise ValueError("it is blank: state it before the phase runs")
    if found := UNREADABLE.search(value):
        raise ValueError(f"'{visible(value)[:80]}' has the control character {visible(found[0])}: leave it out")
    return value


def _refuse_other_meaning(name: str) -> str:
    if name in MEANING_ELSE:
        raise ValueError(f"the name {name!r} means something else in YAML or in tables: take another one")
    return name


Count = Annotated[int, Field(ge=1, le=MOST, strict=True)]
Index = Annotated[int, Field(ge=0, le=MOST, strict=True)]
Size = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
Number = Annotated[float, BeforeValidator(_refuse_other), Field(allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Probability = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
FileName = Annotated[str, Field(pattern=NAME, max_length=100)]
Name = Annotated[FileName, AfterValidator(_refuse_other_meaning)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Hypothesis = Annotated[str, AfterValidator(_refuse_unreadable)]
Scalar = bool | int | float | str


class Section(BaseModel):
    """Group parameters, frozen, and refuse unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ordered: ClassVar[tuple[tuple[str, str], ...]] = ()  # pairs of parameters: the first must be at most the second

    @model_validator(mode="after")
    def _check(self) -> Self:
        for low, high in self.ordered:
            check_at_most(low, getattr(self, low), high, getattr(self, high))
        self.check_together()
        return self

    def check_together(self) -> None:
        """Raise ValueError if the values do not go together: for subclasses to define."""


class Seeds(Section):
    """Name a block of seeds: the first one, and how many."""

    first: Annotated[int, Field(ge=0, lt=2**31, strict=True)]
    count: Annotated[int, Field(ge=1, le=10_000, strict=True)]

    @property
    def all(self) -> range:
        """Return every seed of the block."""
        return range(self.first, self.first + self.count)


SectionT = TypeVar("SectionT", bound=Section)


def check_at_most(name: str, value: float, limit_name: str, limit: float, reason: str = "") -> None:
    """Raise ValueError if the value of a parameter is above a limit that other parameters set."""
    if value > limit:
        raise ValueError(f"{name} is {value}: it must be at most {limit_name} = {limit}{reason}")


def override(base: SectionT, changes: Mapping[str, Scalar], where: str) -> SectionT:
    """Return `base` with some values replaced, checked as `parse` does."""
    return parse(type(base), {**base.model_dump(), **changes}, where)


def parse(section: type[SectionT], values: object, where: str = "") -> SectionT:
    """Return values read from YAML under the key `where` as a section; `UserError` names the first that is wrong."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, section, where)) from None


def load_section(path: Path, key: str, section: type[SectionT]) -> SectionT:
    """Return the section that an earlier stage wrote under `key` of a YAML file; `UserError` if it is not there."""
    content = load_yaml(path)
    return parse(section, content.get(key) if isinstance(content, dict) else None, f"{path}: {key}")


def suggestion(value: str, known: Iterable[str], otherwise: str = "it must be one of") -> str:
    """Return the closest of the known names as a question, or all of them if none is close."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1)
    return f"did you mean {near[0]}?" if near else f"{otherwise} {', '.join(names)}"


class _Brief(Repr):
    """Shorten values so that they fit into a sentence."""

    def repr_int(self, x: int, level: int) -> str:
        """Python writes no number of more than 4,300 digits."""
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"a number of {x.bit_length():,} bits"


_brief = _Brief()
_brief.maxlevel, _brief.maxstring, _brief.maxother, _brief.maxlong = 2, 80, 80, 80


def _explain(error: ValidationError, section: type[Section], where: str) -> str:
    """Put the first of pydantic's findings into a sentence with key, value and what would be right."""
    first = error.errors(include_url=False)[0]
    path = [printable(str(part)[:80]) for part in first["loc"]]
    key, value, message = ".".join(filter(None, [where, *path])), first["input"], first["msg"]
    if path[-1:] == ["[key]"] and first["type"] != "value_error":
        return f"{'.'.join(filter(None, [where, *path[:-2]]))} has the name {_brief.repr(value)}: {GOOD_NAME}"
    match first["type"]:
        case "extra_forbidden":
            allowed = _list_parameters(section, first["loc"][:-1])
            return f"{key} is not a parameter; {suggestion(path[-1], allowed, otherwise='known there:')}"
        case "missing":
            return f"{key} is missing"
        case "string_pattern_mismatch" if first["ctx"]["pattern"] == NAME:
            return f"{key} is {_brief.repr(value)}: {GOOD_NAME}"
        case "value_error":
            key = key.removesuffix(".[key]")
            sentence = message.removeprefix("Value error, ")
            return f"{key}: {sentence}" if key else sentence
        case "literal_error":
            known = re.findall("'([^']*)'", first["ctx"]["expected"])
            return f"{key} is {_brief.repr(value)}: {suggestion(value[:80] if isinstance(value, str) else '', known)}"
        case "model_type" | "dict_type":
            return f"{key or 'the file'} is {_brief.repr(value)}: it must hold names with values, or be {{}}"
        case _:
            return f"{key or 'the file'} is {_brief.repr(value)}: {message[0].lower()}{message[1:]}"


def _list_parameters(section: type[Section], path: tuple[int | str, ...]) -> list[str]:
    """List the parameters of the section at `path` below `section`."""
    annotation: Any = section
    for part in path:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            annotation = annotation.model_fields[str(part)].annotation
        else:  # dict[str, Section], whose values may be annotated
            annotation = get_args(annotation)[1]
            annotation = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return list(annotation.model_fields)
