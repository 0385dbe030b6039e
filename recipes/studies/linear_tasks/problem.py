"""The paper's synthetic problem: twelve linear tasks that are multiples of one weight vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEATURES = 20
#: The weights of task t are its factor times a common vector.
FACTORS = (1.0, 1.0, 2.0, 2.0, 3.0, 3.0, -1.0, -1.0, -2.0, -2.0, -3.0, -3.0)
TASKS = tuple(f"{factor:+.0f}{'ab'[index % 2]}" for index, factor in enumerate(FACTORS))
#: The common vector: all ones, as in the paper, or drawn from a standard normal distribution for each seed.
BASES = ("ones", "normal")


@dataclass(frozen=True)
class Regression:
    """Inputs ``[T, N, FEATURES]`` and targets ``[T, N]``, each task with its own samples; float64."""

    inputs: Tensor
    targets: Tensor

    def rmse(self, weights: Tensor) -> Tensor:
        """Root mean squared error of each task, ``[..., T]``, for weights ``[..., T, FEATURES]``, in their precision."""
        inputs, targets = self.inputs.to(weights.dtype), self.targets.to(weights.dtype)
        predictions = torch.matmul(inputs, weights.unsqueeze(-1)).squeeze(-1)
        return (predictions - targets).square().mean(-1).sqrt()


@dataclass(frozen=True)
class SyntheticData:
    """One draw of the problem; ``weights`` are the true ones, ``[T, FEATURES]``."""

    weights: Tensor
    train: Regression
    validation: Regression
    test: Regression


@dataclass(frozen=True)
class Problem:
    """How data are drawn: ``y = w_t . x`` plus noise, with inputs around 0.5 of unit variance."""

    train: int = 10
    validation: int = 40
    test: int = 200
    noise: float = 0.01
    shared_inputs: bool = False
    """All tasks have the same training inputs. Validation and test inputs are each task's own all the same."""
    weights: str = "ones"

    def draw(self, seed: int) -> SyntheticData:
        """The data of a seed; the validation and test sets are the same with shared and with own inputs."""
        generator = torch.Generator().manual_seed(seed)
        vector = torch.ones(FEATURES, dtype=torch.float64)
        if self.weights == "normal":
            # Its own generator: the inputs are those of the other base.
            vector = _normal(torch.Generator().manual_seed(seed + 1_000_000), FEATURES)
        weights = torch.tensor(FACTORS, dtype=torch.float64).outer(vector)

        def part(count: int, shared: bool) -> Regression:
            inputs = _normal(generator, len(FACTORS), count, FEATURES) + 0.5
            if shared:
                inputs = inputs[:1].expand_as(inputs).contiguous()
            noise = self.noise * _normal(generator, len(FACTORS), count)
            return Regression(inputs, torch.einsum("tnf,tf->tn", inputs, weights) + noise)

        train = part(self.train, self.shared_inputs)
        return SyntheticData(weights, train, part(self.validation, False), part(self.test, False))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
