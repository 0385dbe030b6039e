"""Sharing along groups that are known."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from ...capture import HeadsChoice
from .estimators import EstimatorsChoice
from .selective_sharing import SelectiveSharing


def share_estimators(
    model: nn.Module,
    groups: Iterable[Collection[str]],
    heads: HeadsChoice = None,
    *,
    tasks: Sequence[str] | None = None,
    estimators: EstimatorsChoice = None,
    optimizer: Any = None,
) -> SelectiveSharing:
    """Let the tasks of each group share one estimator: the last step of :class:`SelectiveSharing`, for groups of your own.

    The estimator of the first task of each group survives, with what the optimizer knows of it; gradients are divided by the
    number of its tasks. Parameters of the others leave the optimizer; without one, build it afterwards.

    Args:
        model, heads, tasks, estimators, optimizer: as in :class:`SelectiveSharing`.
        groups: of task names, each task in one.

    Returns:
        What holds the grouping: save its state dict, and load it before those of model and optimizer.

    Raises:
        SaliencyRegError: as :class:`SelectiveSharing` and its :meth:`~SelectiveSharing.share`. The model is as it was.

    Example:
        >>> heads = {task: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)) for task in ("young", "old", "hat")}
        >>> model = nn.ModuleDict({"heads": nn.ModuleDict(heads)})
        >>> sharing = share_estimators(model, [["young", "old"], ["hat"]], heads="heads")
        >>> sum(parameter.numel() for parameter in model.parameters())
        71
    """
    sharing = SelectiveSharing(model, heads, tasks=tasks, estimators=estimators, optimizer=optimizer)
    try:
        sharing.share(groups)
    except BaseException:
        sharing.remove()
        raise
    return sharing
