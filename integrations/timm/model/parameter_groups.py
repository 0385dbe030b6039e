"""Parameter groups for an optimizer: slower backbone, slower first layers, no weight decay where timm has none."""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import nn

from ....errors import ConfigurationError, TaskError, WrongTypeError
from ...shared.head_options import check_number
from ...shared.looking import unwrapped
from ..backbone.layer_groups import layer_of_parameters
from .model import TimmMultiTaskModel


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    *,
    backbone_rate_factor: float = 1.0,
    layer_decay: float | None = None,
    task: str | None = None,
) -> list[dict[str, Any]]:
    """Groups for any ``torch.optim`` optimizer, of the parameters that are not frozen.

    Args:
        model: the multi-task model, alone or inside of ``DistributedDataParallel`` or ``torch.compile``.
        learning_rate: of the heads.
        weight_decay: of matrices. Parameters with one axis (biases, norms) and those that the timm model names in
            ``no_weight_decay()`` have none.
        backbone_rate_factor: the backbone's learning rate as a share of that of the heads.
        layer_decay: factor between the learning rates of neighbouring layers of the backbone, as timm groups them: below
            1, the first layers are the slowest. As ``timm.optim.param_groups_layer_decay`` with the heads as classifier.
        task: those of its head alone, for ``optimizer.add_param_group`` after ``model.add_task``.

    Returns:
        Dictionaries with ``params``, ``lr``, ``weight_decay`` and ``name``; none of them is empty.

    Raises:
        WrongTypeError: no :class:`TimmMultiTaskModel`, or no number.
        ConfigurationError: a number out of range, or nothing to train.
        TaskError: the model has no such task.

    Example:
        >>> import torch
        >>> from saliency_reg.integrations.timm import TimmMultiTaskModel, parameter_groups
        >>> model = TimmMultiTaskModel("test_vit", {"smiling": 1, "young": 1}, image_size=32)
        >>> groups = parameter_groups(model, 1e-3, 0.05, backbone_rate_factor=0.1, layer_decay=0.75)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> groups[-1]["name"], groups[-1]["lr"]
        ('heads, no weight decay', 0.001)
    """
    inner = unwrapped(model, "backbone") if isinstance(model, nn.Module) else model
    if not isinstance(inner, TimmMultiTaskModel):
        raise WrongTypeError(
            f"model must be a TimmMultiTaskModel, found {type(model).__name__}. For a timm model use "
            "timm.optim.param_groups_layer_decay(model)."
        )
    check_number("learning_rate", learning_rate, above_zero=True)
    check_number("weight_decay", weight_decay)
    check_number("backbone_rate_factor", backbone_rate_factor)
    if layer_decay is not None:
        check_number("layer_decay", layer_decay, above_zero=True)
    if task is not None and task not in inner.tasks:
        raise TaskError(
            f"the model has no task {task!r}, but {list(inner.tasks)}. Call model.add_task({task!r}, ...) before."
        )
    backbone = inner.backbone.model
    layers = layer_of_parameters(backbone)
    idle = inner.backbone.idle
    heads_layer = 1 + max((layer for name, layer in layers.items() if name not in idle), default=-1)
    without_decay = getattr(backbone, "no_weight_decay", None)
    patterns = set(without_decay()) if callable(without_decay) else set()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}

    def add(parameter: nn.Parameter, layer: int, decays: bool) -> None:
        if not parameter.requires_grad:
            return
        is_head = layer == heads_layer
        rate = learning_rate
        if not is_head:
            rate *= backbone_rate_factor * (1.0 if layer_decay is None else layer_decay ** (heads_layer - layer))
            layer = layer if layer_decay is not None else 0
        label = "heads" if is_head else "backbone" + ("" if layer_decay is None else f" layer {layer}")
        new = {
            "params": [],
            "lr": rate,
            "weight_decay": weight_decay if decays else 0.0,
            "name": label + ("" if decays else ", no weight decay"),
        }
        groups.setdefault((layer, decays), new)["params"].append(parameter)

    for name, parameter in backbone.named_parameters() if task is None else ():
        excluded = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        add(parameter, layers[name], parameter.ndim > 1 and not excluded)
    for parameter in (inner.heads if task is None else inner.heads[task]).parameters():
        add(parameter, heads_layer, parameter.ndim > 1)
    if not groups:
        raise ConfigurationError("all parameters are frozen. Call model.unfreeze_backbone(), or train the heads.")
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]
