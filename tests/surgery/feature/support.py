"""Losses, weightings and models of the tests of surgery at the feature map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saliency_reg import PCGrad
from tests.reference.slow_fork import Expected
from tests.reference.slow_surgery import textbook_pcgrad
from tests.support.zoo import TASKS, build

LOSS_WEIGHTS = dict(zip(TASKS, (1.0, 0.3, 2.5)))


def losses_of(outputs: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for task, output in outputs.items():
        target = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        losses[task] = LOSS_WEIGHTS[task] * (output - target).square().mean()
    return losses


def pcgrad(gradients: list[Tensor], call: int = 0) -> Tensor:
    return textbook_pcgrad(gradients, PCGrad().order(len(gradients), call))


def named_outputs(output: object) -> dict[str, Tensor]:
    return output if isinstance(output, dict) else dict(zip(TASKS, output.unbind(1)))


def assert_gradients(model: nn.Module, expected: Expected, tolerance: float = 1e-10) -> None:
    for name, parameter in model.named_parameters():
        wanted = expected.gradients[name]
        if wanted is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted, rtol=tolerance, atol=tolerance, msg=name)


def with_heads(make: object, seed: int = 1) -> tuple[nn.Module, Tensor]:
    entry = build("tanh heads", seed)
    torch.manual_seed(seed)
    entry.model.heads = nn.ModuleDict({task: make() for task in TASKS}).double()
    return entry.model, entry.inputs
