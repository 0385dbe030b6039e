"""Pictures of a training on images: learning curves, and what each task looks at."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from saliency_reg.integrations.plot import draw_saliency
from saliency_reg.integrations.timm import TimmMultiTaskModel, task_saliency_maps

from ..data.images.to_show import Picture
from ..data.task_kinds import TaskKind
from ..runtime.figures import new_figure, save
from .shell import Pictures

#: Tasks side by side in one saliency picture; more of them are spread evenly over several.
_MOST_COLUMNS = 20


def saliency_pictures(
    kinds: Mapping[str, TaskKind],
    model: Callable[[], TimmMultiTaskModel],
    picture: Callable[[TimmMultiTaskModel], Picture],
) -> Pictures:
    """The saliency of all tasks: ``saliency.png``, or with many tasks ``saliency_1.png`` and so on.

    Args:
        kinds: of the tasks.
        model: gives the one that was trained.
        picture: from the model to its images.
    """
    tasks = list(kinds)
    files = math.ceil(len(tasks) / _MOST_COLUMNS)
    width = math.ceil(len(tasks) / files)

    @functools.cache
    def drawn() -> tuple[TimmMultiTaskModel, Picture]:
        return model(), picture(model())

    def draw(own: slice, path: Path) -> None:
        trained, shown = drawn()
        # Only binary tasks can be true of an image; -1 is unknown.
        binary = torch.tensor([kind.name == "binary" for kind in kinds.values()])
        labels = torch.where(binary & ~torch.isnan(shown.labels), shown.labels, -1.0)
        trained.eval()
        images = shown.images.to(next(trained.parameters()).device)
        draw_saliency(
            shown.images,
            task_saliency_maps(trained, images, tasks=tasks[own], size="image").cpu(),
            tasks[own],
            path,
            labels=labels[:, own],
            mean=shown.mean,
            std=shown.std,
            title="Saliency of each task on test images (frame: the task's label is 1)",
        )

    return {
        "saliency.png" if files == 1 else f"saliency_{number + 1}.png": functools.partial(
            draw, slice(number * width, (number + 1) * width)
        )
        for number in range(files)
    }


def draw_curves(path: Path, curves: Mapping[str, Sequence[float | None]]) -> None:
    """Draw validation score and training loss over the epochs; ``None`` where there is no value."""

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
