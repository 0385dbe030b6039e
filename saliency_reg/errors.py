"""Typed errors. Each is a :class:`SaliencyRegError` and the builtin that fits, so both can be caught.

Every message says what was found, what was expected, and what to use instead.
"""

from __future__ import annotations

__all__ = [
    "AlreadyAttachedError",
    "AmbiguousHeadsError",
    "AmbiguousModuleError",
    "BackboneCutError",
    "CaptureError",
    "ConfigurationError",
    "HeadNotFoundError",
    "MissingArgumentError",
    "MissingPackageError",
    "ModuleNotFoundInModelError",
    "CrossSampleError",
    "NoHeadRanError",
    "NonFiniteError",
    "NotConnectedError",
    "ReaderError",
    "SaliencyRegError",
    "ScriptingError",
    "SecondDerivativeError",
    "ShapeError",
    "StateMismatchError",
    "SurgeryError",
    "TaskError",
    "VerificationError",
    "WrongTypeError",
]


class SaliencyRegError(Exception):
    """Base class of every error that this package raises."""


class ConfigurationError(SaliencyRegError, ValueError):
    """An option has a value that is not allowed (an unknown name, a number out of range)."""


class WrongTypeError(SaliencyRegError, TypeError):
    """An argument has a type that cannot be used."""


class MissingArgumentError(SaliencyRegError, TypeError):
    """An argument that the chosen options need was not given."""


class MissingPackageError(SaliencyRegError, ImportError):
    """A package of an extra is not installed."""


class ShapeError(SaliencyRegError, ValueError):
    """A tensor has the wrong rank, batch size or number of columns."""


class TaskError(SaliencyRegError, ValueError):
    """Task names are too few, duplicated, or do not match what they should name."""


class NonFiniteError(SaliencyRegError, ArithmeticError):
    """NaN or infinity where values are checked."""


class ModuleNotFoundInModelError(SaliencyRegError, LookupError):
    """A name or module does not exist in the model."""


class HeadNotFoundError(ModuleNotFoundInModelError):
    """No head matches, or none could be found without help."""


class AmbiguousModuleError(SaliencyRegError, ValueError):
    """A name means several modules."""


class AmbiguousHeadsError(AmbiguousModuleError):
    """Several choices of heads are equally plausible."""


class BackboneCutError(SaliencyRegError, ValueError):
    """A backbone cannot be cut into stages, or not there; the message has the places where it can."""


class AlreadyAttachedError(SaliencyRegError, RuntimeError):
    """A regularizer is attached to these heads already."""


class CaptureError(SaliencyRegError, RuntimeError):
    """The forward pass that the regularizer needs did not happen, or happened in an unusable way."""


class NoHeadRanError(CaptureError):
    """The model's forward ended without any of the heads; with several processes, on all of them."""


class ReaderError(SaliencyRegError, RuntimeError):
    """A call within a transform, a trace or an export of a function; or beside hooks of others that it would disturb."""


class ScriptingError(SaliencyRegError, AttributeError):
    """TorchScript was asked to compile a module while hooks of this package are on it."""


class SecondDerivativeError(SaliencyRegError, NotImplementedError):
    """A part between the feature map and an output cannot be differentiated twice."""


class CrossSampleError(SaliencyRegError, ValueError):
    """An output of one sample depends on the feature map of another (a BatchNorm in train mode)."""


class NotConnectedError(SaliencyRegError, RuntimeError):
    """A task output does not depend on the feature map, or carries no graph."""


class StateMismatchError(SaliencyRegError, RuntimeError):
    """A ``state_dict`` belongs to other tasks or to another relation rule."""


class SurgeryError(SaliencyRegError, RuntimeError):
    """Task gradients arrived in a way in which they cannot be combined."""


class VerificationError(SaliencyRegError, RuntimeError):
    """``verify(strict=True)`` found something; the message has the rows that failed."""
