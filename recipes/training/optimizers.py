"""Optimizers of recipes: what the weight decay, which methods tune, acts on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..models.architectures.registry import parameter_groups

#: From a model to an optimizer, from a learning rate and a weight decay.
MakeOptimizer = Callable[[nn.Module, float, float], torch.optim.Optimizer]


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW on all parameters alike, but for those that mix networks or experts."""
    return torch.optim.AdamW(parameter_groups(model, learning_rate, weight_decay), lr=learning_rate, foreach=True)


def adamw_on_heads(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """The same with weight decay on the parameters of ``heads`` or ``towers`` alone; on all of a model without them."""
    heads: nn.Module = getattr(model, "heads", getattr(model, "towers", model))
    decayed = set(map(id, heads.parameters()))
    first, *mixing = parameter_groups(model, learning_rate, weight_decay)
    others = {**first, "params": [own for own in first["params"] if id(own) not in decayed], "weight_decay": 0.0}
    first["params"] = [own for own in first["params"] if id(own) in decayed]
    groups = [group for group in (first, others, *mixing) if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, foreach=True)


#: By what is decayed.
OPTIMIZERS: dict[str, MakeOptimizer] = {"all": adamw, "heads": adamw_on_heads}
