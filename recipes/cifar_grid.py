"""Tables on CIFAR-10: methods tuned alike on validation, over seeds, training sizes, heads, and shares of missing labels.

Every result goes into one file as soon as it is there, and is never computed again: stop the command whenever you like, and
run it again to go on. The tables say what is not done yet.
"""

from __future__ import annotations

import sys

from .data.images.cifar import HUB_ID, fingerprint
from .models.small_resnet import SMALL_BACKBONE
from .studies.cifar_cells import train_cifar
from .studies.command import StudyCommand
from .studies.pictures import draw_study
from .studies.study import Setting

#: Raise it when the trainings behind the same values change: old results are then no longer found.
VERSION = 1
_FULL_LABELS = ("hard_sharing", "srdml_uniform", "srdml_projected", "srdml", "pcgrad", "srdml+pcgrad")
#: With few labels, where other metrics may do better.
_MISSING_LABELS = (*_FULL_LABELS[:4], "srdml_cosine", "srdml_sqchordal", *_FULL_LABELS[4:])
#: As many values for each: hard sharing is tuned as hard as the others.
_GRIDS: dict[str, tuple[float, ...]] = {
    "weight decay": (0.0, 0.05, 0.5),
    "strength": (0.01, 0.03, 0.1),
    "strength, cosine": (0.03, 0.1, 0.3),
    "strength, sqchordal": (0.03, 0.1, 0.3),
}


def _setting(train_images: int, activation: str, labelled: float = 1.0, tasks: str = "classes") -> Setting:
    key = f"{tasks}-{train_images}-{activation}"
    label = f"{train_images:,} training images, {activation.upper() if activation == 'gelu' else 'ReLU'} heads"
    if labelled < 1:
        removed = round(100 * (1 - labelled))
        key, label = f"{key}-{removed}-removed", f"{label}, {removed} % of the labels removed"
    if tasks == "attributes":
        label = f"15 attributes, {label}"
    values = {
        "version": VERSION,
        "data": "cifar10",
        "tasks": tasks,
        "train_images": train_images,
        "validation_images": 1000,
        "labelled": labelled,
        "image_size": 32,
        "backbone": SMALL_BACKBONE,
        "activation": activation,
        "head_width": 32,
        "epochs": 40 if train_images <= 500 else 15,
        "batch_size": 50,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "evaluations": 10,
        "temperature": None,
    }
    return Setting(key, label, values, _FULL_LABELS if labelled == 1 else _MISSING_LABELS, _GRIDS)


#: In the order in which they are trained.
SETTINGS = {
    setting.key: setting
    for setting in (
        _setting(500, "gelu"),
        _setting(2000, "gelu", 0.1),
        _setting(500, "relu"),
        _setting(2000, "gelu", 0.1, "attributes"),
        _setting(2000, "gelu"),
        _setting(2000, "gelu", 0.5),
        _setting(2000, "relu"),
    )
}


COMMAND = StudyCommand(
    name="cifar_grid",
    description=__doc__,
    settings=SETTINGS,
    metrics=("accuracy", "auc", "precision", "recall"),
    compared=("accuracy", "auc"),
    judged=("auc",),
    data=(HUB_ID, "folder of parquet files, or id on the hub"),
    packages=("timm", "datasets"),
    fingerprint=fingerprint,
    train=train_cifar,
    draw=draw_study,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
