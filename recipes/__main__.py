"""``python -m recipes`` lists the commands."""

from __future__ import annotations

import ast
from pathlib import Path

from .runtime.tables import aligned


def commands() -> dict[str, str]:
    """Each command with the first line of what it says about itself."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = about.partition("\n")[0]
    return found


if __name__ == "__main__":
    rows = [[f"python -m recipes.{name}", about] for name, about in commands().items()]
    print(f"Each of these explains its options with --help.\n\n{aligned(rows, left=2)}")
