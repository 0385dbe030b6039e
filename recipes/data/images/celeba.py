"""CelebA: forty attributes of faces, as the hub has them."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import DataError, OptionError
from ..hub import load_splits
from ..label_columns import check_columns, labels_of, without_constant_tasks
from ..task_kinds import TaskKind
from .in_columns import HubImages, with_images

HUB_ID = "flwrlabs/celeba"
#: Ours and those of the hub.
SPLITS = {"train": "train", "validation": "valid", "test": "test"}
_NAMES = """
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair
Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male
Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks
Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
Wearing_Necktie Young
"""
ATTRIBUTES = tuple(_NAMES.split())


@dataclass(frozen=True)
class Faces:
    """Images and attributes of the splits.

    Attributes:
        kinds: of the attributes.
        splits: of the hub.
        rows: of each split.
        labels: ``[n, T]`` of these rows.
        left_out: attributes that cannot be learned, and why.
    """

    kinds: dict[str, TaskKind]
    splits: Mapping[str, Any]
    rows: dict[str, Tensor]
    labels: dict[str, Tensor]
    left_out: dict[str, str]

    def images(self, name: str, transform: Callable[[Any], Tensor]) -> HubImages:
        """The images of a split."""
        return HubImages(self.splits[SPLITS[name]], self.rows[name].tolist(), self.labels[name], transform)


def faces(data: str, tasks: Sequence[str], images: Mapping[str, int | None], labelled: float, seed: int) -> Faces:
    """Read attributes, and draw images.

    Args:
        data: id of a data set on the hub, or a folder of parquet files.
        tasks: attributes; all of them if there are none.
        images: how many of each split are drawn; ``None`` for all.
        labelled: share of the training labels that is kept.
        seed: of the draws.

    Raises:
        DataError: the data cannot be read, or are others.
        OptionError: more images than there are, or a share above one.
    """
    if labelled > 1:
        raise OptionError(f"the share of labels that is kept must be at most 1, found --labelled {labelled:g}.")
    splits = load_splits(data, tuple(SPLITS.values()))
    tasks = list(dict.fromkeys(tasks)) or list(ATTRIBUTES)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = {}, {}
    for name, hub_name in SPLITS.items():
        place = f"{hub_name} split of {data}"
        check_columns(["image", *tasks], splits[hub_name].column_names, f"the {place}")
        splits[hub_name] = with_images(splits[hub_name], "image", place, decode=True)
        rows[name] = _rows(len(splits[hub_name]), images[name], name, generator)
        own = splits[hub_name].select_columns(tasks)[rows[name].tolist()]
        columns[name] = torch.stack([labels_of(task, own[task], "binary")[1] for task in tasks], dim=1)
    if labelled < 1:
        kept = torch.rand(columns["train"].shape, generator=generator) < labelled
        columns["train"] = torch.where(kept, columns["train"], torch.nan)
    sizes = [len(own) for own in columns.values()]
    binary = {task: TaskKind("binary") for task in tasks}
    kinds, labels, left_out = without_constant_tasks(binary, torch.cat(list(columns.values())), torch.arange(sizes[0]))
    return Faces(kinds, splits, rows, dict(zip(columns, labels.split(sizes))), left_out)


def _rows(count: int, wanted: int | None, name: str, generator: torch.Generator) -> Tensor:
    if count == 0:
        raise DataError(f"the {name} split is empty. Choose other data.")
    if wanted is None:
        return torch.arange(count)
    if wanted > count:
        raise OptionError(f"--{name}-images {wanted} were asked for, but there are {count}. Use {count} or less.")
    return torch.randperm(count, generator=generator)[:wanted].sort().values
