"""Relation weights between tasks: how strongly each pair is pulled together, and the rules by which that is learned."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, ShapeError, StateMismatchError, TaskError, WrongTypeError
from ..torch_tools.state import StateModule
from .rules import project_to_simplex

__all__ = ["RULES", "RelationWeights"]

RULES = ("entropic", "projected", "authors", "fixed")


class RelationWeights(StateModule):
    r"""Learned weights ``w_ij`` of task pairs, with their own update and no optimizer.

    The penalty is ``sum_{i<j} w_ij D_ij`` (Bai and Zhao, KDD 2022, eq. 6), so the gradient of ``w`` is the distance
    ``D``, and the exact minimum over ``w`` alone puts all weight on the closest pair. How fast and how far to go
    there is the choice of a rule:

    - ``"entropic"``: ``w = mass * softmax(-D / (temperature * scale))``, the closed-form minimum with an entropy
      term, of a running mean of ``D``. Smooth, never drops a pair for good.
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
        mass: ``sum_{i<j} w_ij`` (the paper's ``beta``), ``> 0``. Not used by a given ``matrix``.
        temperature: ``entropic`` only, ``> 0``: small values approach all weight on the closest pair, large ones
            uniform weights.
        momentum: ``entropic`` only, in ``[0, 1)``: the decay of the bias-corrected running mean of ``D``.
        learning_rate: ``projected`` and ``authors`` (1e-3 is theirs), ``> 0``.
        scale: ``entropic`` and ``projected``: what ``D`` is divided by. ``"mean"``: the mean of ``D`` over the pairs,
            so that weights do not change with the size of the saliencies; or a number. ``"auto"``: ``"mean"``, but 1
            in a regularizer whose metric is bounded (there, a relative scale chases noise once all tasks agree).
        matrix: ``fixed`` only: ``[T, T]``, symmetric, non-negative, with a zero diagonal.

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

    # Buffers; which of them exist depends on the rule.
    running_distances: Tensor
    running_weights: Tensor
    pair_weights: Tensor
    pair_coefficients: Tensor
    updates: Tensor

    def __init__(
        self,
        num_tasks: int,
        rule: str = "entropic",
        *,
        mass: float = 1.0,
        temperature: float = 0.3,
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
        if rule not in RULES:
            raise ConfigurationError(f"unknown rule {rule!r}. Choose one of {', '.join(map(repr, RULES))}.")
        if matrix is not None and rule != "fixed":
            raise ConfigurationError(f"matrix= belongs to rule='fixed', found rule={rule!r}. Type rule='fixed'.")
        self.num_tasks = num_tasks
        self.rule = rule
        self.mass = positive_number("mass", mass)
        self.temperature = positive_number("temperature", temperature)
        self.momentum = non_negative_number("momentum", momentum)
        if self.momentum >= 1:
            raise ConfigurationError(f"momentum must be in [0, 1), found {momentum}.")
        self.learning_rate = positive_number("learning_rate", learning_rate)
        if isinstance(scale, str) and scale not in ("auto", "mean"):
            raise ConfigurationError(f"unknown scale {scale!r}. Choose 'auto', 'mean' or a positive number.")
        self.scale: str | float = scale if isinstance(scale, str) else positive_number("scale", scale)
        self._auto_scale: str | float = "mean"  # what "auto" means; a regularizer sets it by its metric

        pairs = num_tasks * (num_tasks - 1) // 2
        uniform = torch.full((pairs,), self.mass / pairs, dtype=torch.float64)
        if rule == "entropic":
            self.register_buffer("running_distances", torch.zeros(pairs, dtype=torch.float64))
            self.register_buffer("running_weights", torch.zeros(pairs, dtype=torch.float64))
        elif rule == "projected":
            self.register_buffer("pair_weights", uniform)
        elif rule == "authors":
            self.register_buffer("pair_coefficients", torch.ones(pairs, dtype=torch.float64))
        else:
            self.register_buffer("pair_weights", uniform if matrix is None else _pairs_of_fixed(matrix, num_tasks))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def matrix(self) -> Tensor:
        """What multiplies the distances: ``[T, T]``, symmetric, ``>= 0``, zero diagonal, float64.

        The sum over ``i < j`` is ``mass`` (for a given ``matrix``: its own).
        """
        return self._square(self._weights())

    @property
    def coefficients(self) -> Tensor:
        """The raw ``c`` of the ``authors`` rule, ``[T, T]``, symmetric, before the division by its sum.

        Raises:
            ConfigurationError: another rule, which has no raw coefficients.
        """
        if self.rule != "authors":
            raise ConfigurationError(
                f"only rule='authors' has raw coefficients, this is {self.rule!r}. Type .matrix() for the weights."
            )
        return self._square(self.pair_coefficients)

    @torch.no_grad()
    def update(self, distances: Tensor, strength: float = 1.0, *, observed: Tensor | None = None) -> None:
        """Move the weights once, by the distances of one optimizer step.

        Args:
            distances: ``[T, T]``, symmetric. If any observed entry is not finite, nothing moves.
            strength: the factor of the penalty in the loss (``projected`` and ``authors`` follow its gradient).
            observed: ``[T, T]`` bool, symmetric: pairs whose distance is known. The weight of the others does not
                move by itself (under ``entropic`` a pair never seen counts as having the mean distance).

        Raises:
            ShapeError: a matrix that is not ``[T, T]``.
            ConfigurationError: a negative or non-finite ``strength``.
        """
        distances = self._checked("distances", distances)
        seen = torch.ones_like(distances, dtype=torch.bool) if observed is None else self._checked("observed", observed)
        strength = non_negative_number("strength", strength)
        row, column = self._pair_indices()
        seen_pairs = seen.to(row.device)[row, column] != 0
        pairs = distances.detach().to(row.device)[row, column].to(self._dtype())
        # where, not a branch: no waiting for the device.
        pairs = torch.where(seen_pairs, pairs, torch.zeros_like(pairs))
        moves = torch.isfinite(pairs).all() & seen_pairs.any()
        if self.rule == "authors":  # pairs that have all died have no gradient: 0 / 0
            moves &= torch.where(seen_pairs, self.pair_coefficients, torch.zeros_like(pairs)).sum() > 0
        pairs = torch.where(moves, pairs, torch.zeros_like(pairs))
        self.updates += moves
        if self.rule == "entropic":
            self._update_running_mean(pairs, seen_pairs, moves)
        elif self.rule == "projected":
            step = self.learning_rate * strength * pairs / self._scale_of(pairs, seen_pairs)
            # The pairs that were seen share what they had (-inf projects to 0); the others keep theirs.
            goal = torch.where(seen_pairs, self.pair_weights - step, torch.full_like(pairs, -torch.inf))
            free = torch.where(seen_pairs, self.pair_weights, torch.zeros_like(pairs)).sum()
            projected = project_to_simplex(goal, free)
            self.pair_weights.copy_(torch.where(seen_pairs & moves, projected, self.pair_weights))
        elif self.rule == "authors":
            self._update_authors(pairs, seen_pairs, moves, strength)

    def _update_running_mean(self, pairs: Tensor, seen: Tensor, moves: Tensor) -> None:
        keep, gain = self.momentum, 1 - self.momentum
        moved = seen & moves
        new_distances = keep * self.running_distances + gain * pairs
        new_weights = keep * self.running_weights + gain
        self.running_distances.copy_(torch.where(moved, new_distances, self.running_distances))
        self.running_weights.copy_(torch.where(moved, new_weights, self.running_weights))

    def _update_authors(self, pairs: Tensor, seen: Tensor, moves: Tensor, strength: float) -> None:
        beta1, beta2, epsilon = 0.9, 0.999, 1e-7  # Keras' defaults
        c = self.pair_coefficients
        of_seen = torch.where(seen, c, torch.zeros_like(c))
        total = of_seen.sum()
        gradient = strength * (pairs / total - (of_seen * pairs).sum() / total**2)
        # The variable is made anew each step, so both moments are fresh; the optimizer's counter is shared by the
        # three applications of a step.
        count = 3.0 * self.updates.to(c.dtype)
        rate = self.learning_rate * torch.sqrt(1 - beta2**count) / (1 - beta1**count)
        first, second = (1 - beta1) * gradient, (1 - beta2) * gradient**2
        moved = (c - rate * first / (second.sqrt() + epsilon)).clamp(min=0)
        self.pair_coefficients.copy_(torch.where(seen & moves, moved, c))

    def _weights(self) -> Tensor:
        """``[P]`` weights of the pairs ``i < j``, row by row."""
        if self.rule == "authors":
            return self.mass * self.pair_coefficients / self.pair_coefficients.sum()
        if self.rule != "entropic":
            return self.pair_weights
        seen = self.running_weights > 0
        mean = self.running_distances / torch.where(seen, self.running_weights, torch.ones_like(self.running_weights))
        neutral = mean.sum() / seen.sum().clamp(min=1)
        mean = torch.where(seen, mean, neutral)
        return self.mass * torch.softmax(-mean / (self.temperature * self._scale_of(mean, seen)), 0)

    def _scale_of(self, pairs: Tensor, seen: Tensor) -> Tensor:
        scale = self._auto_scale if self.scale == "auto" else self.scale
        if not isinstance(scale, str):
            return torch.full((), scale, dtype=pairs.dtype, device=pairs.device)
        mean = torch.where(seen, pairs, torch.zeros_like(pairs)).sum() / seen.sum().clamp(min=1)
        return torch.where(mean > 0, mean, torch.ones_like(mean))  # all distances zero: any scale gives uniform

    def _dtype(self) -> torch.dtype:
        return next(buffer.dtype for buffer in self.buffers() if buffer.is_floating_point())

    def _pair_indices(self) -> Tensor:
        return torch.triu_indices(self.num_tasks, self.num_tasks, 1, device=self.updates.device)

    def _square(self, pairs: Tensor) -> Tensor:
        row, column = self._pair_indices()
        matrix = torch.zeros(self.num_tasks, self.num_tasks, dtype=pairs.dtype, device=pairs.device)
        matrix[row, column] = pairs
        return matrix + matrix.T

    def _checked(self, what: str, matrix: Tensor) -> Tensor:
        if not isinstance(matrix, Tensor) or matrix.shape != (self.num_tasks, self.num_tasks):
            found = list(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ShapeError(f"{what} must be a tensor [{self.num_tasks}, {self.num_tasks}], found {found}.")
        return matrix

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        own = dict(self.named_buffers(recurse=False))
        found = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
        if found and found != set(own):
            raise StateMismatchError(
                f"the state dict holds {sorted(found)}, but rule {self.rule!r} keeps {sorted(own)}: it was saved with "
                "another rule. Build RelationWeights with that rule before loading."
            )
        for name, buffer in own.items():
            value = state_dict.get(prefix + name)
            if value is not None and value.shape != buffer.shape:
                raise StateMismatchError(
                    f"{name} in the state dict has shape {list(value.shape)}, expected {list(buffer.shape)} for "
                    f"{self.num_tasks} tasks: it was saved with another number of tasks."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        parts = [f"num_tasks={self.num_tasks}", f"rule={self.rule!r}", f"mass={self.mass}"]
        if self.rule == "entropic":
            parts += [f"temperature={self.temperature}", f"momentum={self.momentum}", f"scale={self.scale!r}"]
        elif self.rule == "projected":
            parts += [f"learning_rate={self.learning_rate}", f"scale={self.scale!r}"]
        elif self.rule == "authors":
            parts += [f"learning_rate={self.learning_rate}"]
        return ", ".join(parts)


def relations_for(relations: str | RelationWeights, tasks: Sequence[str], *, bounded: bool) -> RelationWeights:
    """The relations of a regularizer, from what its user passed; ``bounded`` is its metric."""
    if isinstance(relations, str):
        relations = RelationWeights(len(tasks), relations)
    if not isinstance(relations, RelationWeights):
        raise WrongTypeError(
            f"relations must be the name of a rule or a RelationWeights, found {type(relations).__name__}."
        )
    if relations.num_tasks != len(tasks):
        raise TaskError(
            f"relations has num_tasks={relations.num_tasks}, but there are {len(tasks)} tasks. Type "
            f"RelationWeights({len(tasks)}, ...)."
        )
    relations._auto_scale = 1.0 if bounded else "mean"
    return relations


def positive_number(name: str, value: float) -> float:
    """Return ``value`` as a float, finite and ``> 0``."""
    number = non_negative_number(name, value)
    if number == 0:
        raise ConfigurationError(f"{name} must be a finite number > 0, found {value}.")
    return number


def non_negative_number(name: str, value: float) -> float:
    """Return ``value`` as a float, finite and ``>= 0``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise WrongTypeError(f"{name} must be a number, found {type(value).__name__}.")
    if not (math.isfinite(value) and value >= 0):
        raise ConfigurationError(f"{name} must be a finite number >= 0, found {value}.")
    return float(value)


def _pairs_of_fixed(matrix: Tensor, num_tasks: int) -> Tensor:
    if not isinstance(matrix, Tensor):
        raise WrongTypeError(
            f"matrix must be a tensor [T, T], found {type(matrix).__name__}. Type torch.tensor(matrix)."
        )
    if matrix.shape != (num_tasks, num_tasks):
        raise ShapeError(
            f"matrix must be [{num_tasks}, {num_tasks}] for {num_tasks} tasks, found {list(matrix.shape)}."
        )
    matrix = matrix.detach().to(torch.float64)
    if not torch.isfinite(matrix).all():
        raise ConfigurationError("matrix holds NaN or infinite weights. All weights must be finite and >= 0.")
    if (matrix < 0).any():
        raise ConfigurationError(
            f"matrix holds negative weights, down to {matrix.min().item():g}. Use matrix.clamp(min=0)."
        )
    if not torch.equal(matrix, matrix.T):
        worst = (matrix - matrix.T).abs().max().item()
        raise ConfigurationError(
            f"matrix is not symmetric (W[i, j] and W[j, i] differ by up to {worst:g}). Type matrix=(W + W.T) / 2."
        )
    if matrix.diagonal().any():
        raise ConfigurationError(
            "matrix has a non-zero diagonal. A task has no relation with itself: fill_diagonal_(0)."
        )
    row, column = torch.triu_indices(num_tasks, num_tasks, 1, device=matrix.device)
    return matrix[row, column]
