"""Surgery at the feature map, written down as plainly as possible: one gradient after the other, then one combination."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .slow import slow_distances, slow_penalty
from .slow_surgery import conflicting_pairs


@dataclass
class Expected:
    gradients: dict[str, Tensor | None]
    task_gradients: list[Tensor]
    conflicts: int


def slow_step(
    model: nn.Module,
    inputs: Tensor,
    losses_of: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    combine: Callable[[Sequence[Tensor]], Tensor],
    strength: float = 0.0,
    bypass: Callable[[Tensor], Tensor] | None = None,
) -> Expected:
    """Gradients of all parameters: ``combine`` turns the task gradients at the feature map into one.

    The penalty is that of ``l1`` distances with uniform weights, between scalar outputs.
    """
    feature = model.feature_map(inputs)
    outputs = model.from_feature(feature)
    losses = losses_of(outputs)
    task_gradients = [
        torch.autograd.grad(loss, feature, retain_graph=True)[0] for loss in losses.values() if loss is not None
    ]
    at_feature = combine(task_gradients)
    total = sum(loss for loss in losses.values() if loss is not None)
    other = torch.zeros((), dtype=inputs.dtype)
    if strength > 0:
        saliencies = []
        for output in outputs.values():
            (saliency,) = torch.autograd.grad(output.sum(), feature, create_graph=True)
            # Tokens have their channels last.
            saliencies.append(
                saliency.sum(1) if feature.ndim == 3 else saliency.flatten(2).sum(2) if feature.ndim > 3 else saliency
            )
        distances = slow_distances([list(saliency) for saliency in saliencies], "l1", "mean")
        tasks = len(saliencies)
        weights = torch.ones_like(distances) / (tasks * (tasks - 1) / 2)
        other = strength * slow_penalty(distances, weights)
    if bypass is not None:
        other = other + bypass(feature)
    if other.requires_grad:
        (extra,) = torch.autograd.grad(other, feature, retain_graph=True, allow_unused=True)
        at_feature = at_feature if extra is None else at_feature + extra
    behind, gradients = {}, {}
    for name, parameter in model.named_parameters():
        (gradients[name],) = torch.autograd.grad(total + other, parameter, retain_graph=True, allow_unused=True)
    for name, parameter in model.named_parameters():
        (behind[name],) = torch.autograd.grad(feature, parameter, at_feature, retain_graph=True, allow_unused=True)
    gradients.update({name: gradient for name, gradient in behind.items() if gradient is not None})
    return Expected(gradients, task_gradients, conflicting_pairs(task_gradients))
