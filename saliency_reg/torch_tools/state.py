"""Modules whose tensors are state, not weights; state that is counted, and state that seeds random draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, WrongTypeError
from .attachment import PartlyCopied


def state_dtype(device: torch.device) -> torch.dtype:
    """Return float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def names_to_bytes(names: Sequence[str]) -> Tensor:
    """Return the names as a tensor, which is all that some checkpoints can hold."""
    return torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)


def names_from_bytes(names: Tensor) -> list[str]:
    return bytes(names.tolist()).decode(errors="replace").split("\n") if len(names) else []


class StateModule(PartlyCopied, nn.Module):
    """An ``nn.Module`` whose buffers keep their dtype under ``.to(bfloat16)``, ``.half()`` and the like."""

    #: Values of counting buffers, so that a device is never waited for; read anew from a copy or a loaded state.
    _on_host: Any = None
    in_a_copy: ClassVar[dict[str, Any]] = {"_on_host": None}

    def _count(self, name: str) -> int:
        """Return the value of a counting buffer."""
        if self._on_host is None:
            self._on_host = {}
        if name not in self._on_host:
            buffer = getattr(self, name)
            self._on_host[name] = 0 if buffer.is_meta else int(buffer)
        return int(self._on_host[name])

    def _count_up(self, name: str) -> None:
        count = self._count(name) + 1
        self._on_host[name] = count
        getattr(self, name).fill_(count)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float64:
                device = fn(torch.zeros((), dtype=torch.float32, device=tensor.device)).device
                if state_dtype(device) != torch.float64:
                    return fn(tensor.to(state_dtype(device)))
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            # Not moved.to(...): the digits are gone there already.
            dtype = state_dtype(moved.device) if tensor.is_floating_point() else tensor.dtype
            return tensor.to(device=moved.device, dtype=dtype)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._on_host = None


class SeededModule(StateModule):
    """Gives each random draw a CPU generator that depends on a seed and the number of the draw alone.

    So draws are the same in every process and after a resume, and leave the global generator alone. The seed is a part of
    the state: a loaded one counts, not the one this was built with.
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
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed_in_use", torch.tensor(seed))

    def generator_of(self, call: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + call) % 2**63)

    def next_generator(self) -> torch.Generator:
        """Return the generator of the next draw, and count it."""
        generator = self.generator_of(self._count("calls"))
        self._count_up("calls")
        return generator

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.seed = int(self.seed_in_use)
