"""What is the same for all methods of a comparison, and which option of a command line each part of it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.errors import OptionError
from ..runtime.processes import PRECISIONS
from .learning_rate import DECAYS


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
    group: str = "steps",
) -> Any:
    """A field of a dataclass that is checked, and that a command line has an option for.

    Args:
        default: ``None`` allows that there is no value.
        text: for ``--help``; with ``{samples}`` for what samples are called.
        least, above: bounds of a number; whole if ``least`` is an ``int``.
        choices: of a text.
        group: of the command line.
    """
    return dataclasses.field(
        default=default, metadata={"text": text, "least": least, "above": above, "choices": choices, "group": group}
    )


@dataclass(frozen=True)
class Options:
    """How long and in which steps a training goes.

    Attributes:
        epochs: the best weights by validation are kept.
        batch_size: samples of an optimizer step, of all processes and micro-batches together.
        learning_rate: of AdamW.
        weight_decay: to which penalties are added; methods without a penalty tune it.
        decay: of the learning rate after the warm-up: ``"constant"``, ``"cosine"`` or ``"linear"``, down to 0 at the end.
        warmup_steps: over which the learning rate rises linearly.
        evaluations: the validation split is looked at after every ``epochs // evaluations`` epochs (at least one), and after
            the last one.
        seed: of everything that is drawn.
        accumulation: micro-batches of each step.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        clip_norm: largest norm of all gradients together.
        temperature: of the ``entropic`` rule; 0.3 by default.
        pretraining_epochs: of hard sharing before the method sets in, with an optimizer of its own, as the authors do.
        data_workers: processes that load data, for each process that trains.
        checkpoint_steps: steps between checkpoints; 0 for none but the one that SIGTERM asks for.
        penalty: what the value of a method with a penalty is: its ``"strength"``, or its ``"share"`` of the losses.
        trackers: names that accelerate knows.
        keep_checkpoints: how many are kept.
        evaluation_batch_size: samples of a process that are predicted at once; all if ``None``.
        log_steps: steps between the lines of the log, beside one for each epoch; 0 for none.
        progress: tell what the training does, on the main process.
        channels_last: memory format of convolutions; quicker on most machines, equal up to rounding.
        watch_conflicts: measure how often task gradients conflict on all training samples, which must fit into memory.
        watch_relations: gather the views of a relation report, of a method with a saliency regularizer.
        measure_costs: the time of a step, and the memory of a further one when all else is done.

    Raises:
        OptionError: a value that cannot work.
    """

    epochs: int = option(10, "of the training; the best weights by validation are kept", least=1)
    batch_size: int = option(50, "{samples} per step, of all processes together", least=1)
    learning_rate: float = option(1e-3, "of AdamW", above=0.0)
    weight_decay: float = option(0.05, "of matrices", least=0.0)
    decay: str = option("cosine", "of the learning rate", choices=DECAYS)
    warmup_steps: int = option(0, "in which the learning rate rises", least=0)
    evaluations: int = option(10, "looks at the validation {samples}", least=1)
    seed: int = option(0, "of all draws", least=0)
    accumulation: int = option(1, "micro-batches that a batch is split into, to save memory", least=1)
    mixed_precision: str = option("no", "fp16 needs a GPU", choices=PRECISIONS)
    clip_norm: float | None = option(None, "largest norm of the gradients (default: no limit)", above=0.0)
    temperature: float | None = option(None, "of the entropic rule (default: 0.3)", above=0.0, group="method")
    pretraining_epochs: int = option(
        0, "of hard sharing before the method sets in, as the authors do", least=0, group="method"
    )
    data_workers: int = option(
        0, "processes that load data, for each that trains; 0: it loads itself", least=0, group="run"
    )
    checkpoint_steps: int = option(
        0,
        "steps between the checkpoints of a training; 0 for none but the one that SIGTERM asks for",
        least=0,
        group="run",
    )
    penalty: str = "strength"
    trackers: tuple[str, ...] = ()
    keep_checkpoints: int = 2
    evaluation_batch_size: int | None = 500
    log_steps: int = 0
    progress: bool = False
    channels_last: bool = False
    watch_conflicts: bool = False
    watch_relations: bool = False
    measure_costs: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.metadata:
                _check(field.name, getattr(self, field.name), field.default, **field.metadata)
        for name, least in (("keep_checkpoints", 1), ("log_steps", 0)):
            _check(name, getattr(self, name), 0, least=least)
        _check("penalty", self.penalty, "strength", choices=("strength", "share"))
        _check("evaluation_batch_size", self.evaluation_batch_size, None, least=1)


def _check(
    name: str,
    value: Any,
    default: Any,
    least: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
    **others: Any,
) -> None:
    del others
    if value is None and default is None:
        return
    or_none = ", or None" if default is None else ""
    if choices:
        if value not in choices:
            raise OptionError(f"found {name}={value!r}. Use one of {', '.join(choices)}.")
    elif isinstance(least, int):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} must be a whole number from {least} on{or_none}; found {value!r}.")
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        bound = f"above {above:g}" if above is not None else f"from {least:g} on"
        if not number or not (value > above if above is not None else value >= least):
            raise OptionError(f"{name} must be a finite number {bound}{or_none}; found {value!r}.")
