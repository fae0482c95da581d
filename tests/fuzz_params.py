"""Damaged parameter files: what people write, and what nobody should."""

import random
from pathlib import Path
from typing import Any

import yaml

from phasegate.params import load_params
from tests.damage import DEEP, damaged_bytes, damaged_tree, replaced
from tests.fuzz import Case
from tests.small_study import ROOT

VALUES: tuple[Any, ...] = (
    *(None, "", " ", [], {}, [[]], [{}], "abc", "ключ", "\x1b[2J", "\u2028", "\U0001f600", "a\nb", "x" * 100_000),
    *(True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**400, "1", "0.5", "1e3"),
    *(0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
    *([0] * 10, [1, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [None], ["a"], [-1], {"a": 1}, {"lr": 0.1}, {"lr": {}}),
    *("mnist1d", "npz", "base", "default", "primary", "split", "../../etc/passwd", "/dev/zero", "p7b2", "conv"),
)
SNIPPETS = (  # YAML that no Python value is dumped as
    *("1" + "0" * 5000, "0x" + "f" * 100_000, "1e400", "1_000", "1:30:30", "0b12", "08", "-.inf", ".NaN", "~"),
    *("2024-02-30", "2024-13-45", "2024-01-01", "0000-00-00", "2024-01-01T25:61:61Z", "2024-01-01 00:00:00 +99:99"),
    *("!!timestamp 2024-02-30", "!!timestamp abc", "!!timestamp [1]", "!!binary abc", "!!binary =", "!!binary [1]"),
    *("!!int abc", '!!int ""', "!!int 1.5", "!!int []", "!!float abc", '!!float ""', "!!float {}", "!!bool maybe"),
    *("!!null abc", "!!str {}", "!!map []", "!!seq {}", "!!set {a, b}", "!!set [a]", "!!omap [a: 1]", "!!omap [1]"),
    *("!!pairs [a: 1]", "!!pairs 1", "!!python/object:os.system {}", "!!python/object/apply:os._exit [66]", "!x y"),
    *("!!python/name:os.system ''", "!!python/tuple [1]", "!<tag:yaml.org,2002:int> 3", "!<> 1", "=", "! 1"),
    *("&a [*a]", "&a {a: *a}", "*missing", "&a", "&a &b 1", "{<<: 3}", "{<<: [1]}", "{<<: {lr: 0.1}}", "&a {<<: *a}"),
    *("{? [1, 2] : 3}", "{? {a: b} : c}", "{1: 2}", "{null: 1}", "{a: 1, a: 2}", "{true: 1}", "{.nan: 1, .nan: 2}"),
    *("[" * 300 + "]" * 300, "[" * DEEP, "[" * 900 + "]" * 900, "{a: " * 300 + "}" * 300, "- " * 300 + "1"),
    *('"\\uD800"', '"\\x00"', '"\\x1b[2J"', '"\\U00110000"', '"\\q"', '"', "'", "|", ">", "%", "@", "`", "---", "..."),
    *("|\n  a\n  b", "? a", "- a", "a: b: c", "\t1", "\x00", "\x07", "\ufeff1", "\u2028", "[1, 2", "{a: 1", "]"),
    "[" + ", ".join(["&a0 [lol, lol]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]) + "]",
    "{" + ", ".join(["a0: &a0 {a: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 20))]) + "}",
    "{" + ", ".join(["a0: &a0 {a: 1}", *(f"a{i}: &a{i} {{<<: [{f'*a{i - 1}, ' * 10}]}}" for i in range(1, 12))]) + "}",
)
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "cp037")
PLACE = "placeholder_of_a_snippet"


def originals(folder: Path) -> tuple[str, Any]:
    """The parameter file of the study, and what it says."""
    text = (ROOT / "params.yaml").read_text()
    return text, yaml.safe_load(text)


def case(state: tuple[str, Any], draw: random.Random, folder: Path) -> Case:
    """One damaged parameter file, to be read."""
    text, values = state
    path = folder / "params.yaml"
    path.write_text(text)
    match draw.choice(["tree"] * 5 + ["snippet"] * 5 + ["lines"] * 2 + ["bytes"] * 2 + ["encoding", "replaced"]):
        case "tree":
            path.write_bytes(_yaml(damaged_tree(values, draw, VALUES)))
        case "snippet":
            tree = damaged_tree(values, draw, [PLACE])
            damaged = _yaml(tree).decode().replace(PLACE, draw.choice(SNIPPETS))
            path.write_bytes(damaged.encode(errors="surrogatepass"))
        case "lines":
            path.write_text(_damaged_lines(text, draw))
        case "bytes":
            path.write_bytes(damaged_bytes(text.encode(), draw))
        case "encoding":
            path.write_bytes(text.replace("#", "# é").encode(draw.choice(ENCODINGS), errors="replace"))
        case "replaced":
            replaced(path, draw)
    return Case((lambda: load_params(path),))


def _yaml(tree: Any) -> bytes:
    return bytes(yaml.safe_dump(tree, sort_keys=False, encoding="utf-8"))


def _damaged_lines(text: str, draw: random.Random) -> str:
    lines = text.splitlines()
    for _ in range(draw.choice([1, 1, 3, 20])):
        at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        match draw.choice(["copy", "delete", "indent", "tab", "swap", "snippet", "before"]):
            case "copy":
                lines.insert(other, lines[at])
            case "delete" if len(lines) > 1:
                del lines[at]
            case "indent":
                lines[at] = f" {lines[at]}"
            case "tab":
                lines[at] = f"\t{lines[at].strip()}"
            case "swap":
                lines[at], lines[other] = lines[other], lines[at]
            case "snippet":
                lines[at] = f"{lines[at].partition(':')[0]}: {draw.choice(SNIPPETS)}"
            case "before":
                lines.insert(
                    0, draw.choice(["---", "%YAML 9.9", "%TAG ! x", "...", "- 1", "\ufeff", "a: &a 1", "*a : 1"])
                )
    return draw.choice(["\n", "\n", "\n", "\r\n", "\r"]).join(lines)
