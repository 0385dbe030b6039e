"""Hugging Face accelerate: checkpoints of the regularizer, its optimizer steps, and its figures in the trackers.

>>> from accelerate import Accelerator
>>> from saliency_reg.integrations.accelerate import log_report, register

The loop stays ``accelerator.backward(loss + regularizer(losses=losses))``; ``register(regularizer, accelerator,
optimizer=optimizer)`` goes before or after ``accelerator.prepare(model, optimizer)``, which is not given the regularizer.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Union, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .. import FeatureSurgery, HeadPenalty, ParameterSurgery, RepMTL, SaliencyRegularizer, SaliencyReport
from ..errors import CaptureError, ConfigurationError, StateMismatchError, WrongTypeError
from ..tasks import Losses
from ..torch_tools import check_not_closure_only, derives_from, unwrap_optimizer, whole_number
from .shared.libraries import need
from .shared.relation_image import image_of
from .shared.report_figures import figures_of

__all__ = ["backward", "log_report", "register"]

logger = logging.getLogger("saliency_reg")

_Reporting = Union[SaliencyRegularizer, RepMTL, FeatureSurgery, ParameterSurgery]
_Registered = Union[_Reporting, HeadPenalty]

#: ``accelerator.distributed_type`` of engines that update the parameters themselves.
_ENGINES = ("DEEPSPEED", "MEGATRON_LM")

#: Classes of such engines, and optimizers that update in the backward pass. By name: they may not be installed.
_WITHOUT_STEPS = {"DeepSpeedOptimizerWrapper", "MegatronLMOptimizerWrapper", "DummyOptim", "Lomo", "AdaLomo"}

#: Optimizer steps of the latest image.
_latest_image: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def register(regularizer: _Registered, accelerator: Any, *, optimizer: Any = None) -> None:
    """Make a regularizer, a surgery or a penalty part of an accelerate run: its checkpoints, and its optimizer steps.

    ``save_state`` and ``load_state`` then keep its whole state, in the ``custom_checkpoint_*.pkl`` whose number is the order
    of registration: register the same objects in the same order when resuming, in any number of processes. With
    ``optimizer=`` the relations follow the steps that are really taken: once for all micro-batches of
    ``accelerator.accumulate``, and not those that a loss scale has skipped.

    It can come before or after ``accelerator.prepare``, as can building the regularizer. Calling it again changes nothing,
    but for another ``optimizer=``, which takes the place of the former one.

    Args:
        regularizer: a :class:`SaliencyRegularizer`, :class:`RepMTL`, :class:`HeadPenalty`, :class:`FeatureSurgery` (or
            :class:`GradNorm`) or :class:`ParameterSurgery`. Not to be given to ``accelerator.prepare``.
        accelerator: the ``accelerate.Accelerator``.
        optimizer: the optimizer to follow, prepared or not; not needed if the regularizer was built with it. DeepSpeed and
            Megatron-LM have none that can be followed: leave it out, and call ``regularizer.step()``.

    Raises:
        WrongTypeError: something else as regularizer, accelerator or optimizer.
        ConfigurationError: an engine whose steps cannot be followed, a model that ``prepare`` compiles as a whole, or a
            regularizer that was prepared.
        MissingPackageError: accelerate is not installed.
        StateMismatchError: from ``accelerator.load_state``: the state is that of other tasks or of another object.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from saliency_reg import SaliencyRegularizer
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> regularizer = SaliencyRegularizer(model, heads="2", strength=0.1)
        >>> register(regularizer, accelerator, optimizer=optimizer)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> accelerator.backward(model(torch.randn(16, 20)).square().mean() + regularizer())
        >>> optimizer.step()
        >>> int(regularizer.relations.updates)
        1
    """
    _check_arguments(regularizer, accelerator, HeadPenalty)
    if any(regularizer is part for model in accelerator._models for part in (model, getattr(model, "module", None))):
        raise ConfigurationError(
            f"this {type(regularizer).__name__} was given to accelerator.prepare(), which wraps models and saves it twice. "
            "Prepare the model, the optimizer and the loaders only."
        )
    _check_engine(regularizer, accelerator, optimizer)
    if isinstance(regularizer, (SaliencyRegularizer, RepMTL)):
        _check_not_compiled_by(accelerator)
    if optimizer is None:
        pass
    elif type(regularizer) is FeatureSurgery:  # acts in the backward pass, whoever steps
        check_not_closure_only(unwrap_optimizer(optimizer))
    else:
        cast(Any, regularizer).attach_optimizer(optimizer)
    kept = (own.object if isinstance(own, _Checkpoint) else own for own in accelerator._custom_objects)
    if not any(own is regularizer for own in kept):
        accelerator.register_for_checkpointing(_Checkpoint(regularizer))


def backward(
    surgery: ParameterSurgery, accelerator: Any, losses: Losses, penalty: Tensor | float | None = None
) -> None:
    """``surgery.backward(losses, penalty)`` as ``accelerator.backward`` does it.

    Losses and penalty are divided by the accumulation steps and multiplied by the loss scale, and micro-batches are
    gathered until ``accelerator.sync_gradients``. :class:`FeatureSurgery` and ``surgery=`` need nothing like it.

    Args:
        surgery: a :class:`ParameterSurgery`.
        accelerator: the ``accelerate.Accelerator``.
        losses, penalty: 0-dim each, as in :meth:`ParameterSurgery.backward`.

    Raises:
        WrongTypeError: something else as surgery or accelerator.
        ConfigurationError: an engine with a backward pass of its own.
        MissingPackageError: accelerate is not installed.
        SaliencyRegError: those of :meth:`ParameterSurgery.backward`.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from saliency_reg import ParameterSurgery
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> surgery = ParameterSurgery(model, shared="0", tasks=["a", "b", "c"])
        >>> register(surgery, accelerator, optimizer=optimizer)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> with accelerator.accumulate(model):
        ...     backward(surgery, accelerator, list(model(torch.randn(16, 20)).square().mean(0)))
        ...     optimizer.step()
        >>> surgery.report.weights.shape
        torch.Size([3])
    """
    _check_arguments(surgery, accelerator)
    if not isinstance(surgery, ParameterSurgery):
        raise WrongTypeError(
            f"backward() is for ParameterSurgery, found {type(surgery).__name__}. Call accelerator.backward(loss)."
        )
    _check_engine(surgery, accelerator, None)

    def as_accelerate_scales(loss: Any) -> Any:
        """Divide a loss by the accumulation steps and scale it for float16, as ``accelerator.backward`` does."""
        if not isinstance(loss, Tensor):  # refused, or a penalty without a gradient
            return loss
        loss = loss / accelerator.gradient_accumulation_steps
        return loss if accelerator.scaler is None else accelerator.scaler.scale(loss)

    given: Any = losses
    if isinstance(losses, Mapping):
        given = {task: as_accelerate_scales(loss) for task, loss in losses.items()}
    elif isinstance(losses, Sequence):
        given = [as_accelerate_scales(loss) for loss in losses]
    surgery.backward(given, as_accelerate_scales(penalty), accumulate=not accelerator.sync_gradients)


def log_report(
    regularizer: _Reporting,
    accelerator: Any,
    step: int,
    *,
    max_pairs: int = 50,
    image_every: int | None = 500,
    prefix: str = "saliency",
) -> dict[str, float]:
    """Send the figures of ``regularizer.report`` to the trackers of the accelerator.

    Under ``saliency/``: ``penalty``, ``strength``, ``share`` (if the losses were given), ``distance_mean``,
    ``relation_mean``, ``relation_max``, ``relation_min``, and for pairs of tasks ``distance/smiling-young`` and
    ``relation/smiling-young``. With surgery ``surgery/conflicts`` and ``surgery/weight/smiling``. Trackers that take images
    get the matrix of the relations as ``relations``, bright where they are large, with task names if matplotlib is
    installed.

    Only where there is a tracker, which is on the main process, anything is read; so it can be called on all processes, and
    costs nothing without trackers. Values that are not finite (the distance of a task that did not run) are left out.

    Args:
        regularizer: a :class:`SaliencyRegularizer`, :class:`FeatureSurgery` or :class:`ParameterSurgery`, after a call.
        accelerator: the ``accelerate.Accelerator``; trackers are started by ``accelerator.init_trackers(...)``.
        step: the number under which trackers file it.
        max_pairs: of more pairs, those with the largest relations at that step; 0 for none.
        image_every: an image with the first call, and again as soon as ``step`` is larger by this; ``None`` for no images.
        prefix: of all names.

    Returns:
        What was sent, ``{name: number}``; empty where there is no tracker.

    Raises:
        CaptureError: nothing was reported yet.
        WrongTypeError: something else as regularizer, accelerator or step.
        ConfigurationError: a number out of range.
        MissingPackageError: accelerate is not installed.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from accelerate.tracking import GeneralTracker
        >>> from saliency_reg import SaliencyRegularizer
        >>> class Printer(GeneralTracker):
        ...     name, requires_logging_directory, tracker = "printer", False, None
        ...     def log(self, values, step=None, **kwargs):
        ...         print(step, sorted(values)[:3])
        >>> accelerator = Accelerator(cpu=True, log_with=Printer())
        >>> accelerator.init_trackers("digits")
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
        >>> regularizer = SaliencyRegularizer(model, heads="2", tasks=["zero", "one", "two"], strength=0.1)
        >>> outputs = accelerator.prepare(model)(torch.randn(16, 20))
        >>> penalty = regularizer(losses=outputs.square().mean())
        >>> figures = log_report(regularizer, accelerator, step=7)
        7 ['saliency/distance/one-two', 'saliency/distance/zero-one', 'saliency/distance/zero-two']
        >>> figures["saliency/strength"]
        0.1
    """
    _check_arguments(regularizer, accelerator)
    whole_number("step", step)
    whole_number("max_pairs", max_pairs)
    if image_every is not None:
        whole_number("image_every", image_every, least=1)
    report = regularizer.report
    if report is None:
        raise CaptureError(
            f"this {type(regularizer).__name__} has no report yet. Call log_report() after a training step: after "
            "accelerator.backward(loss + regularizer()), or after the backward pass under surgery."
        )
    if not accelerator.trackers:
        return {}
    figures = figures_of(report, max_pairs, prefix)
    if isinstance(report, SaliencyReport) and image_every is not None:
        latest = _latest_image.get(regularizer)
        if latest is None or not latest <= step < latest + image_every:  # a step from before is a new start
            _latest_image[regularizer] = step
            _send_image(accelerator.trackers, f"{prefix}/relations", report, step)
    accelerator.log(figures, step=step)
    return figures


class _Checkpoint:
    """The object that accelerate saves and loads: our state as it is, and a typed error for that of something else."""

    def __init__(self, kept: _Registered) -> None:
        self.object = kept

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the object, for ``accelerator.save_state``."""
        return self.object.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Load it, for ``accelerator.load_state``; what does not fit raises :class:`StateMismatchError`."""
        try:
            self.object.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            raise StateMismatchError(
                f"this is not the state of a {type(self.object).__name__} that was built in this way ({error}). Files "
                "custom_checkpoint_0.pkl, custom_checkpoint_1.pkl, ... are numbered by the order of registration: register "
                "the same objects in the same order as in the run that was saved."
            ) from error


def _check_arguments(regularizer: object, accelerator: object, *more: type) -> None:
    kinds = (SaliencyRegularizer, RepMTL, FeatureSurgery, ParameterSurgery, *more)
    if not isinstance(regularizer, kinds):
        names = [kind.__name__ for kind in kinds]
        raise WrongTypeError(
            f"expected a {', '.join(names[:-1])} or {names[-1]} as first argument, found {type(regularizer).__name__}. Use "
            "register(regularizer, accelerator)."
        )
    if not isinstance(accelerator, need("accelerate").Accelerator):
        raise WrongTypeError(
            f"accelerator must be an accelerate.Accelerator, found {type(accelerator).__name__}. Use Accelerator()."
        )


def _engine_of(accelerator: Any, optimizer: Any) -> str | None:
    """Return the name of an engine whose updates pass no hook of a torch optimizer."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in _ENGINES:
        return kind
    for _ in range(8):  # wrappers of wrappers, but no endless chain
        packages = {base.__module__.partition(".")[0] for base in type(optimizer).__mro__}
        if derives_from(optimizer, *_WITHOUT_STEPS) or packages & {"deepspeed", "megatron"}:
            return type(optimizer).__name__
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _check_engine(regularizer: _Registered, accelerator: Any, optimizer: Any) -> None:
    engine = _engine_of(accelerator, optimizer)
    if engine is None:
        return
    if isinstance(regularizer, ParameterSurgery):
        raise ConfigurationError(
            f"{engine} has a backward pass and gradients of its own, which ParameterSurgery cannot take the place of. Use "
            "FeatureSurgery, or surgery=PCGrad() of SaliencyRegularizer, which work within any backward pass."
        )
    if isinstance(regularizer, HeadPenalty):
        raise ConfigurationError(
            f"{engine} updates the parameters by itself, and keeps parts of them only, so that HeadPenalty cannot follow "
            "its steps. Use DistributedDataParallel."
        )
    follows = getattr(regularizer, "follows_optimizer", False)
    if optimizer is not None or follows:
        raise ConfigurationError(
            f"{engine} updates the parameters by itself, and no hook of a torch optimizer tells when. Build the regularizer "
            "without optimizer=, use register(regularizer, accelerator), and after each optimizer.step(): "
            "if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped: regularizer.step()"
        )


def _check_not_compiled_by(accelerator: Any) -> None:
    plugin = accelerator.state.dynamo_plugin
    backend = str(getattr(plugin.backend, "value", plugin.backend)).upper()
    if backend in ("NO", "EAGER") or getattr(plugin, "use_regional_compilation", False):
        return
    raise ConfigurationError(
        f"this Accelerator compiles the whole model in prepare() (dynamo_backend={backend.lower()!r}), and compiled heads "
        "have no second derivative. Leave dynamo_backend out (ACCELERATE_DYNAMO_BACKEND, and `accelerate config`, too), and "
        "compile the backbone alone, at any time: model.backbone.compile()."
    )


def _send_image(trackers: Sequence[Any], name: str, report: SaliencyReport, step: int) -> None:
    takers = [tracker for tracker in trackers if hasattr(tracker, "log_images")]
    if not takers:
        return
    image = image_of(report)
    for tracker in takers:
        # What log_images takes is not the same everywhere.
        if tracker.name == "tensorboard":
            if importlib.util.find_spec("PIL") is None:
                logger.warning(
                    "TensorBoard needs Pillow for images; the relations are left out. Run: pip install pillow"
                )
                continue
            tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")
        elif tracker.name in ("aim", "clearml"):
            tracker.log_images({name: image}, step=step)
        else:
            tracker.log_images({name: [image]}, step=step)
