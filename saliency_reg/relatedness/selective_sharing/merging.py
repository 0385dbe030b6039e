"""Changing model and optimizer: estimators replaced, parameters discarded, gradients divided."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError
from .estimators import Estimator


class _Divide:
    """A hook on a parameter that divides its gradient. It stays there as long as the parameter does.

    Copies of the parameter do not have it, as torch leaves such hooks behind.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient / self.size


def divide_gradients(estimator: Estimator, size: int) -> None:
    """Divide gradients of the estimator by the number of tasks that share it, from now on."""
    for _, parameter in estimator.named_parameters():
        if not parameter.requires_grad:
            continue
        hooks: Iterable[Any] = (cast("Any", parameter)._backward_hooks or {}).values()
        if known := [hook for hook in hooks if isinstance(hook, _Divide)]:
            known[0].size = size
        elif size > 1:
            cast("Any", parameter).register_hook(_Divide(size))


def merge(
    model: nn.Module,
    estimators: Sequence[Estimator],
    survivors: Sequence[int],
    optimizer: torch.optim.Optimizer | None,
) -> list[Estimator]:
    """Let each task use the estimator of its survivor, and discard the others; what is asked must be possible.

    Args:
        model, optimizer: where they are replaced, and discarded.
        estimators: of each task.
        survivors: of each task, the number of the task whose estimator it gets.

    Returns:
        The estimator of each task.
    """
    for old, survivor in zip(estimators, survivors):
        if old is not estimators[survivor]:
            _replace(model, old, estimators[survivor])
    left = {id(parameter) for parameter in model.parameters()}
    every = (parameter for estimator in estimators for _, parameter in estimator.named_parameters())
    if optimizer is not None:
        _discard(optimizer, [parameter for parameter in every if id(parameter) not in left])
    return [estimators[survivor] for survivor in survivors]


def _replace(model: nn.Module, old: Estimator, new: Estimator) -> None:
    """Put the parts of one estimator wherever the model has those of another."""
    instead = dict(zip(map(id, old.parts), new.parts))
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in instead:
                module._modules[name] = instead[id(child)]


def _discard(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of an optimizer, with their state. Groups stay, also empty ones: schedulers count them."""
    gone = {id(parameter): parameter for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)
        parameter.grad = None


def check_holds(optimizer: torch.optim.Optimizer, estimators: Sequence[Estimator]) -> None:
    """Raise an error unless the optimizer has all parameters that are trained."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for estimator in estimators:
        for name, parameter in estimator.named_parameters():
            if parameter.requires_grad and id(parameter) not in held:
                raise ConfigurationError(
                    f"the optimizer does not have {name!r} of the estimator {estimator.name!r}. Pass the one that trains "
                    "the estimators, built from the parameters that the model has now."
                )


@torch.no_grad()
def copy_from_first(estimators: Sequence[Estimator], optimizer: torch.optim.Optimizer | None) -> None:
    """Give all estimators of the tasks the weights of the first, before any training."""
    own = {id(estimator): estimator for estimator in estimators}
    if len(own) < len(estimators):
        raise ConfigurationError(
            "tasks share estimators already, so that these were trained, and same_start=True would overwrite them. Leave it "
            "out."
        )
    trained = [
        each.name
        for each in estimators
        if optimizer is not None and any(optimizer.state.get(parameter) for _, parameter in each.named_parameters())
    ]
    if trained:
        raise ConfigurationError(
            f"the optimizer has trained the estimators already (it has state of {trained[0]!r}), and same_start=True would "
            "overwrite them. Leave it out, with compare='inputs', which does not need it."
        )
    first = [tensor for _, tensor in estimators[0].tensors()]
    for other in estimators[1:]:
        for (_, tensor), source in zip(other.tensors(), first):
            cast("Tensor", tensor).copy_(cast("Tensor", source))
