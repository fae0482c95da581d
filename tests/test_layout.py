"""The house rules on size, names and imports."""

import ast
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.small_study import PATH, ROOT, ended

FILES = sorted(path for name in ("phasegate", "stages", "bench", "plugins") for path in (ROOT / name).rglob("*.py"))


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_has_over_350_lines_and_no_function_over_60(path: Path) -> None:
    assert lines(path) <= 350
    assert [f.name for f in functions(path) if (f.end_lineno or 0) - f.lineno >= 60] == []


def test_no_folder_of_the_library_has_over_12_files_and_its_root_at_most_5() -> None:
    folders = Counter(path.parent for path in FILES if path.is_relative_to(ROOT / "phasegate"))
    assert folders.pop(ROOT / "phasegate") <= 5
    assert {str(folder): count for folder, count in folders.items() if count > 12} == {}


@pytest.mark.parametrize(("folder", "most"), [("phasegate", 12_772), ("tests", 14_143)])
def test_library_and_tests_stay_small(folder: str, most: int) -> None:
    assert sum(map(lines, (ROOT / folder).rglob("*.py"))) <= most


def test_texts_name_their_encoding() -> None:
    rule = ["ruff", "check", "--isolated", "--preview", "--select", "PLW1514"]
    words = [*rule, "phasegate", "stages", "bench", "plugins"]
    assert subprocess.run(words, cwd=ROOT, env={"PATH": PATH}, check=False).returncode == 0


def test_names_of_tests_have_under_80_characters() -> None:
    tests = (function.name for path in (ROOT / "tests").glob("*.py") for function in functions(path))
    assert [name for name in tests if name.startswith("test_") and len(name) >= 80] == []


def test_an_import_of_a_higher_package_breaks_the_contract(tmp_path: Path) -> None:
    def lint() -> subprocess.CompletedProcess[str]:
        return ended("lint-imports", "--no-cache", "--no-logo", cwd=tmp_path, env={"PATH": PATH})

    shutil.copytree(ROOT / "phasegate", tmp_path / "phasegate", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert lint().returncode == 0
    layers = {"base/settings.py": "records.tables", "training/loop.py": "surgery.probe", "stage.py": "tools.plan"}
    for name, module in layers.items():
        text = (ROOT / "phasegate" / name).read_text()
        (tmp_path / "phasegate" / name).write_text(f"{text}\n\nimport phasegate.{module}\n")
        done = lint()
        assert done.returncode == 1 and f"-> phasegate.{module} " in done.stdout, name
        (tmp_path / "phasegate" / name).write_text(text)
    (tmp_path / "phasegate/another").mkdir()
    (tmp_path / "phasegate/another/__init__.py").touch()
    assert "another" in lint().stdout  # every package has a layer
