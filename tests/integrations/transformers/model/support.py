"""Regularizers of multi-task models, and what is compared of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saliency_reg import SaliencyRegularizer
from tests.support.attachment import uniform

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def regularizer_of(model: Any, **options: Any) -> SaliencyRegularizer:
    return model.regularizer(**{"metric": "l1", "strength": 1.0, "relations": uniform(len(model.tasks)), **options})


def real(model: Any, logits: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With zeros at padding."""
    gone = inputs["attention_mask"] == 0
    found = {}
    for task, own in logits.items():
        if model.head_configs[task].level == "token":
            own = own.masked_fill(gone if own.ndim == 2 else gone[..., None], 0)
        found[task] = own
    return found


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
