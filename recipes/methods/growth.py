"""A network that is split, or tasks that are parted, along one view of the relations between them."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import (
    BranchingModel,
    RelationReport,
    RelationViews,
    SaliencyRegularizer,
    best_groups,
    branch,
    relation_report,
    task_groups,
)

from ..data.task_kinds import TaskKind
from ..runtime.errors import OptionError
from ..runtime.random_state import derived_seed
from .reshaping import Reshaping, first_phase

#: Columns of the highest stage, and groups that are trained apart, at most.
MOST_GROUPS = 3
#: Steps of the first phase, over the number of looks ahead that TAG takes; but it takes one in 10 steps at least.
_LOOKS_AHEAD, _RAREST = 50, 10
#: Of the exact search for groups.
_MOST_EXACT = 12
_KINDS = {"binary": "binary", "number": "number", "classes": "class"}


class RelationPhase(Reshaping):
    """Gathers one view of the relations; the training stays as it is, to the bit.

    Args:
        view: its key in :data:`saliency_reg.VIEWS`.
        model: with heads under ``heads_name``, by default ``"heads"``.
        tasks, kinds: T of them.
        optimizer: of the training.
        steps: for how many optimizer steps it is going to watch.
        process_group: of all processes.
    """

    def __init__(
        self,
        view: str,
        model: nn.Module,
        kinds: Mapping[str, TaskKind],
        optimizer: torch.optim.Optimizer,
        steps: int,
        process_group: Any = None,
    ) -> None:
        self.view = view
        self._tasks = tuple(kinds)
        if len(kinds) < 3:
            raise OptionError(f"found {len(kinds)} tasks, between which there is nothing to choose. Use 3 or more.")
        heads = getattr(model, "heads_name", "heads")
        of_heads = model.get_submodule(heads)
        self._regularizer = SaliencyRegularizer(
            model,
            heads=heads,
            # Those of a ModuleDict have names, in the same order.
            tasks=None if isinstance(of_heads, nn.ModuleDict) else list(kinds),
            strength=0.0,
            optimizer=optimizer,
            process_group=process_group,
        )
        self._report: RelationReport | None = relation_report(
            self._regularizer,
            kinds=[_KINDS[kind.name] for kind in kinds.values()],
            views=(view,),
            tag_every=max(1, min(_RAREST, steps // _LOOKS_AHEAD)),
            points=0,
        )

    @property
    def observes(self) -> bool:  # type: ignore[override]
        """Until the relations are known."""
        return self._report is not None

    def observe(self, labels: Tensor) -> None:
        if self._report is not None:
            self._regularizer()  # its distances are one of the views; its penalty is 0
            self._report.update(labels)

    def after_epoch(self, epoch: int) -> bool:
        del epoch
        return False

    def groups(self, permuted: int | None = None) -> tuple[tuple[str, ...], ...]:
        """At most :data:`MOST_GROUPS` groups that have each task once, by what tasks gain from each other.

        The best ones by TAG's objective up to 12 tasks, and by spectral clustering above.

        Args:
            permuted: a seed by which the tasks change their places: groups of the same sizes that mean nothing.
        """
        views = self._views()
        if len(self._tasks) > _MOST_EXACT:
            found = task_groups(views.affinity(self.view, fill=0.5), self._tasks, MOST_GROUPS)
        else:
            gains = views[self.view].clone()
            off = ~torch.eye(len(gains), dtype=torch.bool)
            gains[gains.isnan()] = gains[off & ~gains.isnan()].mean()
            found = best_groups(gains, self._tasks, groups=MOST_GROUPS, overlap=False).groups
        if permuted is None:
            return found
        places = _permutation(len(self._tasks), permuted).tolist()
        other = {task: self._tasks[place] for task, place in zip(self._tasks, places)}
        return tuple(tuple(other[task] for task in group) for group in found)

    def affinity(self, permuted: int | None = None) -> Tensor:
        """``[T, T]``, the rank of each pair: 0 for the last and 1 for the closest; 0.5 of one of which nothing is known.

        Views have scales of their own, on which it would depend into how many columns a network is split. Their ranks have
        one scale, so that views differ in who is close alone.

        Args:
            permuted: a seed by which the tasks change their places: the same tree, of tasks that have no more in common.
        """
        ranks = self._views().consensus(fill=0.5)
        if permuted is None:
            return ranks
        places = _permutation(len(ranks), permuted)
        return ranks[places][:, places]

    def state_dict(self) -> dict[str, Any]:
        return {} if self._report is None else {"report": dict(self._report.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._report is not None and "report" in state:
            self._report.load_state_dict(state["report"])

    def remove(self) -> None:
        if self._report is not None:
            self._report.remove()
        self._regularizer.remove()
        self._report = None

    def _views(self) -> RelationViews:
        if self._report is None:
            raise OptionError("the relations are gathered no longer. Ask for them before.")
        views = self._report.views()
        if bool(views.pair_values().isnan().all()):
            raise OptionError(
                f"the view {self.view!r} knows nothing of any two tasks in these data: labels of two tasks are never those "
                "of one sample. Choose another view, or data in which they are."
            )
        values = views.pair_values()
        if len(values[~values.isnan()].unique()) == 1:
            raise OptionError(
                f"the view {self.view!r} says the same of all pairs of tasks in these data: gradients of labels that are "
                "never those of one sample do not meet. Choose another view, or data in which they do."
            )
        return views


class Growth(RelationPhase):
    """Lu et al.: watches hard sharing for the first quarter of the epochs, and then splits it from the top stage down.

    A stage in each round, with training between, until half of the epochs are over. With L stages the top one gets three
    columns at most, and so linearly down to one at the bottom, which is never split: so networks of all views are about as
    large and fast. The affinity is that of the first quarter in all rounds, where Lu et al. estimate it anew. Weights,
    momentum and learning rate go on.

    Args:
        model: not yet split.
        epochs: of the whole training.
        permuted: a seed, for the control of the same tree with other tasks.
    """

    def __init__(
        self,
        view: str,
        model: nn.Module,
        kinds: Mapping[str, TaskKind],
        optimizer: torch.optim.Optimizer,
        steps: int,
        process_group: Any = None,
        *,
        epochs: int,
        permuted: int | None,
    ) -> None:
        if not isinstance(model, BranchingModel):
            raise OptionError(f"a {type(model).__name__} cannot be split. Use the architecture 'branching'.")
        super().__init__(view, model, kinds, optimizer, steps, process_group)
        self._model, self._optimizer, self._group = model, optimizer, process_group
        self._permuted = permuted
        self._affinity: Tensor | None = None
        self._columns = most_columns(len(model.stage_names))
        self._epochs = round_epochs(epochs, len(self._columns))
        self._rounds = 0

    def after_epoch(self, epoch: int) -> bool:
        changed = False
        while self._rounds < len(self._epochs) and self._epochs[self._rounds] <= epoch:
            if self._affinity is None:
                self._affinity = self.affinity(self._permuted)
                self.remove()
            done = branch(
                self._model,
                self._affinity,
                optimizer=self._optimizer,
                largest=self._columns[self._rounds],
                process_group=self._group,
            )
            changed |= done.split
            self._rounds = len(self._epochs) if done.over else self._rounds + 1
        return changed

    def state_dict(self) -> dict[str, Any]:
        columns = [[list(tasks) for tasks in stage] for stage in self._model.partitions]
        return {**super().state_dict(), "affinity": self._affinity, "rounds": self._rounds, "columns": columns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._affinity, self._rounds = state["affinity"], state["rounds"]
        if self._affinity is not None:
            self.remove()
        for stage in reversed(range(len(state["columns"]))):
            if len(state["columns"][stage]) > len(self._model.partitions[stage]):
                self._model.split(stage, state["columns"][stage], optimizer=self._optimizer)


def most_columns(stages: int) -> list[int]:
    """Of each stage that is split, the top one first.

    >>> most_columns(2), most_columns(4), most_columns(5)
    ([3], [3, 2, 2], [3, 3, 2, 2])
    """
    below = stages - 1
    return [max(2, math.floor(MOST_GROUPS - (MOST_GROUPS - 1) * place / below + 0.5)) for place in range(below)]


def round_epochs(epochs: int, rounds: int) -> list[int]:
    """After which epochs a stage is split: from a quarter of them on, and until half of them are over.

    >>> round_epochs(30, 2), round_epochs(2, 3)
    ([8, 12], [1, 1, 1])
    """
    first_phase(epochs)
    return [-(-epochs * (rounds + place) // (4 * rounds)) for place in range(rounds)]


def permutation_seed(seed: int) -> int:
    """Of the control with permuted tasks, in a training of this seed."""
    return derived_seed("permuted tasks", seed)


def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))
