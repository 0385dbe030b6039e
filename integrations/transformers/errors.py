"""Errors of the transformers integration. Every message says what was found, what was expected, and what to use instead."""

from __future__ import annotations

from ...errors import ModuleNotFoundInModelError, SaliencyRegError, ShapeError, TaskError


class ClassifierNotFoundError(ModuleNotFoundInModelError):
    """A model has no classifier, several, or one whose output is not its logits."""


class EncoderError(SaliencyRegError, ValueError):
    """A model that cannot be the encoder of a multi-task model."""


class PretrainedWeightsError(SaliencyRegError, OSError):
    """An encoder could not be loaded from the hub or a folder."""


class UnknownTaskError(TaskError, LookupError):
    """Labels or an argument name a task that the model does not have."""


class LabelError(SaliencyRegError, ValueError):
    """Labels that do not fit their task: wrong shape, number format or range, or none at all."""


class TokenizerMismatchError(ShapeError):
    """Token ids that the encoder has no embedding for."""


class UnsupportedTrainerError(SaliencyRegError, RuntimeError):
    """A Trainer, or an engine below it, into which the regularizer cannot be put as asked."""
