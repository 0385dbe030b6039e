"""Relations and pictures for tests of drawings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer

np: Any = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

NAN = float("nan")


def random_weights(count: int, seed: int = 0) -> Tensor:
    weights = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (weights + weights.T).fill_diagonal_(0.0)


def tick_labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def trained() -> SaliencyRegularizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    regularizer = SaliencyRegularizer(model, heads="2", tasks=["left", "middle", "right"], strength=0.1, metric="l1")
    model(torch.randn(6, 5))
    regularizer()
    regularizer.step()
    return regularizer
