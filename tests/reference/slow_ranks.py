"""Several processes written down as one: the mean of the processes' losses, and the penalty on their joined batch.

Loops over processes, samples, tasks and pairs; no collective, no scaling of anybody's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .slow import slow_distance

Losses = Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]]


@dataclass
class Share:
    """What one process has of a micro-batch; ``ran`` are the tasks whose heads it runs."""

    inputs: Tensor
    targets: Tensor
    ran: Sequence[str]


@dataclass
class Joined:
    """Gradients of the parameters, and ``[T, T]`` distances and samples of the joined batch."""

    gradients: dict[str, Tensor]
    distances: Tensor
    samples: Tensor


def slow_joined_step(
    model: nn.Module,
    tasks: Sequence[str],
    shares: Sequence[Share],
    losses_of: Losses,
    weights: Tensor,
    strength: float,
    *,
    metric: str = "l1",
    reduction: str = "mean",
    combine: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Joined:
    """One micro-batch. ``combine``: the surgery, from the task gradients at all features together to one gradient."""
    size = len(tasks)
    features, saliencies, losses = [], [], dict.fromkeys(tasks, torch.zeros((), dtype=weights.dtype))
    for share in shares:
        feature = model.feature_map(share.inputs)
        features.append(feature)
        outputs = {task: output for task, output in model.from_feature(feature).items() if task in share.ran}
        for task, loss in losses_of(outputs, share.targets).items():
            losses[task] = losses[task] + loss / len(shares)
        own = {}
        for task, output in outputs.items():
            rows = []
            for sample in range(len(share.inputs)):
                (gradient,) = torch.autograd.grad(output[sample].sum(), feature, create_graph=True)
                rows.append(gradient[sample])
            own[task] = rows
        saliencies.append(own)
    distances = torch.zeros(size, size, dtype=weights.dtype)
    samples = torch.zeros(size, size, dtype=weights.dtype)
    penalty = torch.zeros((), dtype=weights.dtype)
    for i, first in enumerate(tasks):
        samples[i, i] = sum(len(own[first]) for own in saliencies if first in own)
        for j in range(i + 1, size):
            second = tasks[j]
            parts = [
                slow_distance(x, y, metric)
                for own in saliencies
                if first in own and second in own
                for x, y in zip(own[first], own[second])
            ]
            if not parts:
                continue
            total = sum(parts[1:], start=parts[0])
            distance = total / len(parts) if reduction == "mean" else total
            penalty = penalty + strength * weights[i, j] * distance
            distances[i, j] = distances[j, i] = distance.detach()
            samples[i, j] = samples[j, i] = len(parts)
    parameters = dict(model.named_parameters())
    task_loss = sum(losses.values())
    found = _gradients(task_loss + penalty, parameters.values())
    if combine is not None:
        # Behind the features other gradients arrive; the heads keep theirs.
        at_features = combine([torch.cat(_gradients(loss, features)) for loss in losses.values() if loss.requires_grad])
        of_penalty = torch.cat(_gradients(penalty, features))
        behind = torch.autograd.grad(
            torch.cat(features),
            list(parameters.values()),
            at_features + of_penalty,
            retain_graph=True,
            allow_unused=True,
        )
        found = [own if other is None else other for own, other in zip(found, behind)]
    return Joined(dict(zip(parameters, found)), distances, samples)


def _gradients(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    inputs = list(inputs)
    found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True) if value.requires_grad else [None]
    found = list(found) if len(found) == len(inputs) else [None] * len(inputs)
    return [torch.zeros_like(own) if gradient is None else gradient for own, gradient in zip(inputs, found)]
