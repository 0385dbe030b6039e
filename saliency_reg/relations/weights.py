"""Relation weights between tasks: how strongly each pair is pulled together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigurationError, ShapeError, StateMismatchError, TaskError, WrongTypeError
from ..tasks import first_few
from ..torch_tools import check_choice, non_negative_number, positive_number, real_device, share_below_one
from .rules import RULES, PairDistances, RuleState, pairs_of_matrix


class RelationWeights(RuleState):
    r"""Learned weights ``w_ij`` of task pairs, with their own update and no optimizer.

    The penalty is ``sum_{i<j} w_ij D_ij`` (Bai and Zhao, KDD 2022, eq. 6), so the gradient of ``w`` is the distance
    ``D``, and the exact minimum over ``w`` alone puts all weight on the closest pair. How fast and how far to go
    there is the choice of a rule:

    - ``"entropic"``: ``w = mass * softmax(-D / (temperature * scale))``, the closed-form minimum with an entropy
      term, of a running mean of ``D``. Smooth, never drops a pair for good.
    - ``"per_task"``: the same for each task on its own, ``w_ij = mass * (p_ij + p_ji) / T`` with ``p_i`` the softmax over
      the other tasks: for many tasks of a few kinds, each of which has its nearest.
    - ``"projected"``: one gradient step ``w - learning_rate * strength * D / scale``, then the Euclidean projection
      on ``{w >= 0, sum w = mass}``: the paper's constrained problem.
    - ``"authors"``: the published code: coefficients ``c`` from ones, the gradient of ``strength * sum(c D) / sum(c)``,
      an Adam step whose moments start afresh each time while its counter runs on (by 3 a step), then ReLU;
      ``w = mass * c / sum(c)``. Nearly a sign step. ``strength`` must be the one that multiplies the penalty.
    - ``"fixed"``: a given ``matrix``, or uniform weights without one.

    The weights are buffers, not parameters: an optimizer that swept them up would decay them. All state is in
    ``state_dict``, as tensors. Distances that are not finite move nothing.

    Args:
        num_tasks: T, at least 2.
        rule: one of the names above.
        mass: ``sum_{i<j} w_ij`` (the paper's ``beta``), ``> 0``.
        temperature: ``entropic`` (by default 1) and ``per_task`` (0.1), ``> 0``: small values approach all weight on the
            closest pair, large ones uniform weights.
        momentum: the same rules, in ``[0, 1)``: the decay of the bias-corrected running mean of ``D``.
        learning_rate: ``projected`` and ``authors`` (1e-3 is theirs), ``> 0``.
        scale: all but ``authors`` and ``fixed``: what ``D`` is divided by. ``"mean"``: the mean of ``D`` over the pairs,
            so that weights do not change with the size of the saliencies; or a number. ``"auto"``: ``"mean"``, but 1
            in a regularizer whose metric is bounded (there, a relative scale chases noise once all tasks agree).
        matrix: ``fixed`` only: ``[T, T]``, symmetric, non-negative, with a zero diagonal; scaled to the ``mass``, so that it
            is as strong as any other rule.

    Raises:
        ConfigurationError, ShapeError, TaskError, WrongTypeError: a bad argument.

    Example:
        >>> relations = RelationWeights(3, "entropic", temperature=0.5)
        >>> relations.update(torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 4.0], [4.0, 4.0, 0.0]]))
        >>> relations.matrix().round(decimals=2)
        tensor([[0.0000, 0.7900, 0.1100],
                [0.7900, 0.0000, 0.1100],
                [0.1100, 0.1100, 0.0000]], dtype=torch.float64)
    """

    #: State before each task that came, and behind it.
    _before: tuple[tuple[dict[str, Tensor], dict[str, Tensor]], ...] = ()
    in_a_copy: ClassVar[dict[str, Any]] = {"_before": ()}

    def __init__(
        self,
        num_tasks: int,
        rule: str = "entropic",
        *,
        mass: float = 1.0,
        temperature: float | None = None,
        momentum: float = 0.9,
        learning_rate: float = 1e-3,
        scale: str | float = "auto",
        matrix: Tensor | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_tasks, bool) or not isinstance(num_tasks, int):
            raise WrongTypeError(f"num_tasks must be an int, found {type(num_tasks).__name__}.")
        if num_tasks < 2:
            raise TaskError(f"relations between tasks need at least 2 tasks, found num_tasks={num_tasks}.")
        check_choice("rule", rule, tuple(RULES))
        if matrix is not None and rule != "fixed":
            raise ConfigurationError(f"matrix= belongs to rule='fixed', found rule={rule!r}. Pass rule='fixed'.")
        self.num_tasks = num_tasks
        self.rule = rule
        self.mass = positive_number("mass", mass)
        default = RULES[rule].temperature
        self.temperature = positive_number("temperature", default if temperature is None else temperature)
        self.momentum = share_below_one("momentum", momentum)
        self.learning_rate = positive_number("learning_rate", learning_rate)
        if isinstance(scale, str) and scale not in ("auto", "mean"):
            raise ConfigurationError(f"unknown scale {scale!r}. Choose 'auto', 'mean' or a positive number.")
        self.scale: str | float = scale if isinstance(scale, str) else positive_number("scale", scale)
        self._auto_scale: str | float = "mean"
        buffers = RULES[rule].buffers(num_tasks * (num_tasks - 1) // 2, self.mass)
        if matrix is not None:
            buffers["pair_weights"] = self.mass * pairs_of_matrix(matrix, num_tasks)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=real_device()))

    def matrix(self) -> Tensor:
        """Return what multiplies the distances: ``[T, T]``, symmetric, ``>= 0``, zero diagonal, float64.

        The sum over ``i < j`` is ``mass``.
        """
        return _square(RULES[self.rule].weights(self), self.num_tasks)

    def among(self, tasks: Sequence[int]) -> Tensor:
        """Return ``matrix()`` among some tasks, ``[t, t]``, without making that of all of them."""
        if list(tasks) == list(range(self.num_tasks)):
            return self.matrix()
        return _square(RULES[self.rule].weights_at(self, self._pairs_among(tasks)), len(tasks))

    @property
    def coefficients(self) -> Tensor:
        """The raw ``c`` of the ``authors`` rule, ``[T, T]``, symmetric, before the division by its sum.

        Raises:
            ConfigurationError: another rule, which has no raw coefficients.
        """
        if self.rule != "authors":
            raise ConfigurationError(
                f"only rule='authors' has raw coefficients, this is {self.rule!r}. Use .matrix() for the weights."
            )
        return _square(self.pair_coefficients, self.num_tasks)

    @torch.no_grad()
    def update(
        self,
        distances: Tensor,
        strength: float = 1.0,
        *,
        observed: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> None:
        """Move the weights once, by the distances of one optimizer step.

        Args:
            distances: ``[T, T]``, symmetric. If any observed entry is not finite, nothing moves.
            strength: the factor of the penalty in the loss (``projected`` and ``authors`` follow its gradient).
            observed: ``[T, T]`` bool, symmetric: pairs whose distance is known. The weight of the others does not
                move by itself (under ``entropic`` a pair never seen counts as having the mean distance).
            tasks: the indices of ``t`` tasks that both matrices are among, ``[t, t]``; pairs with others are not observed.

        Raises:
            ShapeError: a matrix that is not ``[T, T]``.
            ConfigurationError: a negative or non-finite ``strength``.
            TaskError: ``tasks`` that are not distinct indices of tasks.
        """
        size = self.num_tasks if tasks is None else len(tasks)
        if tasks is not None and not (len(set(tasks)) == size and all(0 <= task < self.num_tasks for task in tasks)):
            raise TaskError(
                f"tasks must be distinct indices below {self.num_tasks}, found {first_few(list(map(str, tasks)))}."
            )
        pairs = self._pairs_of("distances", distances, size)
        seen = (
            torch.ones_like(pairs, dtype=torch.bool)
            if observed is None
            else self._pairs_of("observed", observed, size) != 0
        )
        strength = non_negative_number("strength", strength)
        if tasks is None or list(tasks) == list(range(self.num_tasks)):
            self._move(self, pairs, seen, strength)
            return
        if size < 2:
            return
        index = self._pairs_among(tasks)
        if not RULES[self.rule].local:
            whole = torch.zeros(self.num_tasks * (self.num_tasks - 1) // 2, dtype=pairs.dtype, device=pairs.device)
            self._move(self, whole.index_put((index,), pairs), whole.bool().index_put((index,), seen), strength)
            return
        state = {name: buffer for name, buffer in self.named_buffers() if buffer.ndim}
        of_these = {name: buffer[index] for name, buffer in state.items()}
        self._move(SimpleNamespace(**{**vars(self), "updates": self.updates, **of_these}), pairs, seen, strength)
        RULES[self.rule].put(self, index, of_these)

    def _move(self, own: Any, pairs: Tensor, seen: Tensor, strength: float) -> None:
        rule = RULES[self.rule]
        dtype = next(buffer.dtype for buffer in self.buffers() if buffer.is_floating_point())
        # where, not a branch: no waiting for the device.
        pairs = torch.where(seen, pairs.to(dtype), 0.0)
        moves = torch.isfinite(pairs).all() & seen.any() & rule.can_move(own, seen)
        pairs = torch.where(moves, pairs, 0.0)
        self.updates += moves
        rule.update(own, PairDistances(pairs, seen, moves, strength))

    @torch.no_grad()
    def change_tasks(self, order: Sequence[int | None]) -> None:
        """Take other tasks: for each of them its index so far, ``None`` for a new one. :meth:`carried` says what they begin
        with. To take away the task that came last, with weights that have not moved since, gives the state before it, to
        the bit.
        """
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.ndim}
        comes = list(order) == [*range(self.num_tasks), None]
        goes = list(order) == list(range(self.num_tasks - 1))
        if goes and self._before and _same(self._before[-1][1], before):
            after, self._before = self._before[-1][0], self._before[:-1]
        else:
            after = self.carried(before, order)
            copies = {name: value.clone() for name, value in after.items()}
            self._before = (*self._before, (before, copies)) if comes else ()
        for name, value in after.items():
            self.register_buffer(name, value)
        self.num_tasks, self._sum = len(order), None

    def carried(self, state: Mapping[str, Tensor], order: Sequence[int | None]) -> dict[str, Tensor]:
        """Return the state of the pairs ``[P]`` of some tasks, given the ``state`` of those that ``order`` refers to.

        Pairs of two tasks with an index keep their relations. A pair with a new task begins where the rule begins:

        - ``entropic``, ``per_task``: it was never seen, and has the mean distance until it is. The distances of the others
          stay, and with them their logits: the weights are those of a run in which the task had always been there, or never.
          (Where ``scale`` is the mean distance, a task that goes changes that scale.)
        - ``authors``: the mean coefficient of the others, whose coefficients stay.
        - ``projected``, ``fixed``: the mean weight of the others, all then scaled to the mass.

        Where no pair has any weight left, all are as at the start.
        """
        pairs = next(iter(state.values()))
        size = (1 + math.isqrt(1 + 8 * len(pairs))) // 2
        numbers = torch.tensor([-1 if task is None else task for task in order], device=pairs.device)
        of_pairs = numbers[_pair_indices(len(order), pairs.device)]
        first, second = of_pairs.amin(0), of_pairs.amax(0)
        places = torch.where(first < 0, -1, first * (2 * size - first - 1) // 2 + second - first - 1)
        return RULES[self.rule].carried(state, places, self.mass)

    def adapt_to_metric(self, *, bounded: bool) -> None:
        """Set what ``scale="auto"`` means: 1 for a metric with bounded values, else the mean distance."""
        self._auto_scale = 1.0 if bounded else "mean"

    def _pairs_among(self, tasks: Sequence[int]) -> Tensor:
        """Return where the pairs of some tasks are in ``[P]``."""
        of_pairs = torch.tensor(tasks, dtype=torch.int64, device=self.updates.device)[
            _pair_indices(len(tasks), self.updates.device)
        ]
        first, second = of_pairs.amin(0), of_pairs.amax(0)
        return first * (2 * self.num_tasks - first - 1) // 2 + second - first - 1

    def _pairs_of(self, what: str, matrix: Tensor, size: int) -> Tensor:
        if not isinstance(matrix, Tensor) or matrix.shape != (size, size):
            found = list(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ShapeError(f"{what} must be a tensor [{size}, {size}], found {found}.")
        row, column = _pair_indices(size, self.updates.device)
        return matrix.detach().to(row.device)[row, column]

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Also refuse the state of another rule."""
        own = dict(self.named_buffers(recurse=False))
        found = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
        if found and found != set(own):
            raise StateMismatchError(
                f"the state dict holds {sorted(found)}, but rule {self.rule!r} keeps {sorted(own)}: it was saved with "
                "another rule. Build RelationWeights with that rule before loading."
            )
        super().check_loaded(state_dict, prefix)

    def extra_repr(self) -> str:
        options = (f"{name}={getattr(self, name)!r}" for name in RULES[self.rule].options)
        return ", ".join([f"num_tasks={self.num_tasks}", f"rule={self.rule!r}", f"mass={self.mass}", *options])


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(value.device == other[name].device and torch.equal(value, other[name]) for name, value in one.items())


def _pair_indices(size: int, device: torch.device) -> Tensor:
    return torch.triu_indices(size, size, 1, device=device)


def _square(pairs: Tensor, size: int) -> Tensor:
    row, column = _pair_indices(size, pairs.device)
    matrix = torch.zeros(size, size, dtype=pairs.dtype, device=pairs.device)
    matrix[row, column] = pairs
    return matrix + matrix.T
