"""CelebA: forty attributes of faces, with any timm backbone, from the hub (``flwrlabs/celeba``) or parquet files like it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from .data.hub import fingerprint_of
from .data.images.celeba import HUB_ID, SPLITS, faces
from .runs import single_run
from .runs.command_line import COUNT, POSITIVE, Parser, add_number
from .runs.image_arguments import add_run_arguments
from .runs.single_run import Loaded, loaded_images


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one model and return the exit code."""
    return single_run.main("celeba", _parser(), _load, arguments)


def _load(options: argparse.Namespace) -> Loaded:
    counts = {name: getattr(options, f"{name}_images") for name in SPLITS}
    found = faces(options.data, options.tasks, counts, options.labelled, options.seed)
    labels = torch.cat(list(found.labels.values()))
    sizes = ", ".join(f"{len(own)} {name}" for name, own in found.labels.items())
    return loaded_images(
        found.kinds,
        found.images,
        (f"CelebA, {len(found.kinds)} attributes: {sizes} images.",),
        {"fingerprint": fingerprint_of(labels, *found.rows.values()), "left_out": found.left_out},
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m recipes.celeba", description=__doc__)
    data = parser.add_argument_group("data")
    text = f"folder of parquet files (train, valid, test), or id on the hub ({HUB_ID})"
    data.add_argument("--data", default=HUB_ID, metavar="DATA", help=text)
    data.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="some of the attributes (default: all 40)")
    for name in SPLITS:
        add_number(data, f"--{name}-images", None, "drawn at random with --seed (default: all)", COUNT)
    text = "share of the training labels that is kept, drawn for each image and attribute"
    add_number(data, "--labelled", 1.0, text, POSITIVE)
    add_run_arguments(
        parser, "celeba", backbone="resnet18", image_size=64, epochs=15, batch_size=256, learning_rate=1e-3
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
