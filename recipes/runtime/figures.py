"""Figures as PNG, good enough for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import need

DOTS_PER_INCH = 200


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    # Labels count towards the size, so that none is cut off.
    figure.savefig(path, dpi=DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.06)


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes side by side."""
    figure = _empty(width, height)
    return figure, figure.subplots(1, columns)


def new_figures(width: float, height: float, rows: int, columns: int) -> tuple[Any, list[Any]]:
    """The same with several rows of axes, in one list, row by row."""
    figure = _empty(width, height)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _empty(width: float, height: float) -> Any:
    # Figures made this way belong to no window system and need no closing; Agg draws them.
    figure = need("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure
