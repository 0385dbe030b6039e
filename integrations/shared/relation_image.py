"""The relation weights of a report as an image, for trackers."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ... import SaliencyReport

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]


def image_of(report: SaliencyReport) -> Image:
    """Return ``[height, width, 3]``: the relations from 0 (dark) to the largest one (bright), grey where there are none."""
    import numpy as np

    relations = report.relations.detach().cpu().double().numpy().copy()
    np.fill_diagonal(relations, np.nan)
    relations[~np.isfinite(relations)] = np.nan
    known = relations[~np.isnan(relations)]
    largest = float(known.max()) if known.size and known.max() > 0 else 1.0
    try:
        figure = importlib.import_module("matplotlib.figure")
        backend = importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError:
        return _plain_image(relations / largest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font does not have
        return _labelled_image(relations, largest, report.tasks, figure, backend)


def _plain_image(shares: NDArray[np.float64]) -> Image:
    import numpy as np

    stops = np.linspace(0, 1, 5)
    colours = np.array([(70, 0, 85), (60, 80, 140), (30, 145, 140), (95, 200, 95), (255, 230, 35)])
    cells = np.stack([np.interp(np.nan_to_num(shares), stops, channel) for channel in colours.T], axis=-1)
    cells[np.isnan(shares)] = 211
    pixels = min(64, max(8, 480 // len(shares)))
    return cells.astype(np.uint8).repeat(pixels, axis=0).repeat(pixels, axis=1)


def _labelled_image(
    relations: NDArray[np.float64], largest: float, tasks: Sequence[str], figure: Any, backend: Any
) -> Image:
    import numpy as np

    labels = [task if len(task) <= 24 else task[:23] + "\N{HORIZONTAL ELLIPSIS}" for task in tasks]
    inches = 3 + 0.25 * min(len(tasks), 80)
    drawn = figure.Figure(figsize=(inches + 0.5, inches), dpi=100, layout="constrained")
    canvas = backend.FigureCanvasAgg(drawn)
    axes = drawn.add_subplot(facecolor="lightgrey")
    picture = axes.imshow(relations, vmin=0, vmax=largest, cmap="viridis", interpolation="nearest")
    # Without parse_math a dollar sign in a name would be taken for mathematics.
    axes.set_xticks(range(len(tasks)), labels, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(tasks)), labels, fontsize=8, parse_math=False)
    drawn.colorbar(picture, ax=axes, shrink=0.8)
    canvas.draw()
    image: Image = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return image
