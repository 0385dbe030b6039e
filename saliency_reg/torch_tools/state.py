"""Modules whose tensors are state, not weights; state that is counted, and state that seeds random draws."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, StateMismatchError, WrongTypeError
from .attachment import PartlyCopied
from .autograd import version_of


def state_dtype(device: torch.device) -> torch.dtype:
    """Return float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def real_device() -> torch.device:
    """Return the device on which tensors are made now, but never ``meta``: state has values from the beginning."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def names_to_bytes(names: Sequence[str]) -> Tensor:
    """Return the names as a tensor, which is all that some checkpoints can hold."""
    return torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8, device=real_device())


def names_from_bytes(names: Tensor) -> list[str]:
    return bytes(names.tolist()).decode(errors="replace").split("\n") if len(names) else []


_ANOTHER = "Pass the state dict of an object that was built alike; nothing was loaded."


class StateModule(PartlyCopied, nn.Module):
    """An ``nn.Module`` whose buffers are state: they keep their dtype under ``.to(bfloat16)``, ``.half()`` and the like.

    They keep their values, too: where the model is moved to the meta device or materialised from it (``to_empty``), and
    where a state dict does not fit, which is found before anything of it is loaded.
    """

    #: Buffers that may hold any value; all others are finite and not negative.
    any_values: ClassVar[tuple[str, ...]] = ()
    #: Buffers on a device that were read, with their version and value then: a device is waited for when they changed.
    _read: Any = None
    in_a_copy: ClassVar[dict[str, Any]] = {"_read": None}

    def _value(self, name: str) -> Any:
        """Return the value of a 0-dim buffer, whoever wrote it."""
        buffer = self._buffers[name]
        assert buffer is not None
        if buffer.device.type == "cpu":
            return buffer.item()
        known, version = (self._read or {}).get(name), version_of(buffer)
        if known is None or known[0] is not buffer or known[1] != version:
            known = buffer, version, 0 if buffer.is_meta else buffer.item()
            self._read = {**(self._read or {}), name: known}
        return known[2]

    def _set_value(self, name: str, value: float) -> None:
        buffer = self._buffers[name]
        assert buffer is not None
        buffer.fill_(value)
        if buffer.device.type != "cpu":
            self._read = {**(self._read or {}), name: (buffer, version_of(buffer), value)}

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        self._buffers[name] = tensor  # tools that build on the meta device replace it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            if tensor.is_meta:
                return fn(tensor)
            device = fn(torch.zeros((), dtype=torch.float32, device=tensor.device)).device
            if device.type == "meta":
                return tensor
            if device == tensor.device:
                fn(tensor)  # in place, or for nothing:
                return tensor  # what fn made has fewer digits, or no values
            return tensor.to(device=device, dtype=state_dtype(device) if tensor.is_floating_point() else tensor.dtype)

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise :class:`StateMismatchError` for what this and the modules in it cannot take."""
        for name, buffer in self._buffers.items():
            value = state_dict.get(prefix + name)
            if buffer is None or value is None:
                continue
            what = f"{prefix + name!r} in the state dict"
            if not isinstance(value, Tensor):
                raise StateMismatchError(f"{what} is a {type(value).__name__}, expected a tensor. {_ANOTHER}")
            if value.shape != buffer.shape and not (buffer.ndim == 0 and value.shape == (1,)):
                raise StateMismatchError(
                    f"{what} has shape {list(value.shape)}, expected {list(buffer.shape)}: it was saved with another number "
                    f"of tasks. {_ANOTHER}"
                )
            if name not in self.any_values and not value.is_meta and not bool(((value >= 0) & value.isfinite()).all()):
                raise StateMismatchError(f"{what} holds NaN, infinite or negative values. {_ANOTHER}")
        for name, child in self.named_children():
            if isinstance(child, StateModule):
                child.check_loaded(state_dict, f"{prefix}{name}.")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict, or nothing of it if it does not fit."""
        state: Any = OrderedDict(state_dict)
        if hasattr(state_dict, "_metadata"):
            state._metadata = state_dict._metadata
        self.check_loaded(state, "")
        own = self.state_dict()
        if strict and state.keys() != own.keys():
            missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise StateMismatchError(
                f"the state dict lacks {missing[:6]} and has {unexpected[:6]} without a place. Pass the state_dict() of an "
                "object that was built alike, or strict=False to load what fits."
            )
        return super().load_state_dict(state, strict, assign)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.check_loaded(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SeededModule(StateModule):
    """Gives each random draw a CPU generator that depends on a seed and the number of the draw alone.

    So draws are the same in every process and after a resume, and leave the global generator alone. The seed is a part of
    the state: a loaded one counts, not the one this was built with.
    """

    any_values: ClassVar[tuple[str, ...]] = ("seed_in_use",)
    calls: Tensor
    seed_in_use: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise WrongTypeError(f"seed must be an int, found {type(seed).__name__}.")
        if not -(2**63) <= seed < 2**63:
            raise ConfigurationError(f"seed must fit into 64 bits, found {seed}.")
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=real_device()))
        self.register_buffer("seed_in_use", torch.tensor(seed, device=real_device()))

    @property
    def seed(self) -> int:
        """The seed in use."""
        return int(self._value("seed_in_use"))

    def generator_of(self, call: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + call) % 2**63)

    def next_generator(self) -> torch.Generator:
        """Return the generator of the next draw, and count it."""
        call = self._value("calls")
        self._set_value("calls", call + 1)
        return self.generator_of(call)
