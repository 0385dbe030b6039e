"""What a training by the Trainer of transformers needs here: arguments, the newest checkpoint, and a polite end."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from ..runtime.errors import need
from ..runtime.processes import Ranks
from ..runtime.termination import Terminated, deferred
from .shell import CHECKPOINTS

_transformers = need("transformers")


def trainer_arguments(options: argparse.Namespace, folder: Path, **more: Any) -> Any:
    """``TrainingArguments`` of a run in a folder, from its command line and what differs between recipes."""
    return _transformers.TrainingArguments(
        str(folder / CHECKPOINTS),
        num_train_epochs=options.epochs,
        gradient_accumulation_steps=options.accumulation,
        weight_decay=options.weight_decay,
        bf16=options.mixed_precision == "bf16",
        fp16=options.mixed_precision == "fp16",
        seed=options.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        **more,
    )


def run_trainer(trainer: Any, folder: Path, ranks: Ranks) -> None:
    """Train to the end, from the newest checkpoint of the folder if there is one.

    Args:
        trainer: with :func:`trainer_arguments`.
        folder: of the run.
        ranks: the processes that train.

    Raises:
        Terminated: SIGTERM came; a checkpoint was written after the present step.
    """
    with deferred() as requested:
        trainer.add_callback(_StopWhenAsked(requested, ranks))
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.state.global_step < trainer.state.max_steps:
            raise Terminated


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest one that was written to its end: a Trainer writes its own state last."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
            found.append((int(match[1]), path))
    return max(found)[1] if found else None


class _StopWhenAsked(_transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    def __init__(self, requested: Any, ranks: Ranks) -> None:
        self._requested = requested
        self._ranks = ranks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        # All or none: a process that went on alone would wait for the others.
        if any(self._ranks.of_all(self._requested())):
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if control.should_training_stop and state.epoch != round(state.epoch):  # who goes on has the rest before them
            control.should_log = control.should_evaluate = control.should_save = False
