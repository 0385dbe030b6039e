"""Selective Sharing by our reading: who shares an estimator is found in the gradients of a training."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...capture import HeadsChoice
from ...distributed import Ranks
from ...errors import CaptureError, ConfigurationError, NonFiniteError, StateMismatchError
from ...tasks import first_few
from ...torch_tools import (
    Removable,
    StateModule,
    StepHook,
    check_choice,
    names_from_bytes,
    names_to_bytes,
    non_negative_number,
    positive_number,
    unwrap_optimizer,
)
from ..groups import check_grouping
from .clusters import DIRECTIVES, clusters_below, medoid, spread_out
from .estimator_gradients import EstimatorGradients
from .estimators import Estimator, EstimatorsChoice, find_estimators
from .factors import GRAMIANS
from .grouping import Grouping, check_can_become, check_not_parted, named_groups, survivors_in
from .merging import check_holds, copy_from_first, divide_gradients, merge


@dataclass
class _Attachment:
    model: nn.Module
    estimators: list[Estimator]  # of each task; one object for those that share
    optimizer: torch.optim.Optimizer | None = None


class SelectiveSharing(StateModule, Removable):
    r"""Selective sharing (our reading): tasks whose gradients are alike come to share an estimator, not outputs.

    After Strezoski, van Noord and Worring, *Learning Task Relatedness in Multi-Task Learning for Images in Context*,
    ICMR 2019 (arXiv 1904.03011). Each head is an estimator ``h_t``, built alike for all tasks, and an output layer ``o_t``.

    1. After each optimizer step the gradient of the first weight ``[E, D]`` of each estimator is added to ``g_t``. An
       estimator that is not shared has gradients of its own task alone.
    2. Tasks are compared by ``M_t = g_t' g_t`` ``[D, D]``, the directions from which they draw (``compare="inputs"``), or by
       ``M_t = g_t`` (``"gradients"``). The thin SVD of the rows ``M_t / |M_t|`` gives task factors ``F = U_r diag(s_r)``
       ``[T, r]``, with ``r`` the smallest rank that keeps 90 % of the energy; they are made from the ``[T, T]`` Gramian.
    3. Average linkage on ``1 - cos(F_i, F_j)``, cut at ``theta``, gives clusters. With the directive ``similarity`` they
       are the groups; with ``variance`` there are as many groups, which hold members of different clusters.
    4. One estimator of each group survives, its medoid, with the state that the optimizer has of it; the others are
       discarded, in the optimizer, too.
    5. All of this can be repeated, on the survivors.

    The paper's own are the design: estimators that differ in their outputs only, accumulated gradients that are factorised,
    factors that are clustered, one estimator per cluster, a directive fixed before training. Its code was never released.
    Open there, and chosen here: what is factorised, how and to which rank, the clustering and ``theta``, how many steps are
    accumulated and how often, that groups are never parted again, what ``variance`` computes, and who survives.

    The gradient of a shared estimator, a sum over its tasks, is divided by their number, in a hook on its parameters: steps
    of SGD do not grow, and the survivor's momentum and second moments keep their scale. (Dividing the learning rate
    instead would make the steps of Adam too small, which do not depend on that scale.)

    ``"gradients"`` needs hidden units that correspond: estimators (``same_start``) *and* output layers that began alike.
    Where only output layers differ, their random signs are those of the gradients, so that not even tasks with the same
    labels are found; tasks with opposite labels never are. ``"inputs"`` depends on neither, whatever the numbers of outputs.

    Merging changes at once the outputs of all tasks but the survivor's, whose output layers were made for another
    estimator; less so with ``same_start``. Merge early, or train the output layers alone for a few steps.

    Of many tasks that have nothing in common, the 10 % that are dropped can hold what tells some of them apart:
    ``energy=1.0`` drops nothing. Gradients count as they are when the optimizer steps: unscaled, clipped, accumulated.

    In several processes all have to call :meth:`similarity`, :meth:`groups` and :meth:`share` together; gradients are added
    up over them, and all decide alike. Build ``DistributedDataParallel`` anew after each merge: it waits for gradients of
    the parameters that it was built with, and says so one step later. So do with other objects on the estimators' weights
    (:class:`HeadPenalty`).

    To go on from a checkpoint, build model, optimizer and this anew; load this first, which rebuilds the model and takes
    the discarded parameters out of the optimizer; then these two.

    Args:
        model: the model itself, not a wrapper.
        heads, tasks: as in :class:`SaliencyRegularizer`, one head for each task. Of a ``Sequential`` the estimator is all
            that is in front of its last layer; of a list of modules, all but the last.
        estimators: where heads are built otherwise: the name of the estimator within each head, or ``{task: name or
            module}``, without ``heads``.
        optimizer: the one that trains the estimators. Without one no gradients are gathered, and none is rid of what is
            discarded: then build it after :meth:`share`.
        same_start: give all estimators the weights of the first, now; for models that were not trained yet.
        compare: ``"inputs"`` or ``"gradients"``.
        energy: the share of the energy that the factors keep, in ``(0, 1]``.
        process_group: the processes that train together, by default all.

    Attributes:
        tasks: T names.
        survivors: ``[T]`` int64, the number of the task whose estimator each task uses.
        gathered: gradients of this window, which begins with :meth:`share`: ``gathered.gradients`` ``[T, E, D]``, float64,
            the sums ``g_t`` at the survivors, zeros elsewhere; ``gathered.batches`` ``[T]`` int64, the steps in which that
            gradient was not zero (those with labels of the task); ``gathered.steps``, 0-dim, the optimizer steps.

    Raises:
        ConfigurationError: a head without an estimator, or one of which it cannot be seen; a wrapped or sharded model;
            frozen weights; an optimizer that lacks some; ``same_start`` of trained estimators; an option out of range.
        ShapeError: estimators that are not built alike.
        TaskError: estimators that overlap, or do not match the tasks.
        SaliencyRegError: another of its kinds, for arguments that cannot work. The model is as it was.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.ModuleDict({"backbone": nn.Linear(8, 6), "heads": nn.ModuleDict()})
        >>> for task in ("young", "old", "hat"):
        ...     model["heads"][task] = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
        >>> for _ in range(20):
        ...     x = torch.randn(32, 8)
        ...     labels = {"young": x[:, :1], "old": x[:, :1], "hat": x[:, 1:2]}
        ...     outputs = {task: head(model["backbone"](x)) for task, head in model["heads"].items()}
        ...     optimizer.zero_grad()
        ...     sum((outputs[task] - labels[task]).square().mean() for task in labels).backward()
        ...     optimizer.step()
        >>> groups = sharing.groups(theta=0.3)
        >>> sharing.share(groups)
        (('young', 'old'), ('hat',))
        >>> model["heads"]["old"][0] is model["heads"]["young"][0]
        True
    """

    survivors: Tensor
    built_for: Tensor

    # A copy is not attached: model and optimizer belong to the original.
    in_a_copy: ClassVar[dict[str, Any]] = {"_attachment": None, "_step_hook": None}

    def __init__(
        self,
        model: nn.Module,
        heads: HeadsChoice = None,
        *,
        tasks: Sequence[str] | None = None,
        estimators: EstimatorsChoice = None,
        optimizer: Any = None,
        same_start: bool = False,
        compare: str = "inputs",
        energy: float = 0.9,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.energy = positive_number("energy", energy)
        if self.energy > 1:
            raise ConfigurationError(f"energy is a share, in (0, 1], found {energy}.")
        check_choice("compare", compare, tuple(GRAMIANS))
        self.compare = compare
        found = find_estimators(model, heads, tasks, estimators)
        self.tasks = tuple(found)
        own = list(found.values())
        self._ranks = Ranks(process_group)
        self._survivors = [own.index(estimator) for estimator in own]
        self._attachment: _Attachment | None = _Attachment(model, own)
        self._step_hook: StepHook | None = None
        self.gathered = EstimatorGradients(len(own), own[0].weight)
        self.register_buffer("survivors", torch.tensor(self._survivors, device=self.gathered.steps.device))
        self.register_buffer("built_for", names_to_bytes(self.tasks))
        inner = None if optimizer is None else unwrap_optimizer(optimizer)
        if inner is not None:
            check_holds(inner, own)
        if same_start:
            copy_from_first(own, inner)
        if inner is not None:
            self.attach_optimizer(inner)
        self._divide()

    def attach_optimizer(self, optimizer: Any) -> None:
        """Gather gradients at this optimizer's steps, and no longer at those of an earlier one. Wrappers are unwrapped.

        Raises:
            WrongTypeError: no optimizer.
            ConfigurationError: it lacks a parameter of an estimator.
        """
        attached, inner = self._attached(), unwrap_optimizer(optimizer)
        check_holds(inner, attached.estimators)
        if self._step_hook is not None:
            self._step_hook.remove()
        attached.optimizer, self._step_hook = inner, StepHook(inner, self.step)

    def step(self) -> None:
        """What the optimizer's hook calls after each of its steps: add up the gradients of the estimators."""
        estimators = self._attached().estimators
        self.gathered.add({one: estimators[one].weight for one in self._kept()})

    def similarity(self) -> Tensor:
        """Return the cosines of the task factors, from the gradients of this window.

        Returns:
            ``[T, T]``, float64 on the CPU, in ``[-1, 1]``, 1 on the diagonal and between tasks that share; NaN for tasks
            that had no gradients.

        Raises:
            CaptureError: no gradients were gathered, or this is attached to no model.
            NonFiniteError: gradients with NaN or infinity.
        """
        present, matrix = self._cosines()
        full = torch.full((len(self.tasks),) * 2, float("nan"), dtype=torch.float64, device="cpu")
        kept = torch.tensor(present, device="cpu")
        full[kept.unsqueeze(1), kept] = matrix
        own = torch.tensor(self._survivors, device="cpu")
        return full[own.unsqueeze(1), own]

    def groups(self, theta: float = 0.3, directive: str = "similarity") -> Grouping:
        """Return which tasks should share an estimator, by the gradients of this window. Nothing is changed.

        Args:
            theta: ``>= 0``: clusters are joined while their mean ``1 - cos`` is below it. 0 joins nothing, above 2 all
                that had gradients.
            directive: ``"similarity"``: groups of tasks that are alike. ``"variance"``: as many groups, of nearly equal
                size, each with members of as many clusters as can be, and distances within as large as swaps make them.

        Returns:
            All tasks in groups, in their order; those that share already stay together, those that had no gradients alone.

        Raises:
            CaptureError, NonFiniteError: as :meth:`similarity`.
            ConfigurationError: an argument out of range.
        """
        limit = non_negative_number("theta", theta)
        check_choice("directive", directive, DIRECTIVES)
        present, matrix = self._cosines()
        found = clusters_below(matrix, limit)
        if directive == "variance":
            found = spread_out(1 - matrix, found)
        chosen = [[present[one] for one in group] for group in found]
        chosen += [[one] for one in self._kept() if one not in present]
        of_survivor = {one: number for number, group in enumerate(chosen) for one in group}
        return named_groups(self.tasks, [of_survivor[own] for own in self._survivors])

    def share(self, groups: Iterable[Collection[str]]) -> Grouping:
        """Let the tasks of each group use one estimator, and begin a new window.

        The medoid survives, the one with the smallest distances to the others of its group; without gradients, the first.

        Args:
            groups: of task names, each task in one; from :meth:`groups`, or of your own.

        Returns:
            The groups, in the order of the tasks.

        Raises:
            TaskError: groups that do not cover the tasks, overlap, or part tasks that share already. Nothing was changed.
            WrongTypeError: no groups of names.
            CaptureError: this is attached to no model.
            ConfigurationError: other groups in another process.
        """
        attached = self._attached()
        try:
            named = check_grouping(groups, self.tasks)
            of_task = {task: number for number, group in enumerate(named) for task in group}
            numbers = [of_task[task] for task in self.tasks]
            check_not_parted(self.tasks, self._survivors, numbers)
            if attached.optimizer is not None:
                check_holds(attached.optimizer, attached.estimators)
        except Exception:
            self._ranks.of_all(None)  # the others wait for this process
            raise
        if any(other != numbers for other in self._ranks.of_all(numbers)):
            raise ConfigurationError(
                "the processes were given different groups, or one of them met an error. Give all of them the same; nothing "
                "was changed."
            )
        members = [[one for one in self._kept() if numbers[one] == number] for number in range(len(named))]
        chosen = [group[0] for group in members]
        if any(len(group) > 1 for group in members):
            with suppress(CaptureError, NonFiniteError):  # no gradients to use; in all processes or in none
                distances = 1 - self.similarity().nan_to_num(0.0)
                chosen = [medoid(distances, group) for group in members]
        self._merge([chosen[number] for number in numbers])
        self.gathered.begin_again()
        return self.grouping

    def remove(self) -> None:
        """Let go of the model and of the optimizer. Estimators stay shared, and their gradients divided."""
        if self._step_hook is not None:
            self._step_hook.remove()
        self._attachment = self._step_hook = None

    @property
    def grouping(self) -> Grouping:
        """The groups that share an estimator now, in the order of the tasks."""
        return named_groups(self.tasks, self._survivors)

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Also refuse the state of other tasks, and groups that this model cannot be brought to."""
        saved = state_dict.get(prefix + "built_for")
        if isinstance(saved, Tensor) and not saved.is_meta and (tasks := names_from_bytes(saved)) != list(self.tasks):
            raise StateMismatchError(
                f"the state dict is that of the tasks {tasks}, but these are {list(self.tasks)}. Build this with the same "
                "tasks, in the same order. Nothing was loaded."
            )
        super().check_loaded(state_dict, prefix)
        new = survivors_in(state_dict.get(prefix + "survivors"))
        if new is not None and new != self._survivors:
            self._attached()
            check_can_become(self.tasks, self._survivors, new)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.check_loaded(state_dict, prefix)
        new = survivors_in(state_dict.get(prefix + "survivors"))
        if new is not None and new != self._survivors:
            self._merge(new)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{len(self._kept())} estimators of {len(self.tasks)} tasks: {first_few(list(map(str, self.grouping)))}"

    def _attached(self) -> _Attachment:
        if self._attachment is None:
            raise CaptureError(
                "this is attached to no model: it was removed, or is a copy. Build one with the model and optimizer."
            )
        return self._attachment

    def _kept(self) -> list[int]:
        """The tasks whose estimators are there, in order."""
        return sorted(set(self._survivors))

    def _cosines(self) -> tuple[list[int], Tensor]:
        """Return the survivors that had gradients, and the cosines of their factors; the same in all processes."""
        self._attached()
        kept = {one: self.tasks[one] for one in self._kept()}
        return self.gathered.cosines(kept, self._ranks, self.compare, self.energy)

    def _merge(self, survivors: list[int]) -> None:
        """Change model and optimizer so that each task uses the estimator of its survivor. What is asked was checked."""
        attached = self._attached()
        attached.estimators = merge(attached.model, attached.estimators, survivors, attached.optimizer)
        self._survivors = list(survivors)
        self.survivors.copy_(torch.tensor(survivors, device=self.survivors.device))
        self._divide()

    def _divide(self) -> None:
        estimators = self._attached().estimators
        for one in self._kept():
            divide_gradients(estimators[one], self._survivors.count(one))
