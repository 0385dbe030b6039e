"""Saliency maps over images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import interpolate

from ..shared.libraries import need
from .canvas import LITERAL, PathLike, checked_path, finish, new_figure, shortened, width_of
from .images import images_of, labels_of, maps_of
from .inputs import Numbers, task_names

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from .inputs import Array

    Pixels = NDArray[np.uint8]


#: Weak and strong positive, weak and strong negative saliency; apart from each other for colour-blind readers too.
_POSITIVE = ((0.97, 0.80, 0.20), (0.84, 0.24, 0.0))
_NEGATIVE = ((0.45, 0.80, 0.97), (0.0, 0.28, 0.72))
_MOST_OPAQUE = 0.9
#: Pixels a side; larger images are made smaller, since no panel has more.
_MOST_PIXELS = 256
#: A smaller share of negative saliency is rounding.
_ROUNDING = 1e-6


def draw_saliency(
    images: Numbers,
    maps: Numbers,
    tasks: Iterable[str] | None = None,
    path: PathLike | None = None,
    *,
    labels: Numbers | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    title: str | None = None,
) -> Figure:
    """Draw what each task looks at: a row for each image, first the image itself, then one panel for each task.

    A panel is the grey image under the task's map. Colour and opacity say how large the map is relative to its row's scale
    ``s``, the largest absolute value of all maps of that image, written at its left: panels of a row can be compared with
    each other, and those of different rows by ``s``. With negative values anywhere, orange is positive and blue negative,
    centred at 0; else there is orange alone. A map that is zero everywhere leaves the plain grey image, and has a 0 in its
    corner.

    Args:
        images: ``[B, 3, H, W]``, or grey ``[B, 1, H, W]``; B at most 32. In [0, 1], or 0 to 255 as uint8, or normalised.
        maps: ``[T, B, h, w]``, of any size; resized bilinearly. For a feature map ``[B, C, h, w]`` and its saliencies
            ``[T, B, C, h, w]`` (``task_saliencies(..., pool=None)``), gradient times activation is
            ``(saliencies * features).sum(2)``.
        tasks: T names. Default: numbers. Long ones are shortened.
        path: a file to write, of a kind that its ending tells (``.png``, ``.pdf``, ``.svg``).
        labels: ``[B, T]``, 0 or 1: a black frame marks what is true. -1 or NaN where unknown has no frame, as 0 has none.
        mean, std: what the images were normalised with, a number or one for each channel.
        title: above the picture.

    Returns:
        The figure.

    Raises:
        WrongTypeError, ShapeError: an argument of another type or shape.
        TaskError: names that do not fit the maps.
        NonFiniteError: NaN or infinity in images or maps.
        ConfigurationError: colours outside [0, 1], unknown labels, too many images, no folder for ``path``.
        MissingArgumentError: one of ``mean`` and ``std`` without the other.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> maps = torch.randn(3, 2, 8, 8)
        >>> figure = draw_saliency(images, maps, ["smiling", "young", "glasses"], labels=[[1, 0, 1], [0, 0, 1]])
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['image', 'smiling', 'young', 'glasses']
    """
    target = checked_path(path)
    colours = images_of(images, mean, std)
    values = maps_of(maps, len(colours))
    names = shortened(task_names(tasks, None, len(values), f"maps {list(values.shape)}"))
    marks = None if labels is None else labels_of(labels, len(colours), len(names))
    signed = bool(values.min() < -_ROUNDING * abs(values).max())
    scales = [float(abs(values[:, row]).max()) for row in range(len(colours))]
    rows = [_row(image, values[:, row], scales[row]) for row, image in enumerate(colours)]
    height, width = rows[0].shape[1:3]
    gap = max(2, round(0.08 * width))
    panel = min(1.25, max(0.62, 13 / (len(names) + 1)))
    widest = width_of(["image", *names], 8)
    upright = widest > 0.95 * panel
    figure, axes = new_figure(
        (len(names) + 1) * panel * (1 + gap / width) + 0.9,
        len(rows) * panel * (height + gap) / width + (widest if upright else 0.25) + 1.2,
    )
    axes.imshow(_mosaic(rows, gap), interpolation="antialiased", origin="upper")
    _label_panels(axes, names, scales, (height + gap, width + gap), (height, width), upright)
    _write_zeros(axes, values, (height + gap, width + gap), height)
    if marks is not None:
        _draw_frames(axes, marks, (height, width), gap)
    _draw_scale(figure, axes, signed, framed=marks is not None)
    return finish(figure, title, target)


def _row(image: Array, maps: Array, scale: float) -> Pixels:
    """Return ``[1 + T, H, W, 3]``: the image ``[C, H, W]``, and the maps ``[T, h, w]`` over it."""
    numpy = need("numpy")
    shrink = min(1.0, _MOST_PIXELS / max(image.shape[1:]))
    size = tuple(max(1, round(side * shrink)) for side in image.shape[1:])
    image = _resized(image, size)
    if len(image) == 1:
        image = image.repeat(3, axis=0)
    grey = numpy.tensordot(numpy.array([0.299, 0.587, 0.114]), image, 1)
    shares = numpy.zeros((len(maps), *size)) if scale == 0 else _resized(maps / scale, size)
    # Neither black nor white, on which a colour would not be seen.
    over = _blended(shares, (0.25 + 0.65 * grey)[..., None])
    panels = numpy.concatenate([numpy.moveaxis(image, 0, -1)[None], over])
    return numpy.round(255 * panels.clip(0, 1)).astype(numpy.uint8)  # type: ignore[no-any-return]


def _resized(planes: Array, size: Sequence[int]) -> Array:
    """Resize ``[N, h, w]`` to ``[N, *size]``; averages where there are fewer pixels than before."""
    if planes.shape[1:] == tuple(size):
        return planes
    tensor = torch.from_numpy(planes)[None]
    resized: Array = interpolate(tensor, list(size), mode="bilinear", align_corners=False, antialias=True)[0].numpy()
    return resized


def _blended(shares: Array, background: Array) -> Array:
    """Return colours ``[..., 3]`` of shares in [-1, 1] over a background: the larger, the more opaque and the stronger."""
    numpy = need("numpy")
    size = abs(shares).clip(0, 1)[..., None]
    weak, strong = (
        numpy.where(shares[..., None] < 0, negative, positive)
        for negative, positive in zip(numpy.array(_NEGATIVE), numpy.array(_POSITIVE))
    )
    opaque = _MOST_OPAQUE * size
    return (1 - opaque) * background + opaque * ((1 - size) * weak + size * strong)  # type: ignore[no-any-return]


def _mosaic(rows: Sequence[Pixels], gap: int) -> Pixels:
    """Put all panels on white, with gaps around them; one image, since hundreds of axes take minutes."""
    numpy = need("numpy")
    padded = [numpy.pad(row, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255) for row in rows]
    inner = numpy.concatenate([numpy.concatenate(list(row), axis=1) for row in padded])
    return numpy.pad(inner, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)  # type: ignore[no-any-return]


def _label_panels(
    axes: Any,
    names: Sequence[str],
    scales: Sequence[float],
    step: tuple[int, int],
    size: tuple[int, int],
    upright: bool,
) -> None:
    down, right = (between - inside + (inside - 1) / 2 for between, inside in zip(step, size))
    columns = [right + step[1] * column for column in range(len(names) + 1)]
    axes.set_xticks(columns, ["image", *names], fontsize=8, rotation=90 if upright else 0, **LITERAL)
    axes.set_yticks(
        [down + step[0] * row for row in range(len(scales))],
        [f"s = {scale:.2g}" if scale > 0 else "all 0" for scale in scales],
        fontsize=8,
    )
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def _write_zeros(axes: Any, maps: Array, step: tuple[int, int], height: int) -> None:
    """Write a 0 in the lower left corner of maps that are zero everywhere: no saliency, not merely little of it."""
    gap = step[0] - height
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    for column, row in zip(*(~maps.any((2, 3))).nonzero()):
        place = gap + step[1] * (int(column) + 1), step[0] * (int(row) + 1)
        axes.text(*place, "0", ha="left", va="bottom", fontsize=7, color="black", bbox=box)


def _draw_frames(axes: Any, labels: Array, size: tuple[int, int], gap: int) -> None:
    patches = need("matplotlib.patches")
    height, width = size
    for row, column in zip(*(labels == 1).nonzero()):
        # In the gap, so that no pixel of the map is hidden, but apart from the frames of the neighbours.
        corner = (width + gap) * (int(column) + 1) + 0.75 * gap - 0.5, (height + gap) * int(row) + 0.75 * gap - 0.5
        frame = patches.Rectangle(corner, width + 0.5 * gap, height + 0.5 * gap)
        frame.set(fill=False, edgecolor="black", linewidth=1.6, zorder=4)
        axes.add_patch(frame)


def _draw_scale(figure: Figure, axes: Any, signed: bool, *, framed: bool) -> None:
    numpy, colours = need("numpy"), need("matplotlib.colors")
    low = -1.0 if signed else 0.0
    shades = colours.ListedColormap(_blended(numpy.linspace(low, 1, 256), numpy.full(3, 0.575)))
    norm = colours.Normalize(low, 1.0)
    handle = need("matplotlib.cm").ScalarMappable(norm, shades)
    length = min(0.9, 2.4 / figure.get_figwidth())
    bar = figure.colorbar(handle, ax=axes, location="bottom", shrink=length, aspect=16, pad=0.03)
    ticks = {-1.0: "-s", 0.0: "0", 1.0: "s"} if signed else {0.0: "0", 0.5: "s/2", 1.0: "s"}
    bar.set_ticks(list(ticks), labels=list(ticks.values()), fontsize=8)
    frame = "\nblack frame: the task is true for the image" if framed else ""
    bar.set_label(f"saliency (s: largest absolute value of the row){frame}", fontsize=8)
    bar.outline.set_visible(False)
