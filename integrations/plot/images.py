"""Images, maps and labels of a saliency picture, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ConfigurationError, MissingArgumentError, NonFiniteError, ShapeError
from ..shared.libraries import need
from .inputs import Numbers, numbers_of

if TYPE_CHECKING:
    from .inputs import Array


#: More rows than this make no picture to look at.
_MOST_IMAGES = 32
#: Resizing may overshoot the range of colours a little.
_OVERSHOOT = 0.05


def images_of(images: Numbers, mean: Numbers | None, std: Numbers | None) -> Array:
    """Return ``[B, C, H, W]`` colours in [0, 1], C being 3 or 1."""
    numpy = need("numpy")
    values = numbers_of("images", images)
    if values.ndim != 4 or values.shape[1] not in (1, 3) or not values.size:
        raise ShapeError(
            f"images must be [B, 3, H, W] or [B, 1, H, W], found {list(values.shape)}.{_advice_on(values.shape)}"
        )
    if len(values) > _MOST_IMAGES:
        raise ConfigurationError(
            f"found {len(values)} images; a picture takes at most {_MOST_IMAGES}. Use images[:8] and maps[:, :8]."
        )
    colours: Array = values.astype(float) / (255 if values.dtype == numpy.uint8 else 1)
    if bad := _not_finite(colours):
        raise NonFiniteError(f"the images {bad} hold NaN or infinite values. Leave them out.")
    if (mean is None) != (std is None):
        raise MissingArgumentError("mean and std belong together, found only one of them. Give both, or none.")
    if mean is not None and std is not None:
        if values.dtype == numpy.uint8:
            raise ConfigurationError("images of dtype uint8 are not normalised. Leave mean= and std= out.")
        channels = colours.shape[1]
        colours = colours * _per_channel("std", std, channels) + _per_channel("mean", mean, channels)
    _check_range(colours, mean is not None)
    return numpy.clip(colours, 0, 1)  # type: ignore[no-any-return]


def maps_of(maps: Numbers, images: int) -> Array:
    """Return the maps ``[T, B, h, w]``, finite."""
    values: Array = numbers_of("maps", maps).astype(float)
    if values.ndim != 4 or values.shape[1] != images or not values.size:
        raise ShapeError(
            f"maps must be [T, B, h, w] with B = {images} images, found {list(values.shape)}."
            + _advice_on_maps(values.shape, images)
        )
    if bad := _not_finite(values):
        raise NonFiniteError(f"the maps of the tasks {bad} hold NaN or infinite values. Pass 0 where nothing is known.")
    return values


def labels_of(labels: Numbers, images: int, tasks: int) -> Array:
    """Return the labels ``[B, T]``: 1 where a task is true for an image, -1 or NaN where unknown."""
    numpy = need("numpy")
    values: Array = numbers_of("labels", labels).astype(float)
    if values.shape != (images, tasks):
        advice = ""
        if values.shape == (images,):
            advice = f" Use torch.nn.functional.one_hot(labels, {tasks}) for class numbers."
        elif values.shape == (tasks, images):
            advice = " Pass labels.T."
        raise ShapeError(
            f"labels must be [B, T] = [{images}, {tasks}] for {images} images and {tasks} tasks, found "
            f"{list(values.shape)}.{advice}"
        )
    known = numpy.isnan(values) | numpy.isin(values, (-1, 0, 1))
    if not known.all():
        raise ConfigurationError(
            f"labels must be 0 or 1 (-1 or NaN where unknown), found {values[~known][0]:g}. Pass labels > 0.5 for "
            "probabilities."
        )
    return values


def _not_finite(values: Array) -> list[int]:
    """Return which entries of the first axis hold NaN or infinity."""
    numpy = need("numpy")
    return numpy.flatnonzero(~numpy.isfinite(values).all((1, 2, 3))).tolist()  # type: ignore[no-any-return]


def _per_channel(name: str, values: Numbers, channels: int) -> Array:
    numpy = need("numpy")
    array: Array = numbers_of(name, values).astype(float)
    if array.size not in (1, channels) or not numpy.isfinite(array).all():
        raise ShapeError(
            f"{name} must be one finite number or {channels}, one for each channel, found {array.tolist()}."
        )
    return array.reshape(-1, 1, 1)


def _check_range(colours: Array, normalised: bool) -> None:
    low, high = float(colours.min()), float(colours.max())
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return
    if normalised:
        raise ConfigurationError(
            f"times std, plus mean, the images reach from {low:.3g} to {high:.3g}, expected 0 to 1. Give the mean= and "
            "std= with which they were normalised, or neither for images in [0, 1]."
        )
    advice = "Pass the mean=(...) and std=(...) with which they were normalised, one number for each channel."
    if low >= 0 and high > 10:
        advice = "Use images / 255."
    raise ConfigurationError(f"the images reach from {low:.3g} to {high:.3g}, expected 0 to 1. {advice}")


def _advice_on(shape: tuple[int, ...]) -> str:
    if len(shape) == 4 and shape[3] in (1, 3):
        return " Use images.permute(0, 3, 1, 2) for channels that come last."
    if len(shape) == 3:
        return " Use images[None] for one image, or images[:, None] for grey ones without a channel axis."
    return ""


def _advice_on_maps(shape: tuple[int, ...], images: int) -> str:
    if len(shape) == 4 and shape[0] == images:
        return " Use maps.transpose(0, 1)."
    if len(shape) == 5:
        return " Use (maps * features).sum(2), gradient times activation, or maps.norm(dim=2), to have no channels."
    if len(shape) == 3 and shape[1] == images:
        return " Use maps.unflatten(2, (h, w)) for h * w tokens."
    return ""
