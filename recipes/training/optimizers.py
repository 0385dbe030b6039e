"""Optimizers of recipes: what the weight decay, which methods tune, acts on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

#: From a model to an optimizer, from a learning rate and a weight decay.
MakeOptimizer = Callable[[nn.Module, float, float], torch.optim.Optimizer]


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW on all parameters alike."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, foreach=True)


def adamw_on_heads(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW whose weight decay acts on the parameters of ``heads`` alone; on all of a model that has none."""
    heads = getattr(model, "heads", model)
    decayed = list(heads.parameters())
    known = set(map(id, decayed))
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, foreach=True)


#: By what is decayed.
OPTIMIZERS: dict[str, MakeOptimizer] = {"all": adamw, "heads": adamw_on_heads}
