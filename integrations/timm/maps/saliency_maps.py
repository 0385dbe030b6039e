"""Where in an image the tasks of a timm model look."""

from __future__ import annotations

import contextlib
import difflib
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....capture import find_module
from ....errors import CaptureError, ConfigurationError, ShapeError, TaskError, WrongTypeError
from ....saliency import scalar_of
from ....torch_tools import at_least_float32, check_choice
from ...shared.looking import undisturbed, unwrapped
from ..backbone.backbone import image_size_pair
from ..backbone.feature_layout import ChannelsLast, Joined, find_layout, layout_of
from ..backbone.probing import outputs_noted
from ..classifier.classifier import timm_model
from ..errors import NoSpatialFeatureError
from ..model.model import TimmMultiTaskModel
from .map_feature import MapFeature, deepest_feature, depends, gradients_at, last_feature, may_be_a_map, named_feature
from .map_methods import MAP_METHODS


def task_saliency_maps(
    model: nn.Module,
    images: Tensor,
    tasks: Sequence[str] | Sequence[int] | None = None,
    *,
    feature: str | nn.Module | None = None,
    method: str = "gradient_times_activation",
    size: str | int | tuple[int, int] | None = None,
) -> Tensor:
    """Return a map per task and image: how much each position of a feature map has to do with the task's output.

    The output is differentiated as in the regularizer: the logit, or for K classes the largest minus the mean logit. With
    ``G`` its gradient at the feature map ``A``:

    - ``"gradient_times_activation"``: ``sum_c G_c A_c``, HiResCAM (Draelos and Carin, 2020); its sum over positions is the
      logit, up to the bias, where the head is linear behind average pooling.
    - ``"gradient"``: the norm of ``G`` over the channels.
    - ``"grad_cam"``: ``relu(sum_c mean(G_c) A_c)``, the mean over positions (Selvaraju et al., 2017).

    The model runs in eval mode, and is left as it was: modes, gradients, ``requires_grad``, random numbers, statistics, and
    regularizers that are attached to it. No gradient of a parameter is taken. It works within ``torch.no_grad()``.

    Args:
        model: a :class:`TimmMultiTaskModel`, or a timm model with a class per task; alone or inside of
            ``DistributedDataParallel``.
        images: ``[B, in_chans, H, W]``.
        tasks: some of the tasks, by name, or by number of the class for a timm model; by default all.
        feature: name of the module whose output is the feature map, or the module. By default the map before pooling; where
            the outputs do not depend on its positions (a class token behind the last attention), the last map that
            they do depend on.
        method: one of those above.
        size: of the maps: by default that of the feature map; ``"image"``, a side, or ``(height, width)`` to interpolate
            them bilinearly.

    Returns:
        ``[T, B, H, W]``, detached, float32, or float64 for such a model.

    Raises:
        NoSpatialFeatureError: the feature has no positions, or no feature has any on which all tasks depend.
        TaskError: tasks that do not exist.
        ModuleNotFoundInModelError: no such feature.
        ShapeError, ConfigurationError, WrongTypeError: bad arguments.

    Example:
        >>> import torch
        >>> from saliency_reg.integrations.timm import TimmMultiTaskModel, task_saliency_maps
        >>> model = TimmMultiTaskModel("test_resnet", ["smiling", "young"], image_size=64)
        >>> task_saliency_maps(model, torch.randn(4, 3, 64, 64), size="image").shape
        torch.Size([2, 4, 64, 64])
    """
    check_choice("method", method, tuple(MAP_METHODS))
    wanted = None if isinstance(size, str) else _checked_size(size)
    if isinstance(size, str) and size != "image":
        raise ConfigurationError(f"unknown size {size!r}. Pass size='image', a number, or (height, width).")
    inner = unwrapped(model, "forward_features") if isinstance(model, nn.Module) else model
    if not isinstance(inner, TimmMultiTaskModel):
        inner = timm_model(model)
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not len(images):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"images must be a floating-point tensor [B, in_chans, H, W] with B >= 1, found {found}.")
    image_size = (int(images.shape[2]), int(images.shape[3]))
    with torch.inference_mode(False), torch.enable_grad(), undisturbed(inner), _parameters_fixed(inner):
        # A copy: a tensor of inference mode can have no graph.
        images = images.detach().clone()
        chosen, scalars = _run(inner, images, tasks, feature, image_size)
        maps = _maps(chosen, scalars, image_size, MAP_METHODS[method])
    target = image_size if isinstance(size, str) else wanted
    if target is not None:
        maps = nn.functional.interpolate(maps, target, mode="bilinear", align_corners=False)
    return maps


def _run(
    model: nn.Module,
    images: Tensor,
    tasks: Sequence[Any] | None,
    feature: str | nn.Module | None,
    image_size: tuple[int, int],
) -> tuple[MapFeature, list[Tensor]]:
    """Return the feature map of a forward, and the scalars of the tasks."""
    inner, last = (
        (model.backbone.model, model.backbone.layout) if isinstance(model, TimmMultiTaskModel) else (model, None)
    )
    if feature is not None:
        name, module = find_module(model, feature, "feature")
        channels_last = isinstance(last, ChannelsLast) or str(getattr(inner, "output_fmt", "")).endswith("NHWC")
        with named_feature(module, name, lambda own: layout_of(own, inner, image_size, channels_last)) as noted:
            scalars = _scalars(model, images, tasks)
        if not noted:
            raise CaptureError(f"the feature {name!r} did not run. Choose a module that the model's forward calls.")
        if not noted[0].spatial:
            raise NoSpatialFeatureError(
                f"the feature {name!r} is {noted[0].layouts[0].describe()}. Name a module in front of the pooling, whose "
                "output still has positions."
            )
        return noted[0], scalars
    if isinstance(model, TimmMultiTaskModel):
        context = last_feature(model.backbone, "forward", model.backbone.layout, "backbone")
    else:
        with torch.no_grad():
            returned = inner.forward_features(images[:1])  # type: ignore[operator]
        context = last_feature(inner, "forward_features", find_layout(returned, inner, image_size), "forward_features")
    with context as noted:
        scalars = _scalars(model, images, tasks)
    if noted and noted[0].spatial and _reaches_positions(noted[0], scalars, image_size):
        return noted[0], scalars
    # A class token behind the last attention: the positions of this map do not count.
    with outputs_noted(inner, may_be_a_map) as seen:
        scalars = _scalars(model, images.requires_grad_(), tasks)
    layouts = [layout for each in noted for layout in each.layouts]
    layouts += [part for layout in layouts if isinstance(layout, Joined) for part in layout.parts]
    found = deepest_feature(seen, scalars, inner, {layout.channels for layout in layouts}, image_size)
    if found is None:
        raise NoSpatialFeatureError(
            f"{type(inner).__name__} has no feature map on whose positions all of these tasks depend: a head may be blind "
            "(weights of zero), or the model may mix positions in a way that is not known here. Name a map: feature='...'."
        )
    return found, scalars


def _maps(
    chosen: MapFeature,
    scalars: Sequence[Tensor],
    image_size: tuple[int, int],
    method: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    dtype = at_least_float32(chosen.tensors[0].dtype)
    activation = chosen.activation(image_size, dtype)
    maps = []
    for scalar in scalars:
        found = gradients_at(scalar, chosen.tensors)
        if all(gradient is None for gradient in found):
            raise NoSpatialFeatureError(
                f"a task does not depend on the feature {chosen.name!r}. Name a module that all tasks read."
            )
        gradients = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for gradient, tensor in zip(found, chosen.tensors)
        ]
        maps.append(method(chosen.gradient(gradients, image_size, dtype), activation))
    return torch.stack(maps).detach()


def _outputs(model: nn.Module, images: Tensor, tasks: Sequence[Any] | None) -> dict[str, Tensor]:
    """Return the outputs of the tasks that are asked for."""
    if tasks is not None and (isinstance(tasks, (str, bytes)) or not isinstance(tasks, Sequence)):
        raise WrongTypeError(f"tasks must be a list, found {tasks!r}. Pass tasks=[{tasks!r}].")
    if isinstance(model, TimmMultiTaskModel):
        names = list(model.tasks)
        for task in tasks or ():
            if task not in names:
                near = difflib.get_close_matches(str(task), names, n=3, cutoff=0.5)
                hint = f"Did you mean {', '.join(map(repr, near))}? " if near else ""
                raise TaskError(f"{task!r} is no task of this model. {hint}The tasks are {names}.")
        all_outputs = model(images)
        outputs = {str(task): all_outputs[task] for task in (names if tasks is None else tasks)}
    else:
        logits = model(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ShapeError(
                f"{type(model).__name__} must return logits [B, classes] in eval mode, found "
                f"{list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}. Use "
                "timm.create_model(name, num_classes=...), or use TimmMultiTaskModel."
            )
        columns = range(logits.shape[1])
        for task in tasks or ():
            if not isinstance(task, numbers.Integral) or isinstance(task, bool) or int(task) not in columns:
                raise TaskError(
                    f"{task!r} is no class of {type(model).__name__}, which has {len(columns)}. Pass numbers from 0 to "
                    f"{len(columns) - 1}; tasks have names in a TimmMultiTaskModel."
                )
        outputs = {str(column): logits[:, column] for column in (columns if tasks is None else tasks)}
    if not outputs:
        raise TaskError("tasks is empty. Name at least one, or leave it out for all.")
    if tasks is not None and len(outputs) < len(tasks):
        raise TaskError(f"tasks names a task twice: {list(tasks)}. Name each once.")
    return outputs


def _scalars(model: nn.Module, images: Tensor, tasks: Sequence[Any] | None) -> list[Tensor]:
    return [
        scalar_of(output, "auto", None, task=task, feature_shape=output.shape[:1], channel_axis=1)
        for task, output in _outputs(model, images, tasks).items()
    ]


def _reaches_positions(feature: MapFeature, scalars: Sequence[Tensor], image_size: tuple[int, int]) -> bool:
    """Whether all tasks depend on positions, but for those that depend on nothing at all (a dead or new head)."""
    found = (gradients_at(scalar, feature.tensors) for scalar in scalars)
    return all(feature.on_positions(gradients, image_size) or not depends(gradients) for gradients in found)


@contextlib.contextmanager
def _parameters_fixed(model: nn.Module) -> Iterator[None]:
    """Within, no parameter requires grad, so that the graph has the feature map alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    try:
        return image_size_pair(size)
    except WrongTypeError as error:
        raise WrongTypeError(f"size must be 'image', an int or (height, width), found {size!r}.") from error
