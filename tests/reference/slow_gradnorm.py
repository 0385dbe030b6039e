"""GradNorm written down as plainly as possible: task gradients one after the other, and autograd on the task weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn


def objective(log_weights: Tensor, lengths: Sequence[float], rates: Sequence[float], asymmetry: float) -> Tensor:
    """``sum_t |G_t - M r_t^a|`` with a constant target, as a function of the logarithms of the weights."""
    own = [torch.exp(log_weight) * length for log_weight, length in zip(log_weights, lengths)]
    mean = float(np.mean([one.item() for one in own]))
    mean_rate = float(np.mean(rates))
    return sum(abs(one - mean * (rate / mean_rate) ** asymmetry) for one, rate in zip(own, rates))


class SlowGradNorm:
    """Task weights as plain floats, ``None`` for a task without a loss in a step."""

    def __init__(self, tasks: int, asymmetry: float, learning_rate: float) -> None:
        self.weights = [1.0] * tasks
        self.initial: list[float | None] = [None] * tasks
        self.asymmetry, self.learning_rate = asymmetry, learning_rate

    def step(self, lengths: Sequence[float | None], losses: Sequence[float | None]) -> None:
        present = [task for task, length in enumerate(lengths) if length is not None]
        for task in present:
            if self.initial[task] is None:
                self.initial[task] = losses[task]
        logs = torch.tensor([np.log(self.weights[task]) for task in present], dtype=torch.float64, requires_grad=True)
        rates = [losses[task] / self.initial[task] for task in present]
        value = objective(logs, [lengths[task] for task in present], rates, self.asymmetry)
        (gradient,) = torch.autograd.grad(value, logs)
        before = sum(self.weights[task] for task in present)
        moved = np.exp(logs.detach().numpy() - self.learning_rate * np.sign(gradient.numpy()))
        for task, one in zip(present, moved):
            self.weights[task] = float(one * before / moved.sum())


def slow_gradients(
    model: nn.Module,
    inputs: Tensor,
    losses_of: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    weights: Mapping[str, float],
) -> tuple[dict[str, Tensor | None], dict[str, float], dict[str, float]]:
    """Gradients of all parameters, lengths of the task gradients at the feature map, and losses; of the tasks with one."""
    feature = model.feature_map(inputs)
    losses = losses_of(model.from_feature(feature))
    own = {task: torch.autograd.grad(loss, feature, retain_graph=True)[0] for task, loss in losses.items()}
    shared = sum(weights[task] * gradient for task, gradient in own.items())
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        (behind,) = torch.autograd.grad(feature, parameter, shared, retain_graph=True, allow_unused=True)
        if behind is None:
            (behind,) = torch.autograd.grad(sum(losses.values()), parameter, retain_graph=True, allow_unused=True)
        gradients[name] = behind
    lengths = {task: float(gradient.square().sum().sqrt()) for task, gradient in own.items()}
    return gradients, lengths, {task: loss.item() for task, loss in losses.items()}
