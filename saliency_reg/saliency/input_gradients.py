"""Gradients of one number per task with respect to a shared feature map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import NotConnectedError
from ..torch_tools import Edge, Gradient, added, gradients_of, without_autocast
from .pooling import Pooling

_ANOTHER = "Choose a feature that every head reads, and pass the tensor itself, not a copy or a detached one"


def input_gradients(
    scalars: Sequence[Tensor],
    features: Sequence[Sequence[Edge]],
    tasks: Sequence[str],
    pooling: Pooling,
    *,
    at_once: bool,
    create_graph: bool,
    of_map: Callable[[Gradient], Gradient] = lambda gradient: gradient,
    shared: Callable[[Sequence[Tensor]], str] = lambda _: "",
) -> Tensor:
    """Return ``[t, B, ...]``: the gradient of each scalar with respect to its features, added up and pooled.

    ``at_once`` is for scalars each of which depends on no feature but its own single one: one autograd call then
    returns all gradients. Otherwise there is one call per scalar. ``of_map`` is :meth:`FeatureMap.gradient`; ``shared``
    says what to name instead of a feature map that one does not depend on.
    """
    found: Sequence[Gradient]
    with without_autocast(scalars[0]):
        seeds = [torch.full_like(scalar, pooling.scale) for scalar in scalars]
        if at_once:
            found = _gradients(scalars, [own[0] for own in features], seeds, create_graph)
        else:
            calls = zip(scalars, features, seeds)
            found = [added(*_gradients([scalar], own, [seed], create_graph)) for scalar, own, seed in calls]
    if lost := [task for task, gradient in zip(tasks, found) if gradient is None]:
        raise NotConnectedError(
            f"the output of {lost} does not depend on the feature map. {shared(scalars) or _ANOTHER}."
        )
    return torch.stack(
        [pooling.pooled(gradient, pooling.scale) for gradient in map(of_map, found) if gradient is not None]
    )


def check_graph(scalars: Sequence[Tensor], tasks: Sequence[str], what: str) -> None:
    """Refuse a scalar without a graph; ``what`` says what it was made of."""
    for task, scalar in zip(tasks, scalars):
        if not scalar.requires_grad:
            advice = (
                "Leave the task out of losses= in a step without labels for it"
                if what == "loss"
                else "Compute it with gradients enabled, from a feature map that requires grad (feature.requires_grad_() "
                "behind a frozen backbone)"
            )
            raise NotConnectedError(f"the {what} of task {task!r} carries no graph. {advice}, and do not detach it.")


def reads_another(scalar: Tensor, own: int, features: Sequence[Edge]) -> bool:
    """Whether the scalar depends on a feature other than ``features[own]``: on one that another head reads."""
    found = _gradients([scalar], features, [torch.ones_like(scalar)], create_graph=False)
    return any(gradient is not None for place, gradient in enumerate(found) if place != own)


def _gradients(
    scalars: Sequence[Tensor], features: Sequence[Edge], seeds: Sequence[Tensor], create_graph: bool
) -> tuple[Gradient, ...]:
    try:
        return gradients_of(scalars, features, seeds, create_graph=create_graph)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise NotConnectedError(
                "a tensor of this forward was changed in place before its gradient was taken (weights, by an optimizer's "
                "step or an average put in their place). Call regularizer() between the model's forward and that change."
            ) from error
        if "backward through the graph a second time" not in str(error):
            raise
        raise NotConnectedError(
            "the graph of the outputs was freed by a backward pass. Compute the penalty first, add it to the loss, and "
            "call backward once: (loss + regularizer()).backward()."
        ) from error
