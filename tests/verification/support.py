"""A small net for tests of ``verify``: they put defects in the place of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import VerificationReport, verify

TASKS = ("a", "b", "c")


def head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))


class Net(nn.Module):
    """A small net; tests put defects in the place of its parts, behind the backbone, or before a head."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] = lambda feature: feature,
        before: Callable[[str, Tensor], Tensor] = lambda task, feature: feature,
    ) -> None:
        super().__init__()
        self.between, self.before = between, before
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Sigmoid())
        self.heads = nn.ModuleDict({task: head() for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.between(self.backbone(x))
        return {task: head(self.before(task, feature)) for task, head in self.heads.items()}


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def losses(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: (output - 3 * place).square().mean() for place, (task, output) in enumerate(outputs.items())}


def report_of(model: nn.Module, batch: Any = X, **options: Any) -> VerificationReport:
    return verify(
        model, batch, **{"losses": losses, "show": False, "heads": "heads", "strength": 10.0, "metric": "l1", **options}
    )


def with_part(part: nn.Module, task: str = "b") -> Net:
    """A net with a part within one head."""
    model = Net()
    model.heads[task].insert(1, part)
    return model


def failed(report: VerificationReport) -> list[str]:
    return [check.name for check in report.failed]


class Dropping(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.append(nn.Dropout(0.3))
        for head in self.heads.values():
            head.insert(2, nn.Dropout(0.3))


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Odd(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
