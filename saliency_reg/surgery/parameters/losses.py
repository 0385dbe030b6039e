"""The losses of one call of surgery on parameters: checked, and what they depend on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import ConfigurationError, NotConnectedError, ShapeError, WrongTypeError
from ...tasks import Losses, names_of, per_task
from ...torch_tools import leaves_behind, leaves_behind_each
from .shared_parameters import refuse_node, refuse_sharded

NOT_ADDED_UP = "Surgery needs the loss of each task by itself: do not add them up."


@dataclass(frozen=True)
class LossBatch:
    """The checked losses of one call, and what they depend on in this process."""

    losses: Mapping[int, Tensor]  # task index to 0-dim loss
    penalties: Sequence[Tensor]  # added without projection: one with a graph, or none
    reach: Mapping[Tensor, int]  # leaf to the bit mask of the tasks whose losses depend on it
    reach_of_penalty: Sequence[Tensor]  # the leaves behind the penalty


def checked_losses(
    losses: Losses, penalty: Any, tasks: Sequence[str], parameters: Collection[Tensor], distributed: bool
) -> LossBatch:
    """Check the losses of a call, and find what they depend on; raise as ``ParameterSurgery.backward`` says."""
    names_of(losses, "losses", NOT_ADDED_UP)
    found = per_task(
        {str(name): loss for name, loss in losses.items()} if isinstance(losses, Mapping) else losses,
        tasks,
        "losses",
        "They were given as tasks= or taken from the first call. If tasks can be missing from a batch, name all of them in "
        "tasks=[...].",
    )
    for task, loss in found.items():
        _check_scalar(loss, f"the loss of task {tasks[task]!r}")
        if not loss.requires_grad:
            raise NotConnectedError(
                f"the loss of task {tasks[task]!r} carries no graph, so that it has no gradient. Compute it outside of "
                "no_grad, from the model's outputs and without .item() or .detach(); leave a task without labels in this "
                "batch out of the mapping."
            )
    penalties: list[Tensor] = []
    if penalty is not None and not isinstance(penalty, (int, float)):  # a number has no gradient
        _check_scalar(penalty, "the penalty")
        penalties = [penalty] if penalty.requires_grad else []
    reach = leaves_behind_each(found, refuse_node)
    of_penalty = leaves_behind(penalties)
    refuse_sharded([*reach, *of_penalty])
    if distributed and (outside := [leaf for leaf in (*reach, *of_penalty) if leaf not in parameters]):
        raise ConfigurationError(
            f"the losses depend on a leaf tensor of shape {list(outside[0].shape)} that is not among the parameters of the "
            "model. In a distributed run its gradient could not be averaged. Pass ParameterSurgery(nn.ModuleList([model, "
            "...])) with the module it belongs to (learned loss weights), or detach it."
        )
    return LossBatch(found, penalties, reach, of_penalty)


def _check_scalar(loss: Any, what: str) -> None:
    if not isinstance(loss, Tensor):
        raise WrongTypeError(f"{what} must be a 0-dim tensor with its graph, found {type(loss).__name__}.")
    if loss.ndim > 0:
        raise ShapeError(
            f"{what} has the shape {list(loss.shape)}, expected a 0-dim tensor. Use .mean() or .sum() over the batch."
        )
