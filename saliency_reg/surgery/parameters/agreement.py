"""What all processes have to know alike before surgery on parameters: the tasks, and which losses reach which parameters.

Nothing is decided by one process alone: it would raise, or take part in a collective, while the others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...distributed import Ranks
from ...errors import SurgeryError, TaskError
from .losses import LossBatch
from .shared_parameters import members


@dataclass(frozen=True)
class Agreed:
    """One call's losses here, and what they reach in all processes together.

    Attributes:
        batch: what this process brought.
        reach: parameter to the bit mask of the tasks whose losses depend on it on some process.
        reach_of_penalty: parameters that the penalty depends on, on some process.
        present: bit mask of the tasks that have a loss on some process.
    """

    batch: LossBatch
    reach: dict[Tensor, int]
    reach_of_penalty: set[Tensor]
    present: int


def agree_on_names(find: Callable[[], list[str]], given: bool, ranks: Ranks) -> list[str]:
    """The names of all processes, in the order of the processes; if they were ``given``, they have to be the same.

    Raises:
        SurgeryError: another process found none.
        TaskError: different names were given.
    """
    if ranks.size == 1:
        return find()
    ranks.prepare()
    failure: Exception | None = None
    names: list[str] | None = None
    try:
        names = find()
    except Exception as error:
        failure = error
    all_names = ranks.of_all(names)
    if failure is not None:
        raise failure
    if any(found is None for found in all_names):
        raise _other_refused()
    if given and any(found != names for found in all_names):
        raise TaskError(f"the processes have different tasks: {all_names}. Build surgery with one list on all of them.")
    return list(dict.fromkeys(name for found in all_names for name in found))


def agree(look: Callable[[], LossBatch], parameters: Sequence[Tensor], num_tasks: int, ranks: Ranks) -> Agreed:
    """Add up over the processes what ``look`` finds in each, or raise in all of them if it raises in one.

    Args:
        look: checks the losses and walks through their graphs.
        parameters: those of the model, in the order of the model.
        num_tasks: T.
        ranks: the processes.

    Raises:
        SurgeryError: ``look`` raised in another process.
    """
    if ranks.size == 1:
        batch = look()
        own = set(parameters)
        reach = {leaf: mask for leaf, mask in batch.reach.items() if leaf in own}
        return Agreed(batch, reach, own.intersection(batch.reach_of_penalty), sum(1 << task for task in batch.losses))
    failure: Exception | None = None
    here: LossBatch | None = None
    # A row for each parameter and one for the losses themselves; a column for each task, one for the penalty or an error.
    marks: list[tuple[int, int]] = []
    try:
        here = look()
        number = {parameter: index for index, parameter in enumerate(parameters)}
        marks += [(number[leaf], task) for leaf, mask in here.reach.items() for task in members(mask)]
        marks += [(number[leaf], num_tasks) for leaf in here.reach_of_penalty]
        marks += [(len(parameters), task) for task in here.losses]
    except Exception as error:
        failure = error
        marks = [(len(parameters), num_tasks)]
    table = torch.zeros(len(parameters) + 1, num_tasks + 1, dtype=torch.int32)
    if marks:
        table[tuple(torch.tensor(marks).T)] = 1
    table = ranks.add(table.to(parameters[0].device)).cpu() > 0
    if failure is not None:
        raise failure
    if here is None or bool(table[-1, -1]):
        raise _other_refused()
    masks = [sum(1 << task for task in range(num_tasks) if row[task]) for row in table.tolist()]
    reached = {parameter: mask for parameter, mask in zip(parameters, masks) if mask}
    by_penalty = {parameter for parameter, marked in zip(parameters, table[:-1, -1].tolist()) if marked}
    return Agreed(here, reached, by_penalty, masks[-1])


def _other_refused() -> SurgeryError:
    return SurgeryError(
        "another process refused its losses, so that no process takes part. Look at the errors of the other processes."
    )
