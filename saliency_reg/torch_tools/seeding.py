"""Random draws that depend on a seed and a count alone: the same in every process, and after a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, WrongTypeError
from .state import StateModule

__all__ = ["SeededModule"]


class SeededModule(StateModule):
    """Counts its draws in its state; each has a CPU generator of its own, and the global one is left alone.

    The seed is a part of the state: what is loaded counts, not what this was built with.

    Args:
        seed: an int of at most 64 bits.

    Raises:
        WrongTypeError: another type.
        ConfigurationError: out of range.
    """

    calls: Tensor
    seed_in_use: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise WrongTypeError(f"seed must be an int, found {type(seed).__name__}.")
        if not -(2**63) <= seed < 2**63:
            raise ConfigurationError(f"seed must fit into 64 bits, found {seed}.")
        self.seed = seed
        self._calls = 0  # a mirror, so that a device is never waited for
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed_in_use", torch.tensor(seed))

    def generator_of(self, call: int) -> torch.Generator:
        """The generator of the draw with this number."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + call) % 2**63)

    def next_generator(self) -> torch.Generator:
        """The generator of the next draw, which is counted."""
        generator = self.generator_of(self._calls)
        self._calls += 1
        self.calls.fill_(self._calls)
        return generator

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._calls, self.seed = int(self.calls), int(self.seed_in_use)
