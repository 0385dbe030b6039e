"""Every Python block of README.md and docs/ runs as it stands (those of docs/your_loop.md: test_your_loop.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recipes.methods.methods import METHODS
from tests.support.paths import ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages.remove(ROOT / "docs" / "your_loop.md")  # test_your_loop.py
    return [
        (f"{page.name}-{number}", code)
        for page in pages
        for number, code in enumerate(BLOCK.findall(page.read_text()), start=1)
    ]


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in blocks()])
def test_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    if "from chemprop" in code:
        pytest.importorskip("chemprop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METHODS, "_methods", dict(METHODS._methods))  # one block adds to it
    exec(compile(code, "README", "exec"), {"__name__": "__main__"})


def test_the_readme_has_blocks_and_its_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(BLOCK.findall(readme)) >= 1
    assert len(readme.splitlines()) <= 220
    commands = re.findall(r"^```bash\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    lines = [line for block in commands for line in block.splitlines() if line.strip()]
    assert sum("python -m recipes.demo" in line for line in lines) == 1
    assert sum("python -m pytest" in line for line in lines) == 1
    ci = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in ci, "CI must run the README's own test command"


def test_the_examples_of_where_to_add_are_short() -> None:
    found = BLOCK.findall((ROOT / "docs" / "how_it_works.md").read_text())
    assert len(found) == 6
    assert max(len(block.splitlines()) for block in found) <= 20
