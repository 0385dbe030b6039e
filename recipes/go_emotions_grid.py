"""Tables on GoEmotions: methods tuned alike on validation, over seeds, with all labels and with few.

Every result goes into one file as soon as it is there, and is never computed again: stop the command whenever you like, and
run it again to go on. The tables say what is not done yet.
"""

from __future__ import annotations

import sys

from .data.texts.emotions import HUB_ID, fingerprint
from .studies.command import StudyCommand
from .studies.emotion_cells import train_emotions
from .studies.pictures import draw_study
from .studies.study import Setting

#: Raise it when the trainings behind the same values change: old results are then no longer found.
VERSION = 1
_METHODS = ("hard_sharing", "srdml", "srdml_sqchordal", "pcgrad", "srdml+pcgrad")
#: As many values for each. The weight decay that penalties are added to is the one in the middle: the best for hard sharing
#: on a validation split of another seed, so that methods with a penalty do not begin where hard sharing would be untuned.
_GRIDS: dict[str, tuple[float, ...]] = {
    "weight decay": (0.05, 0.5, 2.0),
    "strength": (0.001, 0.003, 0.01),
    "strength, sqchordal": (0.01, 0.03, 0.1),
}


def _setting(labelled: float) -> Setting:
    removed = round(100 * (1 - labelled))
    values = {
        "version": VERSION,
        "data": "go_emotions",
        "train_texts": 8000,
        "validation_texts": 2000,
        "labelled": labelled,
        "encoder": "small",
        "layers": 1,
        "width": 128,
        "vocabulary": 4000,
        "max_length": 32,
        "head_width": 32,
        "activation": "gelu",
        "epochs": 8,
        "batch_size": 64,
        "learning_rate": 2e-3,
        "warmup_steps": 100,
        "weight_decay": 0.5,
        "evaluations": 8,
        "temperature": None,
    }
    label = "8,000 training texts, " + (f"{removed} % of the labels removed" if removed else "all labels")
    return Setting("all-labels" if not removed else f"{removed}-removed", label, values, _METHODS, _GRIDS)


#: In the order in which they are trained.
SETTINGS = {setting.key: setting for setting in (_setting(1.0), _setting(0.1))}


COMMAND = StudyCommand(
    name="go_emotions_grid",
    description=__doc__,
    settings=SETTINGS,
    metrics=("f1", "auc", "f1_rare", "auc_rare"),
    compared=("f1", "auc", "auc_rare"),
    judged=("auc",),
    data=(HUB_ID, "folder of parquet files, or id on the hub"),
    packages=("transformers", "datasets"),
    fingerprint=fingerprint,
    train=train_emotions,
    draw=draw_study,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
