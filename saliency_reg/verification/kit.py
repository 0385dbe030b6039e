"""A proof kit on a user's own model: :func:`verify`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import FeatureCapture, FeatureChoice, HeadsChoice
from ..errors import (
    AlreadyAttachedError,
    ConfigurationError,
    CrossSampleError,
    MissingArgumentError,
    NotConnectedError,
    SaliencyRegError,
    SecondDerivativeError,
    VerificationError,
    WrongTypeError,
)
from ..regularizer import SaliencyRegularizer
from ..saliency import resolve_channel_axis
from ..tasks import first_few
from ..torch_tools import positive_number
from .culprits import compiled, compiled_parts, not_captured
from .figures import fp16, share
from .gradient_checks import derivatives, reach
from .parameter_level import ParameterLevel, level_of
from .report import ROWS, Check, VerificationReport, table
from .saliency_checks import saliency, samples
from .subject import Run, Subject
from .surgery_check import Backward, surgery
from .unchanged import borrowed, unchanged


def verify(
    model: nn.Module,
    batch: Any,
    *,
    heads: HeadsChoice = None,
    feature: FeatureChoice = None,
    regularizer: SaliencyRegularizer | None = None,
    losses: Callable[[Any], Any] | None = None,
    backward: Backward | None = None,
    targets: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    strict: bool = False,
    tolerance: float | None = None,
    show: bool = True,
    **options: Any,
) -> VerificationReport:
    """Check on a model and a batch, in seconds, that the penalty is what it should be; ``docs/verify.md`` has the rows.

    The model runs some dozens of times, in the mode (train or eval) that it is in, always with the same random numbers.
    Weights, buffers, gradients, attributes, modes and random states are afterwards what they were, and so is a regularizer
    that is attached already. Nothing is written, and no optimizer steps.

    Args:
        model: the model, or a wrapper around it.
        batch: what it is called with: a tensor, a tuple of positional arguments, or a dict of named ones. At least two
            samples; small batches are checked just as well.
        heads, feature: as in :class:`SaliencyRegularizer`, and so are all other ``options``, such as ``strength`` and
            ``surgery``.
        regularizer: in the place of these, the regularizer that is attached to the model.
        losses: a function of what the model returns, to the task losses, before any weighting: a mapping, a sequence, or
            a vector ``[T]``. Needed for the share of the strength, for surgery, and for ``target="loss"``.
        backward: a function ``(losses, penalty)`` that does the backward pass of your own loop, ``losses`` being ``{task:
            loss}``: its gradients are compared, too. Left out: ``backward`` of their sum. It must not step an optimizer.
        targets, mask: as in a call of the regularizer.
        strict: raise :class:`VerificationError` if a check fails.
        tolerance: largest relative difference, for all comparisons; by default one for each number format.
        show: print the table.

    Returns:
        The report: ``report.passed``, ``report["samples"]``, and a row for each check when it is iterated over.

    Raises:
        VerificationError: with ``strict``, if a check fails.
        SaliencyRegError: one of its kinds, for arguments that cannot be used. What the model raises is not caught.

    Example:
        >>> layers = {"a": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), "b": nn.Linear(4, 1)}
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone, self.heads = nn.Linear(8, 4), nn.ModuleDict(layers)
        ...     def forward(self, x):
        ...         feature = self.backbone(x)
        ...         return {task: head(feature) for task, head in self.heads.items()}
        >>> report = verify(Model(), torch.randn(6, 8), heads="heads", show=False)  # x is [B, 8], outputs are [B, 1]
        >>> report.passed, report["saliency"].passed, report["share"].passed
        (True, True, None)
    """
    if not isinstance(model, nn.Module):
        raise WrongTypeError(f"model must be a torch.nn.Module, found {type(model).__name__}.")
    if any(torch.nn.parameter.is_lazy(one) for one in model.parameters()):  # type: ignore[no-untyped-call]
        raise ConfigurationError(
            "the model has lazy layers, whose first forward makes them. Call it once before verify."
        )
    for name, function in (("losses", losses), ("backward", backward)):
        if function is not None and not callable(function):
            raise WrongTypeError(f"{name}= must be a function, found {type(function).__name__}.")
    if tolerance is not None:
        positive_number("tolerance", tolerance)
    level = level_of(options.get("surgery"), regularizer, backward)
    if level is not None:
        options.pop("surgery")
    own = {"heads": heads, "feature": feature, **options}
    if regularizer is None and FeatureCapture.attached_to(model):
        raise AlreadyAttachedError(
            "a regularizer or surgery is attached to this model already. For a regularizer, pass verify(..., "
            "regularizer=it), or call .remove() on it first. A FeatureSurgery is not verified itself: call .remove() on it, "
            "and pass its weighting to verify(..., surgery=weighting)."
        )
    if regularizer is not None:
        if clash := sorted(name for name, value in own.items() if value is not None):
            raise ConfigurationError(
                f"{clash} are those of the regularizer. Leave them out, or leave regularizer= out."
            )
        if not isinstance(regularizer, SaliencyRegularizer) or regularizer._capture is None:
            raise WrongTypeError(
                "regularizer= must be a SaliencyRegularizer that is attached to the model, found "
                f"{type(regularizer).__name__}. For a FeatureSurgery, call .remove() on it, and pass its weighting as "
                "surgery=."
            )
    if losses is None and (options.get("target") if regularizer is None else regularizer.target) == "loss":
        raise MissingArgumentError(
            "target='loss' takes the saliency of the losses. Pass losses=, a function of the outputs."
        )
    given = {"targets": targets, "mask": mask}
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checks = _checks(model, batch, regularizer, own, losses, backward, level, given, tolerance)
    report = VerificationReport(checks)
    if show:
        print(report)
    if strict and not report.passed:
        raise VerificationError(
            "\n".join([f"{len(report.failed)} check{'s' * (len(report.failed) != 1)} failed:", *table(report.failed)])
        )
    return report


def _checks(
    model: nn.Module,
    batch: Any,
    regularizer: SaliencyRegularizer | None,
    options: dict[str, Any],
    losses: Any,
    backward: Backward | None,
    level: ParameterLevel | None,
    given: dict[str, Any],
    tolerance: float | None,
) -> list[Check]:
    collected = _Collected(model)
    try:
        used = regularizer or SaliencyRegularizer(model, **{"process_group": "local", **options})
    except SaliencyRegError as error:
        collected.failed("heads", error)
        return collected.rows("the regularizer could not be built")
    try:
        with borrowed(used) as capture:
            subject = Subject(model, batch, used, capture, losses, given)
            try:
                subject.settle()
            except SaliencyRegError as error:
                collected.failed("heads", error)
                if collected.home != "reach":
                    return collected.rows("the forward could not be captured")
            checks: dict[str, Callable[[], Check]] = {
                "heads": partial(_heads, subject),
                "compiled": partial(compiled, subject),
                "saliency": partial(saliency, subject, tolerance),
                "samples": partial(samples, subject),
                "reach": partial(reach, subject),
                "derivatives": partial(derivatives, subject, tolerance),
                "surgery": partial(surgery, subject, backward, tolerance, level, attached=regularizer is not None),
                "share": partial(share, subject),
                "fp16": partial(fp16, subject),
            }
            for name, check in checks.items():
                try:
                    collected.add(check())
                except Exception as error:  # of the user's code, too: the other checks go on
                    collected.failed(name, error)
            return collected.rows("")
    finally:
        if regularizer is None:
            used.remove()


class _Collected:
    """Rows; an error counts to the row that says what it is about, and leaves the one where it came up unchecked."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rows: dict[str, Check] = {}
        self._errors: dict[str, Check] = {}
        self.home = ""

    def add(self, check: Check) -> None:
        self._rows[check.name] = check

    def failed(self, name: str, error: Exception) -> None:
        text = str(error).strip() or type(error).__name__
        if not isinstance(error, SaliencyRegError):
            text = f"{type(error).__name__}: {text}"
        self.home = next((row for row, check in self._errors.items() if check.found == text), _home(name, error))
        if self.home == "compiled":
            self._errors.setdefault("compiled", not_captured(compiled_parts(self._model), error))
        else:
            self._errors.setdefault(self.home, Check(self.home, False, text))
        if self.home != name:
            self._rows.setdefault(name, Check(name, None, f"not checked: see {self.home!r}"))

    def rows(self, why_not: str) -> list[Check]:
        found = []
        for name in ROWS:
            row, error = self._rows.get(name), self._errors.get(name)
            if error is not None and (row is None or row.passed is not False):
                row = error
            found.append(row or Check(name, None, f"not checked: {why_not}"))
        failed = {row.name for row in found if row.passed is False}
        return [_pointing(row, failed) for row in found]


#: In which rows the cause of a row's failure may be.
_CAUSES = {
    "saliency": ("reach", "fp16"),
    "derivatives": ("reach",),
    "surgery": ("reach", "derivatives"),
    "share": ("reach", "fp16"),
}


def _pointing(row: Check, failed: set[str]) -> Check:
    causes = [name for name in _CAUSES.get(row.name, ()) if name in failed and row.passed is False]
    if not causes:
        return row
    return replace(row, advice=f"See {' and '.join(map(repr, causes))} first. {row.advice}".strip())


_OF_REACH = ("no graph", "changed in place", "inplace operation")


def _home(name: str, error: Exception) -> str:
    text = str(error)
    if "torch.compile" in text or "compiled" in text:
        return "compiled"
    if isinstance(error, SecondDerivativeError):
        return "derivatives"
    if isinstance(error, CrossSampleError):
        return "samples"
    if isinstance(error, NotConnectedError) or any(words in text for words in _OF_REACH):
        return "reach"
    return name


def _heads(subject: Subject) -> Check:
    run = subject.run()
    heads, feature = subject.capture.describe()
    shapes = ", ".join(_axes(subject, run))
    text = f"{len(subject.tasks)} tasks ({first_few(subject.tasks)}) by heads {heads}; feature map: {feature}, {shapes}"
    missing = [task for index, task in enumerate(subject.tasks) if index not in run.forward.tasks(len(subject.tasks))]
    if missing:
        text += f"; did not run in this batch: {', '.join(map(repr, missing))}"
    if not subject.enabled:
        return Check("heads", False, f"regularizer.enabled is False, so that its penalty is always 0; {text}", _ENABLE)
    return Check("heads", True, text)


_ENABLE = "Set regularizer.enabled = True in training; the other rows are as if it were."


def _axes(subject: Subject, run: Run) -> list[str]:
    """Say of each feature map which of its axes are samples and channels, as the saliency takes them."""
    shapes = [list(one.tensor.shape) for one in run.forward.features]
    try:
        subject.penalty(run)  # which finds the axes
        found = []
        for index, (one, shape) in enumerate(zip(run.forward.features, shapes)):
            axis = resolve_channel_axis(one.tensor.shape, subject.channel_axis(run, index), one.batch_axis)
            axis = [one.batch_axis, *(each for each in range(len(shape)) if each != one.batch_axis)][axis]
            samples = shape[one.batch_axis]
            found.append(f"{samples} sample{'s' * (samples != 1)}, {shape[axis]} channels (axis {axis} of {shape})")
    except Exception:  # what is wrong a check will say
        return [str(shape) for shape in shapes]
    return found
