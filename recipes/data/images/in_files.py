"""Images in files, read when they are needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ...runtime.errors import DataError, need


class FileImages:
    """Images of files as a person sees them, with labels ``[N, T]``: turned as EXIF says, 16 bits of grey scaled to 8.

    Args:
        paths: one for each row of the labels.
        labels: NaN where one is missing.
        transform: from a PIL image to ``[3, H, W]``.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.paths = list(paths)
        self.labels = labels
        self._transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.paths[index]
        try:
            with need("PIL.Image").open(path) as image:
                converted = as_seen(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"{path} cannot be read ({error}). Use --check decode to find and skip such files before the training."
            ) from error
        return self._transform(converted), self.labels[index]


def image_files(places: Sequence[Path]) -> tuple[list[str], list[Path]]:
    """Names and paths of image files; those in a folder are found by their endings, and named from there.

    Raises:
        DataError: a path that is none, or no images.
    """
    endings = need("PIL.Image").registered_extensions()
    names: list[str] = []
    paths: list[Path] = []
    for place in places:
        if not place.exists():
            raise DataError(f"found no file or folder {place}. Pass the images, or folders that have them.")
        found = [place] if place.is_file() else sorted(own for own in place.rglob("*") if own.suffix.lower() in endings)
        paths += found
        names += [str(own.relative_to(place)) if place.is_dir() else str(own) for own in found]
    if not paths:
        raise DataError(f"found no images in {', '.join(map(str, places))}. Pass folders that have some.")
    return names, paths


def readable(paths: Sequence[Path], check: str, strict: bool) -> list[int]:
    """Numbers of the files that can be read, with one warning about the others.

    Args:
        paths: of the images.
        check: ``"decode"`` reads every file whole, ``"header"`` only its beginning, ``"none"`` believes them.
        strict: raise instead of the warning.

    Raises:
        DataError: a file that cannot be read, if strict; or none that can.
    """
    if check == "none":
        return list(range(len(paths)))
    bar = need("tqdm").tqdm(total=len(paths), desc="checking images", unit="image", disable=None)
    bad: dict[int, str] = {}
    with bar, ThreadPoolExecutor(8) as pool:
        for index, reason in enumerate(pool.map(lambda path: _reason(path, check), paths)):
            bar.update()
            if reason is not None:
                bad[index] = reason
    if not bad:
        return list(range(len(paths)))
    first = "; ".join(f"{paths[index]} ({reason})" for index, reason in list(bad.items())[:3])
    what = f"{len(bad)} of {len(paths)} images cannot be read: {first}{' ...' if len(bad) > 3 else ''}"
    if len(bad) == len(paths):
        raise DataError(f"{what}. Use --images with the folder that has them.")
    if strict:
        raise DataError(f"{what}. Leave out --strict to skip them.")
    warnings.warn(f"{what}. They are skipped; use --strict to stop instead.", stacklevel=2)
    return [index for index in range(len(paths)) if index not in bad]


def as_seen(image: Any) -> Any:
    """Return a PIL image in RGB as a person sees it.

    Raises:
        ValueError: grey values of 32 bits, which may mean anything.
    """
    if why := _not_to_be_seen(image):
        raise ValueError(why)
    upright = need("PIL.ImageOps").exif_transpose(image)
    if upright.mode.startswith("I"):
        numpy = need("numpy")
        scaled = (numpy.asarray(upright).astype("int64") + 128) // 257
        upright = need("PIL.Image").fromarray(scaled.clip(0, 255).astype("uint8"))
    return upright.convert("RGB")


def _not_to_be_seen(image: Any) -> str | None:
    """Say what keeps an image from being shown. Pillow gives 16 bits of some formats as 32."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        return "32 bits of grey, and nothing says which are black and white: save it with 8 or 16"
    return None


def _reason(path: Path, check: str) -> str | None:
    image = need("PIL.Image")
    try:
        with image.open(path) as opened:
            if why := _not_to_be_seen(opened):
                return why
            if check == "decode":
                opened.load()
            else:
                opened.verify()
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        return str(error).partition(str(path))[0].strip(" :'") or type(error).__name__
    return None
