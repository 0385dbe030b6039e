"""The folder of a trained model: weights, what its outputs mean, and a card; all that is needed to predict."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_reg.integrations.timm import TimmMultiTaskModel

from ..data.task_kinds import TaskKind
from ..models.small_resnet import SMALL_BACKBONE, register_small_backbone
from ..runtime.errors import DataError
from ..runtime.files import write_json
from .score_table import score_markdown

TASKS = "tasks.json"
_CARD = """---
library_name: saliency_reg
tags: [image-classification, multi-task-learning, saliency_reg]
---

# {count} tasks on {backbone}

Trained by {made_by}. `model.transforms(train=False)` makes images of {height}x{width}.

## Tasks

{tasks}

## On the test images

{scores}

## Predict

In a clone of saliency_reg, with the path of this folder in place of MODEL and that of your images in place of IMAGES:

```
python -m recipes.predict --model MODEL --images IMAGES --out predictions.csv
```

In Python:

```python
from PIL import Image
from saliency_reg.integrations.timm import TimmMultiTaskModel
{register}
model = TimmMultiTaskModel.from_pretrained("MODEL").eval()
image = Image.open("new.jpg").convert("RGB")  # of 8 bits, upright; recipes.predict reads others, too
outputs = model(model.transforms(train=False)(image)[None])
```

`outputs` has a logit for each binary task, and a logit for each class in the order of the table. Numbers are
`output * spread + mean`, with those of `{file}`.
"""


@dataclass(frozen=True)
class SavedTasks:
    """What the outputs of a saved model mean."""

    kinds: Mapping[str, TaskKind]
    classes: Mapping[str, Sequence[str]]

    def columns(self) -> list[str]:
        """Names of what :meth:`describe` returns."""
        return [
            name
            for task, kind in self.kinds.items()
            for name in ([task, f"{task} probability"] if kind.name == "classes" else [task])
        ]

    def describe(self, outputs: Mapping[str, Tensor]) -> list[list[str]]:
        """For each image: probabilities of binary tasks, classes with their probability, numbers in their own unit."""
        columns: list[list[str]] = []
        for task, kind in self.kinds.items():
            values = outputs[task].detach().cpu().double()
            if kind.name == "binary":
                columns.append([f"{value:.4f}" for value in values.sigmoid().tolist()])
            elif kind.name == "number":
                columns.append([f"{value:.6g}" for value in (values * kind.spread + kind.mean).tolist()])
            else:
                highest = values.softmax(1).max(1)
                columns.append([self.classes[task][index] for index in highest.indices.tolist()])
                columns.append([f"{value:.4f}" for value in highest.values.tolist()])
        return [list(row) for row in zip(*columns)]


def save_model_folder(
    folder: Path,
    model: TimmMultiTaskModel,
    kinds: Mapping[str, TaskKind],
    classes: Mapping[str, Sequence[str]],
    found: Mapping[str, Any],
    made_by: str,
) -> None:
    """Write the model, ``tasks.json`` and the card ``README.md``, readable for everyone.

    Args:
        folder: to be written.
        model: with its best weights.
        kinds: of the tasks.
        classes: names, of the tasks with classes.
        found: figures of the training.
        made_by: command and method.
    """
    model.save(folder)
    named = {task: {"class_names": list(classes[task])} if task in classes else {} for task in kinds}
    write_json(folder / TASKS, {task: {**kind.to_dict(), **named[task]} for task, kind in kinds.items()})
    backbone = model.description["name"]
    register = "from recipes.models.small_resnet import register_small_backbone\n\nregister_small_backbone()"
    text = _CARD.format(
        count=len(kinds),
        backbone=backbone,
        made_by=made_by,
        height=model.image_size[0],
        width=model.image_size[1],
        tasks=_task_lines(kinds, classes),
        scores=score_markdown(found),
        register=register if backbone == SMALL_BACKBONE else "",
        file=TASKS,
    )
    card = folder / "README.md"
    card.write_text(text, encoding="utf-8")
    card.chmod(0o644)


def load_model_folder(folder: Path) -> tuple[TimmMultiTaskModel, SavedTasks]:
    """Return the model and what its outputs mean.

    Raises:
        DataError: no ``tasks.json``, or one that is not whole or of another model.
        SaliencyRegError: those of :meth:`TimmMultiTaskModel.from_pretrained`.
    """
    register_small_backbone()
    model = TimmMultiTaskModel.from_pretrained(folder)
    path = folder / TASKS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {task: tuple(map(str, entry.pop("class_names", ()))) for task, entry in content.items()}
        kinds = {task: TaskKind(**entry) for task, entry in content.items()}
    except FileNotFoundError as error:
        raise DataError(f"found no {path}. Pass the folder model of a run of the recipes for images.") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Copy the folder again.") from error
    outputs = {task: config.classes for task, config in model.head_configs.items()}
    if {task: kind.classes for task, kind in kinds.items()} != outputs:
        raise DataError(f"{path} is of another model than the weights beside it. Copy the folder again.")
    # Models of earlier versions have their class names elsewhere.
    classes = {task: names[task] or tuple(map(str, range(kind.classes))) for task, kind in kinds.items()}
    return model, SavedTasks(kinds, classes)


@torch.no_grad()
def predict(model: TimmMultiTaskModel, images: Tensor) -> dict[str, Tensor]:
    """Outputs of a batch that the transforms of the model have made."""
    model.eval()
    outputs: dict[str, Tensor] = model(images.to(next(model.parameters()).device))
    return outputs


def _task_lines(kinds: Mapping[str, TaskKind], classes: Mapping[str, Sequence[str]]) -> str:
    lines = ["| task | kind | output |", "| --- | --- | --- |"]
    for task, kind in kinds.items():
        if kind.name == "binary":
            output = "logit"
        elif kind.name == "number":
            output = f"(value - {kind.mean:.6g}) / {kind.spread:.6g}"
        else:
            output = "logits of " + ", ".join(classes.get(task, map(str, range(kind.classes))))
        lines.append(f"| {task} | {kind.name} | {output} |")
    return "\n".join(lines)
