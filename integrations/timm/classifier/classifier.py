"""Finding the classifier and the feature map of an unmodified timm model by what one forward does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import WrongTypeError
from ...shared.looking import first_line, undisturbed, unwrapped
from ..backbone.backbone import image_size_pair
from ..backbone.feature_layout import FeatureLayout, find_layout
from ..backbone.probing import blank_images, calls_noted, image_shape_of, outputs_noted, published_names
from ..errors import ClassifierNotFoundError, FeatureNotFoundError, ImageSizeError


@dataclass(frozen=True)
class Classifier:
    """What one forward of a timm model told."""

    #: Modules that end in logits: one, or several whose outputs are combined (a distilled pair, a head per branch).
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    #: Whether the output of the single module is that of the model.
    whole: bool
    #: Whether all of the model's output comes out of ``forward_head``, called with the features alone.
    part: bool
    columns: int
    #: Of what ``forward_features`` returned, and the names of modules that return it (empty if there are none).
    layout: FeatureLayout
    features: tuple[str, ...]


def find_classifier(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> tuple[str, ...]:
    """Return the names of the modules that end in the logits of a timm model.

    Args:
        model: of ``timm.create_model``.
        image_size: side, or ``(height, width)``, of images that it can process; by default what it was built for.

    Returns:
        One name (``("fc",)``), or several for a distilled pair or a head per branch.

    Raises:
        ClassifierNotFoundError: the model has none (``num_classes=0``), or none whose output could be told.
        ImageSizeError: the model could not be run on a blank image of its own size.
        WrongTypeError: no timm model.

    Example:
        >>> import timm
        >>> from saliency_reg.integrations.timm import find_classifier
        >>> find_classifier(timm.create_model("test_convnext", num_classes=3))
        ('head.fc',)
    """
    return look_at(model, image_size).names


def find_feature(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> str:
    """Return the name of the module whose output is the feature map before pooling, what ``forward_features`` returns.

    Args:
        model: of ``timm.create_model``.
        image_size: side, or ``(height, width)``, of images that it can process; by default what it was built for.

    Raises:
        FeatureNotFoundError: no module returns it (something is computed behind the last one), or there are several maps.
        ClassifierNotFoundError, ImageSizeError, WrongTypeError: as in :func:`find_classifier`.

    Example:
        >>> import timm
        >>> from saliency_reg.integrations.timm import find_feature
        >>> find_feature(timm.create_model("resnet18", num_classes=3))
        'layer4'
    """
    found = look_at(model, image_size)
    if len(found.features) != 1:
        several = "computes its feature map behind the last module"
        if found.features:
            several = f"returns {len(found.features)} maps, of {', '.join(found.features)}"
        raise FeatureNotFoundError(
            f"{type(unwrapped(model, 'forward_features')).__name__} {several}, so that one name does not say it. Use "
            "saliency_regularizer(model, ..., feature='map'), which needs no name."
        )
    return found.features[0]


def look_at(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> Classifier:
    """Run a timm model once on a blank image, without a trace, and return what that tells."""
    inner = timm_model(model)
    name = type(inner).__name__
    if getattr(inner, "num_classes", None) == 0:
        raise _no_classifier(inner)
    channels, *own_size = image_shape_of(inner)
    height, width = image_size_pair(image_size) or own_size
    behind: list[int] = []  # number of outputs when the features were complete

    def complete(features: Any) -> Any:
        behind.append(len(outputs))
        return features

    try:
        with (
            undisturbed(inner),
            torch.no_grad(),
            outputs_noted(inner) as outputs,
            calls_noted(inner, "forward_features", complete) as features,
            calls_noted(inner, "forward_head") as heads,
        ):
            logits = inner(blank_images(inner, channels, (height, width)))
    except Exception as error:  # models refuse sizes with assert, with torch's own shape errors, ...
        if isinstance(error, NotImplementedError):
            raise _no_classifier(inner) from error
        raise ImageSizeError(
            f"{name} could not be run on a blank image [1, {channels}, {height}, {width}] ({type(error).__name__}: "
            f"{first_line(error)}). Pass image_size= with the size of images that it was built for."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(features) != 1:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ClassifierNotFoundError(
            f"{name} returned {shape} in eval mode, expected logits [B, classes] from one call of forward_features. Choose "
            "a model with a classifier, or call regularizer(outputs=..., features=...) yourself."
        )
    returned = features[0][2]
    found = _classifier_names(inner, outputs, logits)
    modules = tuple(inner.get_submodule(each) for each in found)
    return Classifier(
        names=found,
        modules=modules,
        whole=len(found) == 1 and any(own is modules[0] and _is(output, logits) for _, own, output in outputs),
        part=len(heads) == 1 and heads[0][2] is logits and len(heads[0][0]) == 1 and heads[0][0][0] is returned,
        columns=logits.shape[1],
        layout=find_layout(returned, inner, (height, width)),
        features=_feature_names(returned, outputs[: behind[0]]),
    )


def timm_model(model: object) -> nn.Module:
    """Return the timm model inside of a wrapper; anything else is refused."""
    inner = unwrapped(model, "forward_features") if isinstance(model, nn.Module) else None
    if inner is None or not all(hasattr(inner, name) for name in ("forward_features", "forward_head")):
        raise WrongTypeError(
            f"model must be what timm.create_model returns, found {type(model).__name__}. For any other model use "
            "SaliencyRegularizer(model, heads=...)."
        )
    return inner


def _classifier_names(
    model: nn.Module, outputs: Sequence[tuple[str, nn.Module, Any]], logits: Tensor
) -> tuple[str, ...]:
    ran = {name for name, _, _ in outputs}
    names = tuple(name for name in published_names(model, "classifier") if name in ran)
    if len(names) == 1:
        ends = [name for name, own, output in outputs if _ends_in_columns(own) and _is(output, logits)]
        if names[0] not in ends and ends:  # a wrapper around the layer, or a name of another version
            return (ends[-1],)
    if names:
        return names
    ends = [name for name, own, output in outputs if _ends_in_columns(own) and _has_columns(output, logits)]
    if not ends:
        raise _no_classifier(model)
    whole = [name for name, own, output in outputs if name in ends and _is(output, logits)]
    return (whole[-1],) if whole else tuple(dict.fromkeys(ends))


def _ends_in_columns(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def _has_columns(output: Any, logits: Tensor) -> bool:
    return isinstance(output, Tensor) and output.numel() == logits.numel() and output.shape[:2] == logits.shape


def _is(output: Any, logits: Tensor) -> bool:
    """Whether an output is the logits, up to axes of one entry."""
    return _has_columns(output, logits) and torch.equal(output.reshape(logits.shape), logits)


def _feature_names(returned: Any, outputs: Sequence[tuple[str, nn.Module, Any]]) -> tuple[str, ...]:
    """Return the outermost module that returned this very tensor, for each map; empty if there is none for one of them."""
    maps = returned if isinstance(returned, (list, tuple)) else [returned]
    found = [[name for name, _, output in outputs if output is each] for each in maps]
    return tuple(names[-1] for names in found) if all(found) else ()


def _no_classifier(model: nn.Module) -> ClassifierNotFoundError:
    return ClassifierNotFoundError(
        f"{type(model).__name__} has no classifier (num_classes=0, or an encoder). Use timm.create_model(name, "
        "num_classes=len(tasks)), model.reset_classifier(len(tasks)), or TimmMultiTaskModel(name, heads=tasks)."
    )
