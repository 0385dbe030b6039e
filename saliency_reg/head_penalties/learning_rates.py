"""The learning rates with which an optimizer moves some weights now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .head_weights import Weight


def groups_of(optimizer: torch.optim.Optimizer, weights: Sequence[Weight]) -> list[dict[str, Any]]:
    """Return the parameter group of each weight that requires grad.

    Raises:
        ConfigurationError: the optimizer does not have it.
    """
    trained = {id(own): weight.name for weight in weights if (own := weight.parameter()).requires_grad}
    groups = {id(own): group for group in optimizer.param_groups for own in group["params"] if id(own) in trained}
    if missing := [name for key, name in trained.items() if key not in groups]:
        raise ConfigurationError(
            f"the optimizer does not have {missing[0]!r}, which is penalised. Pass the one that trains the heads, built "
            "from the parameters that the model has now."
        )
    return [groups[key] for key in trained]


def rates_of(optimizer: torch.optim.Optimizer, weights: Sequence[Weight], *, one: bool) -> list[float | Tensor]:
    """Return the rate of each weight that requires grad; ``one``: they have to be the same.

    Raises:
        ConfigurationError: a weight is not in the optimizer, or a rate is not a number, or they differ.
    """
    groups = groups_of(optimizer, weights)
    rates: list[Any] = [group.get("lr") for group in groups]
    if any(not isinstance(rate, (int, float, Tensor)) for rate in rates):
        raise ConfigurationError(
            f"{type(optimizer).__name__} has no learning rate for the heads (found {rates}), which the threshold is made "
            "of. Use an optimizer with a number as lr."
        )
    several = one and any(group is not groups[0] for group in groups)
    if several and len(found := {float(rate) for rate in rates}) > 1:  # not in every step: it waits for a device
        raise ConfigurationError(
            f"kind='l21' has one threshold for all heads, but their learning rates are {sorted(found)}. Put their first "
            "layers into groups with one learning rate, or use kind='lasso'."
        )
    return rates
