"""CIFAR-MTL: ten one-against-the-rest tasks on CIFAR-10, with any timm backbone; by default VGG16 at 64x64, as in the paper.

For a small training on a CPU: ``--backbone saliency_reg_resnet8 --image-size 32 --train-images 2000 --epochs 15
--batch-size 50 --head-width 32``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from saliency_reg.integrations.timm import TimmMultiTaskModel

from .data.images.cifar import HUB_ID, TASK_SETS, cifar_splits, fingerprint
from .data.images.to_show import Picture, mean_and_std
from .data.task_kinds import BINARY
from .runs import single_run
from .runs.command_line import Parser, add_labelled, whole_number
from .runs.image_arguments import add_run_arguments
from .runs.single_run import Loaded
from .training.train import Data

#: Classes of the images in the saliency picture, which look different.
_SHOWN = (0, 1, 2, 4, 7, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one model and return the exit code."""
    return single_run.main("cifar_mtl", _parser(), _load, arguments)


def _load(options: argparse.Namespace) -> Loaded:
    splits = cifar_splits(
        options.data,
        seed=options.seed,
        train_images=options.train_images,
        validation_images=options.validation_images,
        image_size=options.image_size,
        tasks=options.tasks,
        labelled=options.labelled,
    )
    kinds = dict.fromkeys(splits.tasks, BINARY)

    def data(model: TimmMultiTaskModel) -> Data:
        # As the backbone's weights expect them, and as the transforms of the saved model make them.
        statistics = mean_and_std(model)
        return Data(
            kinds,
            splits.train.with_statistics(*statistics),
            splits.validation.with_statistics(*statistics),
            splits.test.with_statistics(*statistics),
        )

    def picture(model: TimmMultiTaskModel) -> Picture:
        mean, std = mean_and_std(model)
        test = splits.test.with_statistics(mean, std)
        known = splits.test_classes.tolist()
        rows = torch.tensor([known.index(number) for number in _SHOWN if number in known])
        return Picture(test.normalised(test.pixels[rows]), test.labels[rows], mean, std)

    return Loaded(
        kinds,
        data,
        picture,
        (
            f"CIFAR-10, {len(splits.tasks)} tasks: {len(splits.train)} training, {len(splits.validation)} validation and "
            f"{len(splits.test)} test images of {options.image_size}x{options.image_size}.",
        ),
        {"fingerprint": fingerprint(options.data, options.image_size)},
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m recipes.cifar_mtl", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", default=HUB_ID, metavar="DATA", help=f"folder of parquet files, or id on the hub ({HUB_ID})"
    )
    for name, default in (("train", 18000), ("validation", 2000)):
        data.add_argument(
            f"--{name}-images",
            type=whole_number(10),
            default=default,
            metavar="N",
            help=f"in all, as many of each class (default: {default})",
        )
    data.add_argument(
        "--tasks",
        choices=list(TASK_SETS),
        default="classes",
        help="one class against the rest, or properties that several classes share (default: classes)",
    )
    add_labelled(data)
    add_run_arguments(
        parser, "cifar_mtl", backbone="vgg16", image_size=64, epochs=30, batch_size=200, learning_rate=1e-3
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
