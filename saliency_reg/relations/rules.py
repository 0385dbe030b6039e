"""The rules by which relation weights are learned, one class each. A new rule is a class here and an entry in ``RULES``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigurationError, ShapeError, WrongTypeError
from ..torch_tools import StateModule, real_device
from .partition_sum import PartitionSum

#: With more pairs, the sum over all of them is kept, and not made anew.
MANY_PAIRS = 4096


@dataclass(frozen=True)
class PairDistances:
    """Holds the distances of one optimizer step, ``[P]`` for the pairs ``i < j``, row by row.

    Of a rule that is ``local``, they may be those among some tasks, and so is the state it is called with.
    """

    values: Tensor  # 0 where a pair was not seen, and everywhere if nothing moves
    seen: Tensor  # bool
    moves: Tensor  # 0-dim, whether the weights move at all; a tensor, so that a device is never waited for
    strength: float  # the factor of the penalty in the loss


class RuleState(StateModule):
    """What a rule reads and moves: options and buffers of :class:`RelationWeights`, which derives from this."""

    mass: float
    temperature: float
    momentum: float
    learning_rate: float
    scale: str | float
    _auto_scale: str | float  # what "auto" means
    updates: Tensor
    _sum: PartitionSum | None = None
    in_a_copy: ClassVar[dict[str, Any]] = {"_sum": None}
    # The rule decides which of these there are.
    running_distances: Tensor
    running_weights: Tensor
    pair_weights: Tensor
    pair_coefficients: Tensor


class Rule:
    """Base class: how weights ``w_ij`` follow from distances. The state is in buffers of :class:`RelationWeights`."""

    #: The options that this rule uses, for the text of :class:`RelationWeights`.
    options: ClassVar[tuple[str, ...]] = ()
    #: What it is if nobody says.
    temperature: ClassVar[float] = 1.0
    #: Whether a step reads and moves nothing but the pairs that were seen. Otherwise it is always given all pairs.
    local: ClassVar[bool] = False

    def buffers(self, pairs: int, mass: float) -> dict[str, Tensor]:
        """Return the state before the first step."""
        return {"pair_weights": torch.full((pairs,), mass / pairs, dtype=torch.float64, device=real_device())}

    def weights(self, own: RuleState) -> Tensor:
        """Return the weights ``[P]`` of the distances."""
        return own.pair_weights

    def weights_at(self, own: RuleState, index: Tensor) -> Tensor:
        """Return the weights of some pairs, of ``[P]``."""
        return self.weights(own)[index]

    def put(self, own: RuleState, index: Tensor, state: Mapping[str, Tensor]) -> None:
        """Write the state of some pairs."""
        for name, values in state.items():
            own.get_buffer(name)[index] = values

    def carried(self, state: Mapping[str, Tensor], places: Tensor, mass: float) -> dict[str, Tensor]:
        """Return the state for other tasks: of each pair what ``state`` has at its place; one at -1 is new.

        Here new pairs have the mean weight of those that stay, and all are scaled to the mass.
        """
        weights, known = _taken(state["pair_weights"], places), places >= 0
        if not bool(weights.sum() > 0):
            return _on(self.buffers(len(places), mass), weights)
        if bool(known.all()) and len(places) == len(state["pair_weights"]):
            return {"pair_weights": weights}  # in another order
        weights = torch.where(known, weights, weights.sum() / known.sum())
        return {"pair_weights": mass * weights / weights.sum()}

    def can_move(self, own: RuleState, seen: Tensor) -> Tensor | bool:
        """Tell whether the state admits a step by these pairs."""
        return True

    def update(self, own: RuleState, pairs: PairDistances) -> None:
        """Move once, in place."""


class Entropic(Rule):
    """``w = mass * softmax(-D / (temperature * scale))`` of a bias-corrected running mean of ``D``."""

    options = ("temperature", "momentum", "scale")
    local = True

    def buffers(self, pairs: int, mass: float) -> dict[str, Tensor]:
        zeros = torch.zeros(pairs, dtype=torch.float64, device=real_device())
        return {"running_distances": zeros, "running_weights": zeros.clone()}

    def weights(self, own: RuleState) -> Tensor:
        return own.mass * torch.softmax(self.logits(own), 0)

    def carried(self, state: Mapping[str, Tensor], places: Tensor, mass: float) -> dict[str, Tensor]:
        """Leave the distances of pairs that stay as they are; a new one was never seen."""
        return {name: _taken(state[name], places) for name in ("running_distances", "running_weights")}

    def logits(self, own: RuleState) -> Tensor:
        """Return ``-D / (temperature * scale)``, ``[P]``; a pair never seen has the mean distance."""
        seen = own.running_weights > 0
        mean = own.running_distances / torch.where(seen, own.running_weights, 1.0)
        neutral = mean.sum() / seen.sum().clamp(min=1)
        mean = torch.where(seen, mean, neutral)
        return -mean / (own.temperature * _scale(own, mean, seen))

    def weights_at(self, own: RuleState, index: Tensor) -> Tensor:
        state = own.running_distances, own.running_weights
        found = None
        if state[0].device.type != "cpu":
            own._sum = None  # it goes through all pairs faster than it would be waited for
        elif len(state[0]) > max(MANY_PAIRS, 16 * len(index)):
            if own._sum is None or not own._sum.is_of(*state):
                own._sum = PartitionSum(*state)
            scale = own._auto_scale if own.scale == "auto" else own.scale
            found = own._sum.weights_at(index, own.temperature, None if isinstance(scale, str) else scale)
        return super().weights_at(own, index) if found is None else own.mass * found

    def put(self, own: RuleState, index: Tensor, state: Mapping[str, Tensor]) -> None:
        known = own._sum is not None and own._sum.is_of(own.running_distances, own.running_weights)
        super().put(own, index, state)
        if own._sum is not None and known:
            own._sum.moved(index)

    def update(self, own: RuleState, pairs: PairDistances) -> None:
        keep, gain = own.momentum, 1 - own.momentum
        moved = pairs.seen & pairs.moves
        new_distances = keep * own.running_distances + gain * pairs.values
        new_weights = keep * own.running_weights + gain
        own.running_distances.copy_(torch.where(moved, new_distances, own.running_distances))
        own.running_weights.copy_(torch.where(moved, new_weights, own.running_weights))


class PerTask(Entropic):
    """``w_ij = mass * (p_ij + p_ji) / T`` with ``p_i = softmax_j(-D_ij / (temperature * scale))`` over the other tasks.

    So each task has its own nearest ones, where one softmax over all pairs gives most to the closest pairs of a few tasks.
    """

    temperature = 0.1

    def weights(self, own: RuleState) -> Tensor:
        logits = self.logits(own)
        size = (1 + math.isqrt(1 + 8 * len(logits))) // 2
        row, column = torch.triu_indices(size, size, 1, device=logits.device)
        square = torch.full((size, size), -torch.inf, dtype=logits.dtype, device=logits.device)
        square[row, column] = square[column, row] = logits
        shares = torch.softmax(square, 1)
        return own.mass * (shares[row, column] + shares[column, row]) / size

    def weights_at(self, own: RuleState, index: Tensor) -> Tensor:
        return self.weights(own)[index]


class Projected(Rule):
    """A gradient step, then the Euclidean projection on the simplex: the paper's constrained problem."""

    options = ("learning_rate", "scale")
    local = True

    def update(self, own: RuleState, pairs: PairDistances) -> None:
        weights, seen = own.pair_weights, pairs.seen
        step = own.learning_rate * pairs.strength * pairs.values / _scale(own, pairs.values, seen)
        # The pairs that were seen share what they had (-inf projects to 0); the others keep theirs.
        goal = torch.where(seen, weights - step, -torch.inf)
        projected = project_to_simplex(goal, torch.where(seen, weights, 0.0).sum())
        weights.copy_(torch.where(seen & pairs.moves, projected, weights))


class Authors(Rule):
    """The published code: an Adam step with fresh moments on coefficients ``c``, then ReLU; ``w = mass * c / sum(c)``."""

    options = ("learning_rate",)
    local = True

    def buffers(self, pairs: int, mass: float) -> dict[str, Tensor]:
        return {"pair_coefficients": torch.ones(pairs, dtype=torch.float64, device=real_device())}

    def weights(self, own: RuleState) -> Tensor:
        return self.weights_at(own, ...)

    def weights_at(self, own: RuleState, index: Any) -> Tensor:
        return own.mass * own.pair_coefficients[index] / own.pair_coefficients.sum()

    def carried(self, state: Mapping[str, Tensor], places: Tensor, mass: float) -> dict[str, Tensor]:
        """Leave the coefficients of pairs that stay as they are; a new one has their mean."""
        kept, known = _taken(state["pair_coefficients"], places), places >= 0
        if not bool(kept.sum() > 0):  # their weights would be 0 / 0
            return _on(self.buffers(len(places), mass), kept)
        return {"pair_coefficients": torch.where(known, kept, kept.sum() / known.sum())}

    def can_move(self, own: RuleState, seen: Tensor) -> Tensor | bool:
        # Pairs that have all died have no gradient: 0 / 0.
        return torch.where(seen, own.pair_coefficients, 0.0).sum() > 0

    def update(self, own: RuleState, pairs: PairDistances) -> None:
        beta1, beta2, epsilon = 0.9, 0.999, 1e-7  # Keras' defaults
        c = own.pair_coefficients
        of_seen = torch.where(pairs.seen, c, 0.0)
        total = of_seen.sum()
        gradient = pairs.strength * (pairs.values / total - (of_seen * pairs.values).sum() / total**2)
        # The variable is made anew each step, so both moments are fresh; the optimizer's counter is shared by the
        # three applications of a step.
        count = 3.0 * own.updates.to(c.dtype)
        rate = own.learning_rate * torch.sqrt(1 - beta2**count) / (1 - beta1**count)
        first, second = (1 - beta1) * gradient, (1 - beta2) * gradient**2
        moved = (c - rate * first / (second.sqrt() + epsilon)).clamp(min=0)
        c.copy_(torch.where(pairs.seen & pairs.moves, moved, c))


class Fixed(Rule):
    """A given matrix, or uniform weights, which do not move."""

    local = True


#: The rules by the names that users give them.
RULES: dict[str, Rule] = {
    "entropic": Entropic(),
    "per_task": PerTask(),
    "projected": Projected(),
    "authors": Authors(),
    "fixed": Fixed(),
}


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """Return the values ``[P]`` at these places, 0 at -1."""
    return torch.where(places >= 0, values[places.clamp(min=0)], 0.0)


def _on(state: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    return {name: value.to(like) for name, value in state.items()}


def _scale(own: RuleState, pairs: Tensor, seen: Tensor) -> Tensor:
    """Return the number, 0-dim, by which the distances ``[P]`` are divided."""
    scale = own._auto_scale if own.scale == "auto" else own.scale
    if not isinstance(scale, str):
        return torch.full((), scale, dtype=pairs.dtype, device=pairs.device)
    mean = torch.where(seen, pairs, 0.0).sum() / seen.sum().clamp(min=1)
    return torch.where(mean > 0, mean, 1.0)  # all distances zero: any scale gives uniform


def pairs_of_matrix(matrix: Tensor, num_tasks: int) -> Tensor:
    """Return the weights ``[P]`` of a matrix ``[T, T]`` that a user gave, checked and with a sum of 1."""
    if not isinstance(matrix, Tensor):
        raise WrongTypeError(
            f"matrix must be a tensor [T, T], found {type(matrix).__name__}. Pass torch.tensor(matrix)."
        )
    if matrix.shape != (num_tasks, num_tasks):
        raise ShapeError(
            f"matrix must be [{num_tasks}, {num_tasks}] for {num_tasks} tasks, found {list(matrix.shape)}."
        )
    if matrix.is_meta:
        raise ConfigurationError(
            "matrix is on the device 'meta' and has no values. Use torch.tensor(..., device='cpu') for it, or build the "
            "relations outside of torch.device('meta')."
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
            f"matrix is not symmetric (W[i, j] and W[j, i] differ by up to {worst:g}). Pass matrix=(W + W.T) / 2."
        )
    if matrix.diagonal().any():
        raise ConfigurationError(
            "matrix has a non-zero diagonal. A task has no relation with itself: use matrix.fill_diagonal_(0)."
        )
    row, column = torch.triu_indices(num_tasks, num_tasks, 1, device=matrix.device)
    pairs = matrix[row, column]
    if not pairs.any():
        raise ConfigurationError("matrix is zero everywhere: no pair has a relation. Leave it out for uniform weights.")
    return pairs / pairs.sum()


def project_to_simplex(vector: Tensor, mass: float | Tensor = 1.0) -> Tensor:
    """Return the point of ``{w : w >= 0, sum(w) = mass}`` that is closest to ``vector``.

    The minimiser is ``max(vector - theta, 0)`` with one threshold ``theta``, which a sort finds exactly
    (Held, Wolfe and Crowder 1974; Duchi et al. 2008, algorithm 1).
    """
    # The problem does not change when a constant is added: centring avoids cancellation for large entries.
    centred = vector - vector.max()
    descending, _ = torch.sort(centred, descending=True)
    excess = descending.cumsum(0) - mass
    count = torch.arange(1, len(vector) + 1, device=vector.device, dtype=vector.dtype)
    support = (descending - excess / count > 0).sum().clamp(min=1)
    theta = excess.gather(0, support.unsqueeze(0) - 1) / support
    return (centred - theta).clamp(min=0)
