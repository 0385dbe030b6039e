"""The best epoch of each independent part of a model, and the weights that it had then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Score = tuple[float, ...]


class BestWeights:
    """Keeps the weights of the epoch with the highest score, for each part on its own.

    Args:
        parts: modules that share no parameter. A part that is never scored finite keeps its initial weights, as epoch 0.
        worst: a score that every epoch beats, unless its own has a NaN.
    """

    def __init__(self, parts: Sequence[nn.Module], worst: Score) -> None:
        self._parts = list(parts)
        self.scores: list[Score] = [worst for _ in self._parts]
        self.epochs: list[int] = [0 for _ in self._parts]
        self._states = [_copy_of(part) for part in self._parts]

    def update(self, epoch: int, scores: Sequence[Score]) -> list[int]:
        """Compare with the best so far; of equals the first stays. Return the parts that got better."""
        better = [index for index, score in enumerate(scores) if score > self.scores[index]]
        for index in better:
            self.scores[index] = tuple(scores[index])
            self.epochs[index] = epoch
            self._states[index] = _copy_of(self._parts[index])
        return better

    def restore(self) -> None:
        """Give every part the weights of its best epoch."""
        for part, state in zip(self._parts, self._states):
            part.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"scores": list(self.scores), "epochs": list(self.epochs), "states": list(self._states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken."""
        self.scores = [tuple(score) for score in state["scores"]]
        self.epochs = list(state["epochs"])
        self._states = [dict(own) for own in state["states"]]


def _copy_of(part: nn.Module) -> dict[str, Any]:
    # On the host: a GPU has better uses for its memory.
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in part.state_dict().items()
    }
