"""Figures without pyplot: none is kept by a window system, and none needs closing."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from ...errors import ConfigurationError, WrongTypeError
from ..shared.libraries import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PathLike = Union[str, "os.PathLike[str]"]

#: A dollar sign in a name is no mathematics, and a name is no TeX, whatever the user's settings.
LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}

DOTS_PER_INCH = 200
#: Agg draws at most 2**16 pixels a side.
_MOST_PIXELS = 30_000
_LONGEST_NAME = 24
_TITLE_POINTS = 10


def new_figure(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure of so many inches, and its axes."""
    figure, [[axes]] = new_figures(width, height, 1, 1)
    return figure, axes


def new_figures(width: float, height: float, rows: int, columns: int) -> tuple[Figure, Any]:
    """Return a figure of so many inches, and an array ``[rows, columns]`` of axes."""
    figure: Figure = need("matplotlib.figure").Figure(figsize=(width, height), layout="compressed")
    need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    layout: Any = figure.get_layout_engine()
    layout.set(h_pad=0.12)  # with less, the title touches what is written above the axes
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(False)  # some styles turn it on
    return figure, grid


def checked_path(path: PathLike | None) -> Path | None:
    """Return where to write; called before anything is drawn, so that a wrong path costs no time."""
    if path is None:
        return None
    if not isinstance(path, (str, os.PathLike)):
        raise WrongTypeError(f"path must be a str or a Path, found {type(path).__name__}. Pass path='picture.png'.")
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigurationError(
            f"the folder of path={str(path)!r} does not exist. Use Path({str(path.parent)!r}).mkdir(parents=True)."
        )
    kinds = need("matplotlib.backends.backend_agg").FigureCanvasAgg.get_supported_filetypes()
    found = "a folder" if path.is_dir() else repr(path.suffix)
    if path.is_dir() or path.suffix[1:].lower() not in kinds:
        raise ConfigurationError(
            f"path={str(path)!r} must name a file of a known kind, found {found}. "
            f"Use for example {path.stem + '.png'!r}; the kinds are {', '.join(sorted(kinds))}."
        )
    return path


def finish(figure: Figure, title: str | None, path: Path | None) -> Figure:
    """Put a title above everything, settle the layout, and write the figure if there is a path."""
    if title is not None and not isinstance(title, str):
        raise WrongTypeError(f"title must be a str, found {type(title).__name__}.")
    if title is not None and title.strip():
        title = _drawable(title)
        letters = max(10, int(0.93 * figure.get_figwidth() * len(title) / width_of([title], _TITLE_POINTS)))
        lines = [line for part in title.splitlines() for line in textwrap.wrap(part, letters) or [""]]
        figure.set_figheight(figure.get_figheight() + len(lines) * 1.5 * _TITLE_POINTS / 72)
        figure.suptitle("\n".join(lines), fontsize=_TITLE_POINTS, **LITERAL)
    with _quiet():
        for _ in range(2):  # each starts from where the last one left the axes, whose proportions are fixed
            figure.draw_without_rendering()
        if path is not None:
            dots = min(DOTS_PER_INCH, _MOST_PIXELS / max(figure.get_size_inches()))
            # Labels count towards the size, so that none is cut off.
            figure.savefig(path, dpi=dots, bbox_inches="tight", pad_inches=0.06)
    return figure


def shortened(names: Sequence[str]) -> list[str]:
    """Return names of at most 24 letters, in one line each: beginning and end of longer ones, with a number if alike."""
    tidy = [" ".join(_drawable(name).split()) for name in names]
    short = [name if len(name) <= _LONGEST_NAME else f"{name[:13]}\N{HORIZONTAL ELLIPSIS}{name[-10:]}" for name in tidy]
    alike = Counter(short)
    return [
        name if alike[name] == 1 else f"{name[:16]}\N{HORIZONTAL ELLIPSIS} #{index}" for index, name in enumerate(short)
    ]


def width_of(names: Sequence[str], points: float) -> float:
    """Return how many inches the longest name takes, in the user's font."""
    scratch = need("matplotlib.figure").Figure(dpi=100)
    canvas = need("matplotlib.backends.backend_agg").FigureCanvasAgg(scratch)
    with _quiet():
        extents = (
            scratch.text(0, 0, name, fontsize=points, **LITERAL).get_window_extent(canvas.get_renderer())
            for name in names
        )
        return float(max(extent.width for extent in extents)) / 100


def _drawable(text: str) -> str:
    """Return a text with a question mark for half a surrogate pair, which cannot be drawn."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, a glyph that the font lacks is drawn as a box without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield
