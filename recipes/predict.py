"""Predictions for new images, as CSV, by a model that ``recipes.folder``, ``celeba`` or ``cifar_mtl`` has trained.

A row for each image: probabilities of binary tasks, classes with their probability, numbers in their own unit.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from saliency_reg.errors import SaliencyRegError

from .data.images.in_files import FileImages, image_files, readable
from .runs.command_line import Parser, add_number
from .runs.model_folder import load_model_folder, predict
from .runs.single_run import plain_warnings
from .runtime.errors import RecipeError, need


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the predictions and return the exit code."""
    for module in ("tqdm", "timm", "PIL"):
        need(module)
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with plain_warnings():
            _predict(options)
    except (RecipeError, SaliencyRegError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _predict(options: argparse.Namespace) -> None:
    names, paths = image_files(options.images)
    model, tasks = load_model_folder(options.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    kept = readable(paths, "decode", options.strict)
    images = FileImages([paths[index] for index in kept], torch.zeros(len(kept), 0), model.transforms(train=False))
    with contextlib.ExitStack() as opened:
        file = sys.stdout
        if options.out is not None:
            file = opened.enter_context(options.out.open("w", newline="", encoding="utf-8"))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", *tasks.columns()])
        for start in range(0, len(kept), options.batch_size):
            rows = range(start, min(start + options.batch_size, len(kept)))
            outputs = predict(model, torch.stack([images[row][0] for row in rows]))
            writer.writerows([names[kept[row]], *own] for row, own in zip(rows, tasks.describe(outputs)))
    if options.out is not None:
        print(f"{len(kept)} images. Written to {options.out}.")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m recipes.predict", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="the folder model of a run")
    text = "files, or folders with images, also in their folders"
    parser.add_argument("--images", required=True, nargs="+", type=Path, metavar="PATH", help=text)
    parser.add_argument("--out", type=Path, metavar="FILE", help="of the CSV (default: printed)")
    add_number(parser, "--batch-size", 32, "images that are predicted at once")
    parser.add_argument("--strict", action="store_true", help="stop at unreadable images; by default they are skipped")
    return parser


if __name__ == "__main__":
    sys.exit(main())
