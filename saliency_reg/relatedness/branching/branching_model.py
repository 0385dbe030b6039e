"""A network whose columns are copied stage by stage, until tasks that differ share the lower stages only."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError, ModuleNotFoundInModelError, TaskError, WrongTypeError
from ...tasks import check_task_names
from ...torch_tools import is_hooked, version_of
from ..groups.checks import check_grouping
from .optimizer_copies import add_copies, checked_optimizer
from .stages import cut
from .trace import in_eval
from .tree import Columns, Tree, in_order, is_finer


class BranchingModel(nn.Module):
    """A backbone with a head per task, whose stages can be split between the tasks while it is trained.

    It begins as hard sharing: one column of stages, which all heads read. :meth:`split` copies a column of a stage, for
    tasks that shall have their own; :func:`branch` does so along an affinity, from the top stage down (Lu et al., CVPR 2017,
    arXiv 1611.05377). The function is the same before and after, bit for bit in eval mode (and in train mode, but for random
    draws such as dropout, which the copies make for themselves); of the gradient of the shared column, each copy gets the
    part of its own tasks.

    ``forward(x)`` returns ``{task: output}``.

    A state dict has the tree in it: a model that was built alike, of the unsplit backbone, loads it and has the tree
    then. Build the optimizer after that, and load its state dict last.

    ``DistributedDataParallel`` has to be built anew after each split, of ``ddp.module``, as it knows the parameters that
    were there when it was built; so has what ``torch.compile`` returned.

    With a :class:`SaliencyRegularizer`: heads that have columns of their own share no feature map. Remove it before a split,
    and attach it afterwards to the last map that all still share: ``SaliencyRegularizer(model, heads,
    feature=model.last_shared)``. (A BatchNorm in train mode between that map and a head mixes samples, which it refuses.)

    Args:
        backbone: takes one tensor and returns one, which the heads read. Its modules become those of this model, they are
            not copied.
        heads: ``{task: module}``, at least two. They share no weights with the backbone.
        example: an input of the backbone, on its device: the model is checked on it, in eval mode.
        cuts: names of the modules after which the network may split; found by itself unless given, see :func:`cut`.

    Attributes:
        tasks: their names, T of them.
        stage_names: from the input up.
        poolings_above: for each stage, how often the sides of maps are halved above it.

    Raises:
        BackboneCutError: the backbone cannot be cut, or not after these modules; with those after which it can.
        TaskError: fewer than two heads, or names that cannot be used.

    >>> import torch
    >>> from torch import nn
    >>> from saliency_reg import BranchingModel
    >>> backbone = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    >>> model = BranchingModel(backbone, {task: nn.Linear(4, 1) for task in "abc"}, torch.zeros(1, 3))
    >>> model.split("2", [["a", "b"], ["c"]])
    >>> print(model.describe())
    stage  columns    parameters
    heads  a | b | c          15
    2      a, b | c           40
    0      a, b, c            16
    total                     71
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, nn.Module] | nn.ModuleDict,
        example: Tensor,
        *,
        cuts: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(heads, (Mapping, nn.ModuleDict)):
            raise WrongTypeError(f"heads must be a mapping of task names to modules, found {type(heads).__name__}.")
        self.tasks = tuple(check_task_names(list(heads)))
        _check_heads(heads, backbone)
        stages = cut(backbone, example, cuts)
        self.stage_names = tuple(stage.name for stage in stages)
        self.poolings_above = tuple(stage.poolings_above for stage in stages)
        self.stages = nn.ModuleList(nn.ModuleList([stage.module]) for stage in stages)
        try:
            self.heads = nn.ModuleDict(dict(heads.items()))
        except KeyError as error:
            raise TaskError(f"a task cannot have this name: {error.args[0]}. Choose another one.") from error
        self._partitions: list[Columns] = [[[*range(len(self.tasks))]] for _ in stages]
        self.tree = Tree(self.tasks, self.stage_names)
        self.tree.to(example.device)
        self._check_heads_read_only(example)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features, below = [x], [[*range(len(self.tasks))]]
        for columns, partition in zip(self._columns(), self._partitions):
            features = [column(features[_place(tasks[0], below)]) for column, tasks in zip(columns, partition)]
            below = partition
        return {task: self.heads[task](features[_place(number, below)]) for number, task in enumerate(self.tasks)}

    @property
    def partitions(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The tasks of each column, for each stage from the input up."""
        return tuple(
            tuple(tuple(self.tasks[task] for task in column) for column in partition) for partition in self._partitions
        )

    @property
    def last_shared(self) -> str | None:
        """The name of the last column that all tasks share; ``None`` if the first stage is split."""
        shared = [number for number, partition in enumerate(self._partitions) if len(partition) == 1]
        return f"stages.{shared[-1]}.0" if shared else None

    def split(self, stage: str | int, partition: Iterable[Collection[str]], *, optimizer: Any = None) -> None:
        """Give the groups of a partition columns of their own at a stage: copies of the column that they are on.

        One group keeps the column itself. Weights and buffers are copied; so is the state of the optimizer, and the new
        parameters join the group of the old ones, with its learning rate as it is now. Gradients of the
        column (``.grad``) are dropped, as they are those of all its tasks.

        Args:
            stage: its name, or its number from the input up.
            partition: groups of task names, each task in one. Tasks in different columns at this stage may not be in
                one group, and tasks in one column at the stage above may not be in two.
            optimizer: the one that trains the model, or a wrapper around it. Without, build a new one: the one that you
                have does not know the copies. Its groups keep to the order of ``model.parameters()`` if they do now.

        Raises:
            TaskError: the groups do not have each task once.
            ConfigurationError: the stage cannot be split that way; a regularizer reads it; an optimizer of another model,
                or one that does not keep its state by parameter. The model is as it was.
            ModuleNotFoundInModelError: there is no such stage.
        """
        number = self.number_of(stage)
        place = {task: index for index, task in enumerate(self.tasks)}
        groups = in_order([[place[task] for task in group] for group in check_grouping(partition, self.tasks)])
        self._check_split(number, groups)
        old = list(zip(self._partitions[number], self._columns()[number]))
        inner = None if optimizer is None else checked_optimizer(optimizer, [*self.named_parameters()])
        # A feature map without a name is what the heads are called with: the hooks are on them alone.
        of_heads = any(map(is_hooked, self.heads.modules())) and not any(map(is_hooked, self.stages.modules()))
        if of_heads or any(is_hooked(part) for _, column in old for part in column.modules()):
            raise ConfigurationError(
                f"a regularizer or a surgery reads what {self.stage_names[number]!r} makes, which tasks would no longer "
                "share. Call its remove(), split, and attach it again: feature=model.last_shared."
            )
        columns, sources, kept = [], [], set[int]()
        for group in groups:
            source = next(column for tasks, column in old if group[0] in tasks)
            columns.append(copy.deepcopy(source) if id(source) in kept else source)
            sources.append(source)
            kept.add(id(source))
        before = [*self.named_parameters()]
        self.stages[number] = nn.ModuleList(columns)
        self._partitions[number] = groups
        self.tree.write(self._partitions)
        copies: dict[nn.Parameter, list[nn.Parameter]] = {}
        for column, source in zip(columns, sources):
            for parameter, original in zip(column.parameters(), source.parameters()):
                if parameter is not original:
                    copies.setdefault(original, []).append(parameter)
                    original.grad = None
        if inner is not None:
            add_copies(inner, copies, before, [*self.named_parameters()])

    def number_of(self, stage: str | int) -> int:
        """Return the number of a stage, from the input up."""
        names = self.stage_names
        if isinstance(stage, str) and stage in names:
            return names.index(stage)
        if isinstance(stage, int) and not isinstance(stage, bool) and 0 <= stage < len(names):
            return stage
        raise ModuleNotFoundInModelError(
            f"there is no stage {stage!r}. Pass one of {list(names)}, or its number from 0 to {len(names) - 1}."
        )

    def describe(self) -> str:
        """Return the tree as a table: the columns of each stage by their tasks, the top first, and their parameters."""
        rows = [("stage", "columns", "parameters")]
        rows.append(("heads", " | ".join(self.tasks), f"{_count(self.heads):,}"))
        for number in reversed(range(len(self.stage_names))):
            columns = " | ".join(", ".join(tasks) for tasks in self.partitions[number])
            rows.append((self.stage_names[number], columns, f"{_count(self.stages[number]):,}"))
        rows.append(("total", "", f"{_count(self):,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)

    def _columns(self) -> list[list[nn.Module]]:
        return [list(columns.children()) for columns in self.stages]

    def _check_split(self, number: int, groups: Columns) -> None:
        name, own = self.stage_names[number], self.partitions[number]
        if not is_finer(groups, than=self._partitions[number]):
            raise ConfigurationError(
                f"the columns of {name!r} have the tasks {own}; a split cannot join them again. Pass groups within these."
            )
        top = number + 1 == len(self.stage_names)
        if not top and not is_finer(self._partitions[number + 1], than=groups):
            raise ConfigurationError(
                f"the columns of {self.stage_names[number + 1]!r}, above {name!r}, have the tasks "
                f"{self.partitions[number + 1]}, and each can stand on one column only. Pass groups of whole columns, or "
                "split that stage first."
            )

    def _check_heads_read_only(self, example: Tensor) -> None:
        with in_eval(self), torch.no_grad():
            feature = example
            for columns in self._columns():
                feature = columns[0](feature)
            for task, head in self.heads.items():
                version = version_of(feature)
                head(feature)
                if version_of(feature) != version:
                    raise ConfigurationError(
                        f"the head of {task!r} changes its input in place (inplace=True?), which other heads read. Make it "
                        "work on a copy: inplace=False."
                    )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.tree.check_loaded(state_dict, f"{prefix}tree.")
        partitions = self.tree.saved_in(state_dict, f"{prefix}tree.")
        if partitions is not None:
            for number, (columns, partition) in enumerate(zip(self._columns(), partitions)):
                new = [copy.deepcopy(columns[0]) for _ in partition[len(columns) :]]
                self.stages[number] = nn.ModuleList([*columns, *new][: len(partition)])
            self._partitions = partitions
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_heads(heads: Mapping[str, nn.Module] | nn.ModuleDict, backbone: nn.Module) -> None:
    if not isinstance(backbone, nn.Module):
        raise WrongTypeError(f"backbone must be an nn.Module, found {type(backbone).__name__}.")
    shared = {id(parameter) for parameter in backbone.parameters()}
    for task, head in heads.items():
        if not isinstance(head, nn.Module):
            raise WrongTypeError(f"the head of {task!r} must be an nn.Module, found {type(head).__name__}.")
        if any(id(parameter) in shared for parameter in head.parameters()):
            raise ConfigurationError(
                f"the head of {task!r} has weights of the backbone, which copies of a stage would not share. Give it its "
                "own; of a backbone with a classifier pass the part before it (timm: num_classes=0)."
            )


def _place(task: int, partition: Columns) -> int:
    """Return the number of the column that has the task."""
    return next(number for number, tasks in enumerate(partition) if task in tasks)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
