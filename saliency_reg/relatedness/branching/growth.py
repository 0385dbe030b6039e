"""Top-down growth along an affinity: one stage per round (Lu et al., CVPR 2017, arXiv 1611.05377)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...distributed import Ranks
from ...errors import ConfigurationError, TaskError, WrongTypeError
from ...tasks import check_task_names
from ...torch_tools import non_negative_number, whole_number
from ..groups import branch_affinity, choose_partition
from ..groups.checks import check_affinity, square
from .branching_model import BranchingModel


@dataclass(frozen=True)
class BranchingRound:
    """What one round of :func:`branch` did.

    Attributes:
        stage: the name of the stage that was looked at.
        columns: the tasks of each of its columns, as they are now.
        split: whether it was split in this round.
        over: whether the growth has come to its end: the stage stays shared by all, or is the first one.
    """

    stage: str
    columns: tuple[tuple[str, ...], ...]
    split: bool
    over: bool


def branch(
    model: BranchingModel,
    affinity: Tensor,
    *,
    tasks: Sequence[str] | None = None,
    optimizer: Any = None,
    branch_cost: float | Sequence[float] = 1 / 64,
    separation_weight: float = 2.0,
    largest: int | None = None,
    seed: int = 0,
    process_group: Any = None,
) -> BranchingRound:
    """Grow a model by one round: split the highest stage that all tasks share, where that is worth its cost.

    The branches that stand on the stage (of the top stage: the heads) are grouped so that ``(d - 1) branch_cost 2^p +
    separation_weight L_s`` is least, over spectral clusterings into each number d of groups: ``p`` poolings lie above the
    stage, ``L_s`` is how far the branches of a group are from each other (:func:`branch_affinity`, :func:`separation_cost`).
    Each group gets a column of its own (:meth:`BranchingModel.split`). If one group is cheapest, the growth is over.

    Train between the rounds, 1,000 steps or more in the paper, and estimate an affinity that comes from the training
    anew; on held-out samples if the model fits those of the training, where all tasks are equally easy. Unlike the public
    code, which builds a new solver each round, the optimizer keeps its momentum and its schedule. The default weight is that
    of the paper for CelebA; it tried 0 to 4. Affinities from other sources have other scales, on which the number of columns
    depends.

    In several processes all call it; they compare what they chose before anything changes. ``DistributedDataParallel`` has
    to be built anew after a split, of the same model.

    Args:
        model: not wrapped: pass ``ddp.module``.
        affinity: ``[T, T]``, symmetric, in [0, 1], larger for tasks that are closer. Any view of their relations can be made
            one.
        tasks: names of the rows of ``affinity``, if they are not in the order of ``model.tasks``.
        optimizer: the one that trains the model; see :meth:`BranchingModel.split`.
        branch_cost: of one more column, ``L0`` of the paper, times ``2^p``; or one for each stage, from the input up, as
            they are.
        separation_weight: ``alpha`` of the paper, 0 or more; larger for more columns.
        largest: most columns at a stage; no limit unless given. In the paper, as many as fill the network that was thinned.
        seed: of the clustering.
        process_group: whose processes compare what they chose; all of them unless given, ``"local"`` for none.

    Returns:
        What was done; ``.over`` when nothing is left to do.

    Raises:
        TaskError: the affinity is not of the tasks of the model.
        ShapeError, NonFiniteError, ConfigurationError: it is not ``[T, T]``, has NaN, is not symmetric or out of range; or
            the processes chose differently. The model is as it was.
        WrongTypeError: the model is not a :class:`BranchingModel`.

    >>> import torch
    >>> from torch import nn
    >>> from saliency_reg import BranchingModel, branch
    >>> backbone = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    >>> model = BranchingModel(backbone, {task: nn.Linear(4, 1) for task in "abc"}, torch.zeros(1, 3))
    >>> affinity = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.1], [0.1, 0.1, 1.0]])
    >>> branch(model, affinity, branch_cost=1 / 4)
    BranchingRound(stage='2', columns=(('a', 'b'), ('c',)), split=True, over=False)
    """
    if not isinstance(model, BranchingModel):
        raise WrongTypeError(
            f"branch needs a BranchingModel, found {type(model).__name__}. Of a wrapped one pass the model inside "
            "(.module of DistributedDataParallel, ._orig_mod of torch.compile), and wrap it again afterwards."
        )
    ranks = Ranks(process_group)
    try:
        chosen = _choice(model, affinity, tasks, branch_cost, separation_weight, largest, seed)
    except Exception:
        ranks.of_all(None)  # the others wait for this process
        raise
    everywhere = ranks.of_all(chosen)
    if any(other != chosen for other in everywhere):
        listed = ", ".join(
            f"{'an error' if one is None else one[1]} on rank {rank}" for rank, one in enumerate(everywhere)
        )
        raise ConfigurationError(
            f"the processes chose different columns: {listed} (tasks by number). Give all of them one affinity "
            "(all-reduce or broadcast it), the same settings and the same model; nothing was split."
        )
    number, groups = chosen
    split = len(groups) > len(model.partitions[number])
    if split:
        model.split(number, [[model.tasks[task] for task in group] for group in groups], optimizer=optimizer)
    return BranchingRound(model.stage_names[number], model.partitions[number], split, number == 0 or not split)


def _choice(
    model: BranchingModel,
    affinity: Tensor,
    tasks: Sequence[str] | None,
    branch_cost: float | Sequence[float],
    separation_weight: float,
    largest: int | None,
    seed: int,
) -> tuple[int, list[list[int]]]:
    """Return the number of the stage, and the tasks of the columns that it shall have."""
    matrix = _of_model(affinity, tasks, model.tasks)
    costs = _costs(branch_cost, model)
    weight = non_negative_number("separation_weight", separation_weight)
    most = len(model.tasks) if largest is None else whole_number("largest", largest, least=1)
    whole_number("seed", seed)
    shared = [number for number, columns in enumerate(model.partitions) if len(columns) == 1]
    place = {task: number for number, task in enumerate(model.tasks)}
    if not shared:  # to the bottom
        return 0, [[place[task] for task in column] for column in model.partitions[0]]
    number = shared[-1]
    above = model.partitions[number + 1] if number + 1 < len(model.partitions) else [[task] for task in model.tasks]
    branches = [[place[task] for task in column] for column in above]
    groups = choose_partition(
        branch_affinity(matrix, branches),
        branch_cost=costs[number],
        separation_weight=weight,
        largest=most,
        seed=seed,
    )
    return number, [sorted(task for one in group for task in branches[one]) for group in groups]


def _of_model(affinity: Tensor, tasks: Sequence[str] | None, own: Sequence[str]) -> Tensor:
    """Return the affinity in the order of the tasks of the model, as float64 on the CPU."""
    matrix = square(affinity, "affinity")
    names = list(own) if tasks is None else check_task_names(tasks)
    if set(names) != set(own):
        raise TaskError(f"tasks are {names}, but those of the model are {list(own)}. Pass the rows of just these.")
    if len(matrix) != len(own):
        raise TaskError(
            f"affinity is of {len(matrix)} tasks, but the model has the {len(own)} tasks {list(own)}. Pass the rows and "
            "columns of just these."
        )
    order = [names.index(task) for task in own]
    return check_affinity(matrix, names)[order][:, order]


def _costs(branch_cost: float | Sequence[float], model: BranchingModel) -> list[float]:
    """Return what one more column costs at each stage."""
    if not isinstance(branch_cost, Sequence):
        cost = non_negative_number("branch_cost", branch_cost)
        return [cost * 2**poolings for poolings in model.poolings_above]
    if len(branch_cost) != len(model.stage_names):
        raise ConfigurationError(
            f"branch_cost has {len(branch_cost)} numbers for the {len(model.stage_names)} stages {list(model.stage_names)}. "
            "Pass one for each, from the input up, or a single number."
        )
    return [non_negative_number("branch_cost", cost) for cost in branch_cost]
