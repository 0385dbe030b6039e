"""What all processes have to know alike before surgery on parameters: the tasks, and which losses reach which parameters.

Nothing is decided by one process alone: it would raise, or join a collective, while the others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...distributed import Ranks
from ...errors import SurgeryError, TaskError
from ...tasks import names_of
from .losses import NOT_ADDED_UP, LossBatch
from .shared_parameters import members


@dataclass(frozen=True)
class Agreed:
    """The losses of one call here, and what they reach in all processes together."""

    batch: LossBatch
    reach: dict[Tensor, int]  # parameter to the bit mask of the tasks whose losses depend on it on some process
    reach_of_penalty: set[Tensor]  # parameters that the penalty depends on, on some process
    present: int  # bit mask of the tasks that have a loss on some process


def agree_on_names(known: Sequence[str] | None, losses: Any, ranks: Ranks) -> list[str]:
    """Return the tasks ``known``, or those of the losses of all processes; raise in all if these differ, or one raises."""
    try:
        names = names_of(losses, "losses", NOT_ADDED_UP) if known is None else list(known)
    except Exception:
        ranks.of_all(None)
        raise
    all_names = ranks.of_all(names)
    if any(found is None for found in all_names):
        raise _other_refused()
    if known is not None and any(found != names for found in all_names):
        raise TaskError(f"the processes have different tasks: {all_names}. Build surgery with one list on all of them.")
    return names if ranks.size == 1 else list(dict.fromkeys(name for found in all_names for name in found))


def agree(look: Callable[[], LossBatch], parameters: Sequence[Tensor], num_tasks: int, ranks: Ranks) -> Agreed:
    """Add up over the processes what ``look`` finds in each, or raise in all of them if it raises in one.

    ``parameters`` are those of the model, in one order on all processes.
    """
    if ranks.size == 1:
        batch = look()
        own = set(parameters)
        reach = {leaf: mask for leaf, mask in batch.reach.items() if leaf in own}
        return Agreed(batch, reach, own.intersection(batch.reach_of_penalty), sum(1 << task for task in batch.losses))
    # A row for each parameter and one for the losses themselves; a column for each task, one for the penalty or an error.
    table = torch.zeros(len(parameters) + 1, num_tasks + 1, dtype=torch.int32)
    device = parameters[0].device
    try:
        batch = look()
    except Exception:
        table[-1, -1] = 1
        ranks.add(table.to(device))
        raise
    number = {parameter: index for index, parameter in enumerate(parameters)}
    marks = [(number[leaf], task) for leaf, mask in batch.reach.items() for task in members(mask)]
    marks += [(number[leaf], num_tasks) for leaf in batch.reach_of_penalty]
    marks += [(len(parameters), task) for task in batch.losses]
    if marks:
        table[tuple(torch.tensor(marks).T)] = 1
    table = ranks.add(table.to(device)).cpu() > 0
    if bool(table[-1, -1]):
        raise _other_refused()
    masks = [sum(1 << task for task in range(num_tasks) if row[task]) for row in table.tolist()]
    reached = {parameter: mask for parameter, mask in zip(parameters, masks) if mask}
    by_penalty = {parameter for parameter, marked in zip(parameters, table[:-1, -1].tolist()) if marked}
    return Agreed(batch, reached, by_penalty, masks[-1])


def _other_refused() -> SurgeryError:
    return SurgeryError(
        "another process refused its losses, so that no process takes part. Look at the errors of the other processes."
    )
