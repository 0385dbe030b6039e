"""What MMoE and PLE are made of: experts, and gates that mix them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...runtime.errors import OptionError

#: No expert is narrower than this, unless the feature is.
_NARROWEST = 32


class Expert(nn.Sequential):
    """One layer with a ReLU, from ``[B, width]`` to ``[B, outputs]``.

    Every expert draws weights of its own: equal ones would stay equal. They are those of He et al. (ICCV 2015), by which
    the signal keeps its size; with torch's, it shrinks in every layer, and PLE takes longer to begin to learn.
    """

    def __init__(self, width: int, outputs: int) -> None:
        layer = nn.Linear(width, outputs)
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        super().__init__(layer, nn.ReLU())


class Gate(nn.Linear):
    """The weights of n experts for each sample, ``softmax(x W)``: from ``[B, width]`` to ``[B, n]``, rows of sum 1.

    Linear, without a bias, as in both papers. At first all experts have the weight ``1 / n``.
    """

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).softmax(dim=1)


def mixed(experts: Tensor, weights: Tensor) -> Tensor:
    """Sums of experts ``[B, n, D]`` with the weights of a gate ``[B, n]``: ``[B, D]``."""
    return torch.einsum("bnd,bn->bd", experts, weights)


def mean_gates(gates: Tensor) -> Tensor:
    """``[T, n]``: what each expert counts for each task, from the gates ``[B, T, n]`` of a batch."""
    return gates.mean(0)


def gate_entropy(gates: Tensor) -> Tensor:
    """``[T]``, from 0 (one expert is read) to 1 (all count the same): mean entropy of gates ``[B, T, n]`` over ``log n``.

    1 for a single expert.
    """
    if gates.shape[2] == 1:
        return gates.new_ones(gates.shape[1])
    entropy: Tensor = torch.special.entr(gates).sum(2).mean(0)
    return entropy / math.log(gates.shape[2])


def width_of_experts(chosen: int | None, width: int, experts: int) -> int:
    """What was chosen; or by default all experts of a layer together are as wide as the feature, but none is very narrow.

    Our choice: the papers have experts of 4 to 256 units for data of their own.

    Raises:
        OptionError: it is not a whole number from 1 on.
    """
    if chosen is None:
        return max(width // experts, min(width, _NARROWEST))
    return whole("expert_width", chosen, least=1)


def whole(name: str, value: int, least: int) -> int:
    """Return the number.

    Raises:
        OptionError: it is not whole, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} must be a whole number from {least} on; found {value!r}.")
    return value
