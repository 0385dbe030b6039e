"""The slow way: one sample, one task, one pair at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def scalar(output: Tensor) -> Tensor:
    """Of one sample's output: the logit, the difference of two, or the largest minus the mean logit."""
    if output.numel() == 2:
        return output[0, 1] - output[0, 0]
    return output.squeeze() if output.numel() == 1 else output.max() - output.mean()


def gradients(
    feature_of: Callable[[Tensor], Tensor], tasks: Sequence[Callable[[Tensor], Tensor]], images: Tensor
) -> list[list[tuple[Tensor, Tensor]]]:
    """``[task][sample]``: gradient and feature, ``[...]`` each."""
    found: list[list[tuple[Tensor, Tensor]]] = []
    for task in tasks:
        found.append([])
        for image in images:
            feature = feature_of(image[None]).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(scalar(task(feature)), feature)
            found[-1].append((gradient[0], feature[0].detach()))
    return found


def penalty(
    feature_of: Callable[[Tensor], Tensor],
    tasks: Sequence[Callable[[Tensor], Tensor]],
    images: Tensor,
    positions: tuple[int, ...],
) -> float:
    """Sum over pairs of the mean over samples of the l1 distance of the saliencies, summed over positions."""
    found = gradients(feature_of, tasks, images)
    total = 0.0
    for first in range(len(tasks)):
        for second in range(first + 1, len(tasks)):
            for (one, _), (other, _) in zip(found[first], found[second]):
                total += float((one.sum(positions) - other.sum(positions)).abs().sum()) / len(images)
    return total


def heads_on_map(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """From the map before pooling to each task's output, also where the model pools once for all heads."""
    return [lambda feature, head=head: head(model.pooling(feature)) for head in model.heads.values()]
