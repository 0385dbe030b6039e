"""CelebA: forty attributes of faces, with any timm backbone, from the hub (``flwrlabs/celeba``) or parquet files like it."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saliency_reg.integrations.timm import TimmMultiTaskModel

from .data.fingerprints import fingerprint_of
from .data.hub import load_splits
from .data.images.in_columns import with_images
from .data.images.in_files import as_seen
from .data.images.to_show import Picture, first_images
from .data.label_columns import check_columns, labels_of, without_constant_tasks
from .data.task_kinds import TaskKind
from .runs import single_run
from .runs.command_line import Parser, real_number, whole_number
from .runs.image_arguments import add_run_arguments
from .runs.single_run import Loaded
from .runtime.errors import DataError, OptionError
from .training.train import Data

__all__ = ["ATTRIBUTES", "main"]

HUB_ID = "flwrlabs/celeba"
ATTRIBUTES = (
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
)
_SPLITS = {"train": "train", "validation": "valid", "test": "test"}


class HubImages:
    """Rows of a data set of the hub, decoded when they are needed.

    Args:
        split: with a column ``image``.
        rows: of the split.
        labels: ``[n, T]`` of these rows, NaN where one is missing.
        transform: from a PIL image to ``[3, H, W]``.
    """

    def __init__(self, split: Any, rows: Sequence[int], labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self._split = split
        self._rows = list(rows)
        self._labels = labels
        self._transform = transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self._rows[index]
        try:
            image = as_seen(self._split[row]["image"])
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"row {row} of the data has no readable image ({error}). Remove it.") from error
        return self._transform(image), self._labels[index]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one model and return the exit code."""
    return single_run.main("celeba", _parser(), _load, arguments)


def _load(options: argparse.Namespace) -> Loaded:
    if options.labelled > 1:
        raise OptionError(f"the share of labels that is kept must be at most 1, found --labelled {options.labelled:g}.")
    splits = load_splits(options.data, tuple(_SPLITS.values()))
    tasks = list(dict.fromkeys(options.tasks)) or list(ATTRIBUTES)
    generator = torch.Generator().manual_seed(options.seed)
    rows, columns = {}, {}
    for name, hub_name in _SPLITS.items():
        place = f"{hub_name} split of {options.data}"
        check_columns(["image", *tasks], splits[hub_name].column_names, f"the {place}")
        splits[hub_name] = with_images(splits[hub_name], "image", place, decode=True)
        wanted = getattr(options, f"{name}_images")
        rows[name] = _rows(len(splits[hub_name]), wanted, name, generator)
        own = splits[hub_name].select_columns(tasks)[rows[name].tolist()]
        columns[name] = torch.stack([labels_of(task, own[task], "binary")[1] for task in tasks], dim=1)
    if options.labelled < 1:
        kept = torch.rand(columns["train"].shape, generator=generator) < options.labelled
        columns["train"] = torch.where(kept, columns["train"], torch.nan)
    sizes = [len(own) for own in columns.values()]
    binary = {task: TaskKind("binary") for task in tasks}
    kinds, labels, left_out = without_constant_tasks(binary, torch.cat(list(columns.values())), torch.arange(sizes[0]))
    labels_by_split = dict(zip(columns, labels.split(sizes)))

    def split(name: str, transform: Callable[[Any], Tensor]) -> HubImages:
        return HubImages(splits[_SPLITS[name]], rows[name].tolist(), labels_by_split[name], transform)

    def data(model: TimmMultiTaskModel) -> Data:
        plain = model.transforms(train=False)
        return Data(
            kinds, split("train", model.transforms(train=True)), split("validation", plain), split("test", plain)
        )

    def picture(model: TimmMultiTaskModel) -> Picture:
        return first_images(model, split("test", model.transforms(train=False)))

    return Loaded(
        kinds,
        data,
        picture,
        (
            f"CelebA, {len(kinds)} attributes: "
            + ", ".join(f"{size} {name}" for name, size in zip(rows, sizes))
            + " images.",
        ),
        {"fingerprint": fingerprint_of(labels, *rows.values()), "left_out": left_out},
    )


def _rows(count: int, wanted: int | None, name: str, generator: torch.Generator) -> Tensor:
    if count == 0:
        raise DataError(f"the {name} split is empty. Choose other data.")
    if wanted is None:
        return torch.arange(count)
    if wanted > count:
        raise OptionError(f"--{name}-images {wanted} were asked for, but there are {count}. Use {count} or less.")
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m recipes.celeba", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default=HUB_ID,
        metavar="DATA",
        help=f"folder of parquet files (train, valid, test), or id on the hub ({HUB_ID})",
    )
    data.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="some of the attributes (default: all 40)")
    for name in _SPLITS:
        data.add_argument(
            f"--{name}-images", type=whole_number(1), metavar="N", help="drawn at random with --seed (default: all)"
        )
    data.add_argument(
        "--labelled",
        type=real_number(above_zero=True),
        default=1.0,
        metavar="X",
        help="share of the training labels that is kept, drawn for each image and attribute (default: 1)",
    )
    add_run_arguments(
        parser, "celeba", backbone="resnet18", image_size=64, epochs=15, batch_size=256, learning_rate=1e-3
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
