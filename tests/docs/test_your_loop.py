"""The blocks of docs/your_loop.md whose library is installed: those of the extras; .ci/foreign-loops installs the others."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib import metadata
from types import ModuleType

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / ".ci" / "foreign_loops.py"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("foreign_loops", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


foreign_loops = loaded()


@pytest.mark.parametrize("library", foreign_loops.LOOPS)
def test_a_loop_does_what_the_page_says(library: str) -> None:
    for package in foreign_loops.LOOPS[library].packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed: .ci/foreign-loops {library}")
    assert foreign_loops.failures(library) == []


def test_every_block_is_one_of_a_loop() -> None:
    page = foreign_loops.PAGE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [foreign_loops.block_of(library) for library in foreign_loops.LOOPS] == blocks


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("loss = loss + regularizer(losses=loss)  # line 2", "regularizer(losses=loss)  # line 2", "not reached"),
        (', feature="2", strength', ", strength", "does not reach the backbone"),
        (
            "register(regularizer, accelerator, optimizer=optimizer)",
            "register(regularizer, accelerator)",
            "moved 0 times",
        ),
        ("optimizer.step()", "optimizer.step(), regularizer.step()  # line 2", "3 optimizer steps"),
        ("loss = loss + regularizer", "loss = 1.1 * loss + regularizer", "with strength 0 these differ"),
        (
            "=optimizer)  # line 1",
            "=optimizer), model[0].register_forward_hook(lambda *_: None)  # line 1",
            "remove() left",
        ),
    ],
)
def test_the_script_finds_what_is_wrong(old: str, new: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = foreign_loops.block_of("accelerate")
    assert old in block
    monkeypatch.setattr(foreign_loops, "block_of", lambda _: block.replace(old, new))
    assert any(said in found for found in foreign_loops.failures("accelerate"))
