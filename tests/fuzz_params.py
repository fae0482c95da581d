"""Damage parameter files: by slips that people make, and by attacks."""

import random
from pathlib import Path
from typing import Any

import yaml

from phasegate.params import load_params
from tests.damage import BOMBS, DEEP, ODD, PLACE, damage_file, damaged_tree
from tests.fuzz import Case
from tests.small_study import ROOT

VALUES = [*ODD, "\u2028", "\U0001f600", -(10**30), "0.5", "1e3", 1.0, -1e308, [0] * 10, [1, 0], [*range(10)], [-1]]
VALUES += [{"lr": 0.1}, {"lr": {}}, "mnist1d", "npz", "base", "default", "primary", "split", "p7b2"]
SNIPPETS: list[str] = []  # YAML that no Python value is dumped as
SNIPPETS += ["1" + "0" * 5000, "0x" + "f" * 100_000, "1e400", "1_000", "1:30:30", "0b12", "08", "-.inf", ".NaN", "~"]
SNIPPETS += ["2024-02-30", "0000-00-00", "2024-01-01T25:61:61Z", "!!timestamp abc", "!!timestamp [1]", "!!binary abc"]
SNIPPETS += ["!!binary =", "!!binary [1]", "!!int abc", "!!int []", "!!float abc", "!!float {}", "!!bool maybe"]
SNIPPETS += ["!!null abc", "!!str {}", "!!map []", "!!seq {}"]
SNIPPETS += ["!!set {a, b}", "!!set [a]", "!!omap [a: 1]", "!!omap [1]"]
SNIPPETS += ["!!python/object:os.system {}", "!!python/object/apply:os._exit [66]", "!x y"]
SNIPPETS += ["!!python/name:os.system ''", "!!python/tuple [1]", "!<tag:yaml.org,2002:int> 3", "!<> 1", "=", "! 1"]
SNIPPETS += ["&a [*a]", "&a {a: *a}", "*missing", "&a", "&a &b 1", "{<<: 3}", "{<<: [1]}", "{<<: {lr: 0.1}}"]
SNIPPETS += ["&a {<<: *a}", "{? [1, 2] : 3}", "{? {a: b} : c}", "{1: 2}", "{null: 1}", "{a: 1, a: 2}", "{true: 1}"]
SNIPPETS += ["{.nan: 1, .nan: 2}", "[" * 300 + "]" * 300, "[" * DEEP, "[" * 900 + "]" * 900, "{a: " * 300 + "}" * 300]
SNIPPETS += ["- " * 300 + "1", '"\\uD800"', '"\\x00"', '"\\x1b[2J"', '"\\U00110000"', '"\\q"', '"', "'", "|", ">", "%"]
SNIPPETS += ["@", "`", "---", "...", "|\n  a\n  b", "? a", "- a", "a: b: c", "\t1", "\x00", "\x07", "\ufeff1", "\u2028"]
SNIPPETS += ["[1, 2", "{a: 1", "]", *BOMBS]
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "cp037")


def originals(folder: Path) -> tuple[str, Any]:
    """Return the text of params.yaml, and its values."""
    text = (ROOT / "params.yaml").read_text()
    return text, yaml.safe_load(text)


def case(state: tuple[str, Any], draw: random.Random, folder: Path) -> Case:
    """Damage one parameter file."""
    text, values = state
    path = folder / "params.yaml"
    path.write_text(text)
    match draw.choice(["tree"] * 5 + ["snippet"] * 5 + ["lines"] * 2 + ["file"] * 3 + ["encoding"]):
        case "tree":
            path.write_bytes(_yaml(damaged_tree(values, draw, VALUES)))
        case "snippet":
            damaged = _yaml(damaged_tree(values, draw, [PLACE])).decode().replace(PLACE, draw.choice(SNIPPETS))
            path.write_bytes(damaged.encode(errors="surrogatepass"))
        case "lines":
            path.write_text(_damaged_lines(text, draw))
        case "file":
            damage_file(path, draw)
        case "encoding":
            path.write_bytes(text.replace("#", "# é").encode(draw.choice(ENCODINGS), errors="replace"))
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
                first = ["---", "%YAML 9.9", "%TAG ! x", "...", "- 1", "\ufeff", "a: &a 1", "*a : 1"]
                lines.insert(0, draw.choice(first))
    return draw.choice(["\n", "\n", "\n", "\r\n", "\r"]).join(lines)
