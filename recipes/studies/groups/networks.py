"""Networks for rows of groups, ``[T, b, D]`` with as many rows of each: what the groups share differs."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GroupNetwork(nn.Module):
    """Predicts every row for every group."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions ``[T, b]`` of rows ``[T, b, D]``, each for its own group."""
        everything: Tensor = self.for_all_groups(inputs.flatten(0, 1))
        own: Tensor = everything.view(*inputs.shape[:2], -1).diagonal(dim1=0, dim2=2).T
        return own

    def for_all_groups(self, inputs: Tensor) -> Tensor:
        """Predictions ``[M, T]`` of rows ``[M, D]``, for each of the groups."""
        raise NotImplementedError


class ColumnPerGroup(GroupNetwork):
    """One hidden layer that all groups share, and a column of one linear layer for each (hard sharing)."""

    def __init__(self, inputs: int, groups: int, width: int) -> None:
        super().__init__()
        self.backbone = _hidden(inputs, width)
        self.heads = nn.Linear(width, groups)

    def for_all_groups(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.heads(self.backbone(inputs))
        return outputs


class PooledWithIntercepts(GroupNetwork):
    """The same with one column for all groups, and an intercept for each."""

    def __init__(self, inputs: int, groups: int, width: int) -> None:
        super().__init__()
        self.backbone = _hidden(inputs, width)
        self.heads = nn.ParameterDict({"column": nn.Linear(width, 1).weight, "intercepts": torch.zeros(groups)})

    def for_all_groups(self, inputs: Tensor) -> Tensor:
        everything: Tensor = self.backbone(inputs) @ self.heads["column"].T + self.heads["intercepts"]
        return everything


class NetworkPerGroup(GroupNetwork):
    """A network of the same shape for each group: nothing is shared."""

    def __init__(self, inputs: int, groups: int, width: int) -> None:
        super().__init__()
        # As nn.Linear draws them.
        self.first = nn.Parameter(_uniform(groups, inputs, width) / math.sqrt(inputs))
        self.offset = nn.Parameter(_uniform(groups, 1, width) / math.sqrt(inputs))
        self.last = nn.Parameter(_uniform(groups, width, 1) / math.sqrt(width))
        self.intercepts = nn.Parameter(_uniform(groups, 1, 1) / math.sqrt(width))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = nn.functional.gelu(inputs @ self.first + self.offset)
        return (hidden @ self.last + self.intercepts).squeeze(-1)

    def for_all_groups(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self(inputs.expand(len(self.first), -1, -1))
        return outputs.T


def _hidden(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU())


def _uniform(*shape: int) -> Tensor:
    return torch.empty(*shape).uniform_(-1, 1)
