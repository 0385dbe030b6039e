"""Files of a study, as the tests read them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

#: Options of a study of digits in which a training takes a moment.
TINY_DIGITS = (
    *("--train-per-class", "3", "--validation-per-class", "3", "--epochs", "2", "--seeds", "2", "--tuning-seeds", "1"),
    *("--weight-decays", "0", "1", "--strengths", "0.1", "1"),
)


def results_json(folder: Path) -> dict[str, Any]:
    """The numbers of a study."""
    content: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return content


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The trainings in a file of results, and only whole ones."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def results_of(path: Path) -> dict[str, Any]:
    """Result by what it depends on, without times; each only once."""
    lines = lines_of(path)
    found = {json.dumps(line["cell"], sort_keys=True): line["result"] for line in lines}
    assert len(found) == len(lines), "trained twice"
    return found


def table_rows(text: str) -> list[list[str]]:
    """Cells of all rows of Markdown tables."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]


def tables_of(printed: str) -> str:
    """What a study prints from its first table to the last one."""
    return printed[printed.index("### ") : printed.index(" trainings are done")]


def size_of_png(path: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height
