"""The regularizer on the classifier of an unmodified timm model, one task per class."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from .... import SaliencyRegularizer
from ....capture import check_not_compiled
from ....errors import ConfigurationError, TaskError
from ....tasks import check_task_names
from ..backbone.feature_layout import Joined
from ..errors import ClassifierNotFoundError
from .classifier import look_at, timm_model
from .classifier_part import ClassifierPart, install, uninstall


def saliency_regularizer(
    model: nn.Module,
    tasks: Sequence[str],
    *,
    strength: float | str = "auto",
    feature: str | nn.Module | Sequence[str | nn.Module] = "auto",
    image_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> SaliencyRegularizer:
    """Attach a :class:`SaliencyRegularizer` to ``timm.create_model(name, num_classes=len(tasks))``.

    Args:
        model: the timm model, alone or inside of ``DistributedDataParallel``.
        tasks: a name for each class, in the order of the columns.
        strength: factor of the penalty, or ``"auto"``, as in :class:`SaliencyRegularizer`.
        feature: ``"auto"``: what the classifier reads, ``[B, C]``. Where the classifier is a ``Linear`` behind average
            pooling, the saliency there is its weight row, in closed form, and that is also the saliency of the map before
            pooling under ``pool="sum"``. Nothing is between it and the logits that has no second derivative. Where several
            modules make the logits together (distilled pairs, a head per branch), it is ``"map"``.
            ``"map"``: the map before pooling, what ``forward_features`` returns, with its positions; attention pooling
            then runs without fused kernels. Or the name of a module, as in :class:`SaliencyRegularizer`.
        image_size: side, or ``(height, width)``, of images that the model can process, for the one forward on a blank image
            that finds its classifier; by default what it was built for.
        options: of :class:`SaliencyRegularizer`.

    Returns:
        The regularizer. Its ``remove()`` leaves the model as it was.

    Raises:
        TaskError: another number of names than classes, or doubled ones.
        ClassifierNotFoundError: the model has no classifier (``num_classes=0``).
        AlreadyAttachedError: a regularizer is attached already.
        ImageSizeError: the model could not be run on a blank image.
        SaliencyRegError: those of :class:`SaliencyRegularizer`.

    Example:
        >>> import timm, torch
        >>> from saliency_reg.integrations.timm import saliency_regularizer
        >>> model = timm.create_model("test_resnet", num_classes=3)
        >>> regularizer = saliency_regularizer(model, tasks=["smiling", "young", "glasses"], strength=0.1)
        >>> logits = model(torch.randn(2, 3, 64, 64))
        >>> bool(regularizer() > 0)
        True
    """
    if clash := sorted({"heads", "output"} & set(options)):
        raise ConfigurationError(
            f"{clash} are found here. Leave them out, or use SaliencyRegularizer(model, heads=...)."
        )
    inner = timm_model(model)
    names = check_task_names(tasks)
    found = look_at(model, image_size)
    if found.columns != len(names):
        raise TaskError(
            f"tasks has {len(names)} names, but {type(inner).__name__} has {found.columns} classes. Name each class "
            f"once, or build the model for them: timm.create_model(name, num_classes={len(names)})."
        )
    if isinstance(feature, str) and feature == "auto":
        feature = "input of the classifier" if found.whole else "map"
    if found.whole and feature != "map":
        chosen: dict[str, Any] = {} if feature == "input of the classifier" else {"feature": feature}
        return SaliencyRegularizer(model, heads=found.modules[0], tasks=names, strength=strength, **chosen, **options)
    if not found.part:
        raise ClassifierNotFoundError(
            f"the logits of {type(inner).__name__} do not come out of forward_head(features) alone. Name what is found: "
            f"SaliencyRegularizer(model, heads={found.names[0]!r}, tasks=[...]), or call regularizer(outputs=..., "
            "features=...) yourself."
        )
    # The part that stands in is no module of the model: what is compiled around it is looked for here.
    check_not_compiled(model, found.names, found.modules)
    parts = found.layout.parts if isinstance(found.layout, Joined) else (found.layout,)
    part = ClassifierPart(inner, found.modules)
    sources = install(inner, part, len(parts))
    try:
        if feature != "map":
            options["feature"] = feature
        else:
            axes = [each.channel_axis for each in parts]
            options.setdefault("channel_axis", axes if len(axes) > 1 else axes[0])
            if sources:
                options["feature"] = sources
        return _PartRegularizer(model, part, inner, tasks=names, strength=strength, **options)
    except BaseException:
        uninstall(weakref.ref(inner))
        raise


class _PartRegularizer(SaliencyRegularizer):
    """A regularizer that takes the classifier part off the model again, too."""

    in_a_copy: ClassVar[dict[str, Any]] = {"_taken_off": None}

    def __init__(self, model: nn.Module, part: ClassifierPart, inner: nn.Module, **options: Any) -> None:
        super().__init__(model, heads=part, **options)
        # The finalizer must not refer to the regularizer.
        self._taken_off: Any = weakref.finalize(self, uninstall, weakref.ref(inner))
        self._taken_off.atexit = False

    def remove(self) -> None:
        """Take everything off the model, also the part that the classifier was given as a head."""
        super().remove()
        if self._taken_off is not None:
            self._taken_off()
