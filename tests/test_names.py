"""Names that people choose survive every table, or are refused first; so is what YAML reads in two ways."""

import copy
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import parse_yaml
from hypothesis import example, given
from hypothesis import strategies as st

from phasegate.base.errors import UserError
from phasegate.params import Params, load_params
from phasegate.params.fields import GOOD_NAME, parse
from phasegate.params.reading import load_yaml
from phasegate.records.tables import NAMES, read_table, write_table
from tests.damage import put
from tests.small_study import ROOT

VALUES = yaml.safe_load((ROOT / "params.yaml").read_text())
WORDS = ("null", "NA", "nan", "none", "true", "1e5", "007", "inf", "no", "N/A", "", "#N/A", "-1.#IND", "<NA>", "None")


def refusal(key: str, value: Any) -> str:
    put(values := copy.deepcopy(VALUES), key, value)
    with pytest.raises(UserError) as error:
        parse(Params, values)
    assert "\n" not in str(error.value) and str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    "name", [*WORDS, None, True, 1e5, 7, "a\n", "A", "a/b", "..", "a b", "é", "<b>", "\x1b[2J", "a|b"]
)
def test_a_name_that_means_something_else_is_refused_wherever_people_choose_one(name: Any) -> None:
    arm, model = {"signal": "loudest"}, VALUES["references"]["mnist1d"]["mlp"]
    places = {"plugins.arms": {name: arm}, "q1.candidates": {name: {}}, "q2.candidates": {name: {}}}
    places |= {"references.mnist1d": {name: model}, "data.tasks.mnist1d": {name: [0, 1] * 5}}
    for key, value in places.items():
        said = refusal(key, value)
        assert said in (
            f"{key} has the name {name!r}: {GOOD_NAME}",
            f"{key}.{name}: the name {name!r} means something else in YAML or in tables: take another one",
        )
    if isinstance(name, str):
        said = refusal("decisions.phases.p7b2.arms", [name])
        assert said == f"decisions.phases.p7b2.arms.0 is {name!r}: {GOOD_NAME}" or "means something else" in said


def test_a_name_that_means_another_arm_beside_ones_own_is_refused_and_no_other() -> None:
    meant = {"baseline": "p7a/baseline", "continue": "p7a/continue", "stay": "p7c2/stay", "leave": "p7c3/leave"}
    for name, what in (meant | {"primary": "the arm that decides a phase"}).items():
        said = refusal("plugins.arms", {"mine": {"signal": "a"}, name: {"signal": "a"}})
        assert said == f"plugins: arms has {name!r}, which means {what}: take another name"
    others = {*yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"], "small", "sham", "own", "base"}
    arms = {name: {"signal": "a"} for name in others}
    assert parse(Params, VALUES | {"plugins": VALUES["plugins"] | {"arms": arms}})


def test_a_reference_and_a_candidate_of_one_table_have_different_names() -> None:
    assert "has 'mlp', as q1 names a candidate, and both stand in one table" in refusal("q1.candidates", {"mlp": {}})
    model = VALUES["references"]["mnist1d"]["mlp"]
    assert "references.default has 'base', as q1 names" in refusal("references.default", {"base": model})


def test_names_survive_every_table(tmp_path: Path) -> None:
    """Those of classes are refused only where they can't be seen: other people gave them."""
    names = [word for word in WORDS if word] + ["|", "a,b", '"', " a", "<script>", "$x^{$"]
    for column in NAMES:
        for rows in (names, ["true"], ["007"], ["1e5", "2"], ["NA"]):
            write_table(tmp_path / "a.csv", pd.DataFrame({column: rows, "seed": range(len(rows))}))
            assert read_table(tmp_path / "a.csv")[column].tolist() == rows
    assert {"arm", "candidate", "class", "operation", "signal", "task"} <= {*NAMES}
    assert [path.name for path in (ROOT / "phasegate").rglob("*.py") if "read_csv" in path.read_text()] == ["tables.py"]


READ_ALIKE = ["1e-5", "1e5", "1E-8", "1.5e3", "+.5", "-.5", ".5", "5.", "1_000", "0x10", "0b11", "1.0e-7", "'010'"]
READ_ALIKE += ["'yes'", "00", "-07", "0_7", "0:1", "!!str no", "!!str 2001-01-01"]
READ_TWICE = ["010", "-010", "08", "-017", "0_10", "0o10", "1:30", "-1:30", "1:30:30", "1:30.5", "0:1.5"]
READ_TWICE += ["yes", "No", "ON", "off"]
SAME = ["1: 2\n0x1: 3", "1: 2\ntrue: 3", "null: 1\n~: 2", "seeds: {<<: {a: 1}, <<: {b: 2}}"]
DATES = ["2001-01-01", "2001-01-01 10:00:00", "2001-13-45"]


@pytest.mark.parametrize("text", READ_ALIKE)
def test_numbers_are_read_as_dvc_reads_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"a: {text}\n")
    ours, dvcs = load_yaml(tmp_path / "a.yaml")["a"], parse_yaml(f"a: {text}\n", "a")["a"]
    assert (ours, type(ours)) == (dvcs, type(dvcs))


@pytest.mark.parametrize("text", READ_TWICE + DATES)
@pytest.mark.parametrize("place", ["b: {{c: [1, {}]}}", "b: {{c: {{{}: 1}}}}", "b: &x {{c: {}}}\nd: *x"])
def test_what_parsers_read_differently_is_refused_with_its_place(text: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"# first\n{place.format(text)}\n")
    with pytest.raises(UserError) as error:
        load_yaml(path)
    why = "which is read as a date: no parameter is one" if text in DATES else "which parsers of YAML read differently"
    said = str(error.value)
    assert said.startswith(f"{path}, line 2: ") and f" is {text}, {why}" in said and "b.c" in said
    assert said.endswith(f"'{text}' in quotes if it is text")


@pytest.mark.parametrize("text", ["seeds: 1\nseeds: 2", "seeds: {count: 1, count: 2}", "{seeds: 1, 'seeds': 2}", *SAME])
def test_a_repeated_key_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"line \d: (the file|seeds) has (seeds|count|0x1|true|~|<<) twice: keep one$"):
        load_yaml(tmp_path / "a.yaml")


@given(st.text("0123456789_.:eExob+-", max_size=7))
@example("+_1")
@example("._1")
@example("._")
@example("1.e5")
@example("0:1")
def test_no_number_is_read_in_two_ways(text: str) -> None:
    path = Path("/dev/null")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phasegate.params.reading.read_bounded", lambda _: f"a: {text}\n".encode())
        try:
            ours = load_yaml(path)
        except UserError as error:
            if "read differently" in str(error):
                with suppress(ValueError):  # one of the two refuses it
                    assert repr(yaml.safe_load(f"a: {text}\n")) != repr(dict(parse_yaml(f"a: {text}\n", "a")))
            return
    assert repr(ours) == repr(parse_yaml(f"a: {text}\n", "a"))


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ("1e-8", 1e-8),
        ("1e5", 1e5),
        (".5", 0.5),
        ("010", "p7b4.price: '010' is not a number"),
        ("0x10", "p7b4.price: '0x10' is not a number"),
        ("1:30", "p7b4.price is 1:30, which parsers of YAML read differently: write a decimal number"),
        ("yes", "p7b4.price is yes, which parsers of YAML read differently: write true"),
    ],
)
def test_a_value_of_the_command_line_is_what_was_meant_or_refused(value: str, right: object, tmp_path: Path) -> None:
    path = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    apply_overrides(path, [f"p7b4.price={value}"])  # as `dvc exp run --set-param` does
    if isinstance(right, float):
        assert load_params(path).p7b4.price == right
    else:
        with pytest.raises(UserError) as error:
            load_params(path)
        assert str(right) in str(error.value)
