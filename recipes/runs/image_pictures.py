"""Pictures of a training on images: relations, learning curves, and what each task looks at."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from saliency_reg.integrations.plot import draw_relations, draw_saliency, draw_task_tree
from saliency_reg.integrations.timm import TimmMultiTaskModel, task_saliency_maps

from ..data.images.to_show import Picture
from ..data.task_kinds import TaskKind
from ..runtime.figures import new_figure, save

#: Tasks side by side in one saliency picture; more of them are spread evenly over several.
_MOST_COLUMNS = 20


def draw_training(
    folder: Path,
    title: str,
    tasks: Sequence[str],
    relations: Sequence[Sequence[float]] | None,
    curves: Mapping[str, Sequence[float | None]],
) -> None:
    """Draw relations, if there are any, as a heat map and a tree, and the learning curves.

    Args:
        folder: of the pictures.
        title: above the relations.
        tasks: in the order of the relations.
        relations: ``[T, T]``.
        curves: of the training; ``None`` where there is no value.
    """
    if relations is not None:
        draw_relations(relations, tasks, folder / "relations.png", title=title)
        draw_task_tree(relations, tasks, folder / "task_tree.png", title=title)
    _draw_curves(folder / "learning_curves.png", curves)


def draw_what_tasks_see(
    folder: Path, model: TimmMultiTaskModel, picture: Picture, kinds: Mapping[str, TaskKind]
) -> None:
    """Draw the saliency of all tasks: ``saliency.png``, or with many tasks ``saliency_1.png`` and so on.

    Args:
        folder: of the pictures.
        model: that was trained.
        picture: images that the model sees.
        kinds: of the tasks.
    """
    tasks = list(kinds)
    # Only binary tasks can be true of an image; -1 is unknown.
    binary = torch.tensor([kind.name == "binary" for kind in kinds.values()])
    labels = torch.where(binary & ~torch.isnan(picture.labels), picture.labels, -1.0)
    model.eval()
    files = math.ceil(len(tasks) / _MOST_COLUMNS)
    width = math.ceil(len(tasks) / files)
    for number in range(files):
        own = slice(number * width, (number + 1) * width)
        images = picture.images.to(next(model.parameters()).device)
        maps = task_saliency_maps(model, images, tasks=tasks[own], size="image")
        draw_saliency(
            picture.images,
            maps.cpu(),
            tasks[own],
            folder / ("saliency.png" if files == 1 else f"saliency_{number + 1}.png"),
            labels=labels[:, own],
            mean=picture.mean,
            std=picture.std,
            title="Saliency of each task on test images (frame: the task's label is 1)",
        )


def _draw_curves(path: Path, curves: Mapping[str, Sequence[float | None]]) -> None:
    def values(name: str) -> list[float]:
        return [math.nan if value is None else value for value in curves[name]]

    figure, axes = new_figure(5.5, 3.6)
    epochs = values("epoch")
    axes.plot(epochs, values("validation_score"), color="#0072B2", marker="o", markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation score", color="#0072B2")
    right = axes.twinx()
    right.plot(epochs, values("training_loss"), color="#D55E00", linestyle="--", marker="s", markersize=3)
    right.set_ylabel("training loss, mean over the tasks", color="#D55E00")
    axes.set_title("Mean validation score of the tasks, and training loss")
    save(figure, path)
