"""Every row of the support matrix in docs/processes.md, and of the table in docs/models.md, names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT, TESTS

PAGE = ROOT / "docs" / "processes.md"
MODELS = ROOT / "docs" / "models.md"


def rows() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").split("## Support matrix")[1].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return table[2:]


def names_in(file: Path) -> set[str]:
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found.update(f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_names_a_test(row: list[str]) -> None:
    what, state, advice, test = row
    assert what
    assert advice
    assert state.startswith(
        (
            "exact",
            "works",
            "not possible",
            "within",
            "an error",
            "one warning",
            "relations",
            "do not",
            "bit",
            "the same",
            "training",
        )
    )
    file, _, name = test.strip("`").partition("::")
    assert name in names_in(TESTS / file)


def test_known_failures_are_strict() -> None:
    """A row that says "wrong" has a test that would tell if it came right."""
    for what, state, _, test in rows():
        if "wrong" in state:
            file, _, name = test.strip("`").partition("::")
            assert "@pytest.mark.xfail(strict=True" in (TESTS / file).read_text().split(f"def {name}(")[0][-300:], what


def test_models_are_the_rows_of_their_page() -> None:
    """docs/models.md names tests that exist, and all those on models as people write them."""
    named = set(re.findall(r"`([\w/]+\.py)::(test_\w+)`", MODELS.read_text(encoding="utf-8")))
    assert [(file, name) for file, name in sorted(named) if name not in names_in(TESTS / file)] == []
    files = {path: f"capture/models/{path.name}" for path in (TESTS / "capture" / "models").glob("test_*.py")}
    written = {(file, name) for path, file in files.items() for name in names_in(path) if name.startswith("test_")}
    assert written == {(file, name) for file, name in named if file in files.values()}
    assert len(named) > len(written) + 10
