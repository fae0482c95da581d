"""Read YAML files in the one way in which every parser reads them.

PyYAML follows YAML 1.1, and DVC, whose `dvc.lock` notes the parameters, YAML 1.2. Numbers such as 1e-5, which DVC
writes for `--set-param`, are numbers here as they are there. What else the two read differently is refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from phasegate.base import used
from phasegate.base.errors import UserError, one_line, printable
from phasegate.base.files import read_bounded

MOST_VALUES = 100_000  # of a file, with aliases followed
TAG = "tag:yaml.org,2002:"
NUMBERS = r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?)"
"""Numbers of YAML 1.2 that 1.1 takes for text: without a dot, a sign of the exponent or a digit before the dot."""
UNLIKE = {  # what the versions read differently, and what to write
    r"[-+]?0(?![0_]*[0-7]?_*$)[0-9_]+|([-+]|[-+]?\.)_[0-9_]*([eE][-+][0-9]+)?": "write it without zeros or _ before it",
    r"[-+]?0o[0-7_]+": "write a decimal number",
    r"[-+]?([1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)": "write a decimal number",
    r"yes|Yes|YES|on|On|ON": "write true",
    r"no|No|NO|off|Off|OFF": "write false",
}


class _Loader(yaml.SafeLoader):
    """Bound what PyYAML's safe loader merges (`<<`), which could take exponential time, and mark values with a tag."""

    merged = 0

    def compose_scalar_node(self, anchor: dict[Any, yaml.Node]) -> yaml.ScalarNode:
        tag = self.peek_event().tag  # type: ignore[no-untyped-call]
        node = super().compose_scalar_node(anchor)
        node.style = node.style or tag  # which says what it is, as quotes do
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        self.merged += len(node.value)
        if self.merged > MOST_VALUES:
            raise yaml.YAMLError(f"it merges more than {MOST_VALUES:,} values")


_Loader.add_implicit_resolver(f"{TAG}float", re.compile(f"(?:{NUMBERS})$"), list("-+.0123456789"))


def load_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    `UserError` if it can't be read, isn't YAML, is of absurd size, or holds what parsers read differently.
    """
    used.note_content(path, content := read_bounded(path))
    try:
        loader = _Loader(content)
        if (node := loader.get_single_node()) is None:
            return None
        found = next(_doubts(loader, node), None)
        values = None if found else loader.construct_document(node)
    except Exception as error:  # PyYAML's tags, dates and scanner raise exceptions of every kind
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if found:
        raise UserError(f"{path}, line {found[0]}: {found[1]}")
    waiting, seen = [values], 0
    while waiting:
        value, seen = waiting.pop(), seen + 1
        if seen > MOST_VALUES:
            raise UserError(f"{path} has more than {MOST_VALUES:,} values: parameters take a few hundred")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return values


def _doubts(loader: _Loader, node: yaml.Node) -> Iterator[tuple[int, str]]:
    """Yield what can be read in two ways, with its line: values that are not in quotes, and repeated keys."""
    waiting, seen = [(node, "")], set[int]()
    while waiting:
        node, name = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            if said := _doubt(node):
                yield node.start_mark.line + 1, f"{name or 'the file'} {said}"
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(child, f"{name}.{place}".lstrip(".")) for place, child in enumerate(node.value)][::-1]
        elif isinstance(node, yaml.MappingNode):
            keys, below = set[Any](), []
            for key, child in node.value:
                text = printable(str(key.value)[:80]) if isinstance(key, yaml.ScalarNode) else ""
                if isinstance(key, yaml.ScalarNode):
                    as_text = key.tag == f"{TAG}merge" or _doubt(key)
                    value = key.value if as_text else loader.construct_object(key)  # 0x1 is 1
                    if value in keys:
                        yield key.start_mark.line + 1, f"{name or 'the file'} has {text} twice: keep one"
                    keys.add(value)
                below += [(key, f"a key of {name or 'the file'}"), (child, f"{name}.{text}".lstrip("."))]
            waiting += below[::-1]


def _doubt(node: yaml.ScalarNode) -> str:
    """Say what is doubtful about a value, and what to write; nothing if nothing is."""
    if node.style and node.tag == f"{TAG}str":  # in quotes, or tagged
        return ""
    text = printable(node.value[:80])
    quotes = f"'{text}' in quotes if it is text"
    if node.tag == f"{TAG}timestamp":
        return f"is {text}, which is read as a date: no parameter is one; write {quotes}"
    right = next((right for pattern, right in UNLIKE.items() if re.fullmatch(pattern, node.value)), "")
    return f"is {text}, which parsers of YAML read differently: {right}, or {quotes}" if right else ""
