"""Running heads beside a forward: those that it did not run, and those that it did, once more on something else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, ConfigurationError, SaliencyRegError
from ..torch_tools import at_least_float32, warn_user, without_autocast, without_hooks
from .heads import Branch, Heads
from .nested import Item, first_tensor, pick, put_argument, taken_by, tensors_in
from .places import is_plainly

if TYPE_CHECKING:
    from .forward import RecordedForward


@dataclass
class HeadCall:
    """How a head was called in a forward, and the random state then: enough to run it again on another feature map."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    items: Sequence[Item]  # lead to the output in what it returns
    source: Tensor | None  # the first tensor among the arguments
    drawn_from: tuple[Tensor, Tensor | None]  # the random state of the CPU, and of the device of the source
    reduced: bool  # autocast was on

    @classmethod
    def of(
        cls,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        items: Sequence[Item],
        source: Tensor | None,
    ) -> HeadCall:
        on_gpu = source is not None and source.device.type == "cuda"
        state = (
            torch.get_rng_state(),
            torch.cuda.get_rng_state(source.device) if on_gpu and source is not None else None,
        )
        kind = "cpu" if source is None else source.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return cls(module, args, kwargs, items, source, state, autocast)

    def reads(self, feature: Tensor) -> bool:
        """Whether it was called with this tensor."""
        return any(tensor is feature or is_plainly(tensor, feature) for _, tensor in tensors_in(self.args, self.kwargs))

    def again(self, replaced: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Return the output for other feature maps, ``(old, new)`` each, with the random numbers of the forward.

        Nothing outside changes: not the random state, nor buffers, and no hook is called. Without gradients and autocast,
        in the format of the weights, which is at least float32 where there are none. Heads of several modules are run as a
        chain; whether that is what the model does, is for the caller to check.
        """
        weight = next((one for one in self.module.parameters() if one.is_floating_point()), None)
        args, kwargs = self.args, self.kwargs
        for path, tensor in list(tensors_in(args, kwargs)):
            new = next((new for old, new in replaced if tensor is old or is_plainly(tensor, old)), tensor)
            dtype = at_least_float32(new.dtype) if weight is None else weight.dtype
            args, kwargs = put_argument(args, kwargs, path, new.to(dtype))
        device = self.source.device if self.drawn_from[1] is not None and self.source is not None else None
        with (
            torch.random.fork_rng(devices=[] if device is None else [device]),
            torch.no_grad(),
            _buffers_kept(self.module),
            without_hooks(self.module),
            nullcontext() if self.source is None else without_autocast(self.source),
        ):
            torch.set_rng_state(self.drawn_from[0])
            if device is not None and self.drawn_from[1] is not None:
                torch.cuda.set_rng_state(self.drawn_from[1], device)
            if not isinstance(self.module, Branch):
                return pick(self.module(*args, **kwargs), self.items)
            first, *others = self.module
            found = first(*args, **kwargs)
            for part in others:
                found = part(found)
            return pick(found, self.items)


class OtherHeads:
    """Calls them; remembers how many axes the input of each head has in the model's own forwards."""

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._axes: dict[int, int] = {}
        self._told: set[int] = set()

    def run(self, recorded: RecordedForward, *, alone: bool) -> None:
        """Call the heads that did not run; what they draw is drawn apart from the model's random numbers.

        ``alone``: in this process, of which there are no others.
        """
        if not alone:
            raise ConfigurationError(
                "run_all_heads=True runs heads behind the model's forward, where DistributedDataParallel does not see them. "
                "In several processes run all heads in the forward, and take the loss of one."
            )
        if recorded.call is None:
            return
        args, kwargs, autocast = recorded.call
        source, ran = first_tensor(args, kwargs)[1], list(recorded.runs)
        axes = 0 if source is None else source.ndim
        self._note(ran, axes)
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        devices = sorted({one.device.index for one in tensors if one.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices), autocast:
            for index, module in enumerate(self._heads.modules):
                if index in recorded.runs or self._axes.get(index, axes) != axes:
                    continue
                try:
                    with _buffers_kept(module):
                        own_args, own_kwargs = taken_by(self._heads.names[index], module, args, kwargs)
                        module(*own_args, **own_kwargs)
                except (SaliencyRegError, torch.cuda.OutOfMemoryError):
                    raise
                except (RuntimeError, TypeError, ValueError, LookupError) as error:
                    shape = None if source is None else list(source.shape)
                    raise CaptureError(
                        f"run_all_heads=True cannot run head {self._heads.names[index]!r} on what head "
                        f"{self._heads.names[ran[0]]!r} was called with, shape {shape}: {error}. Leave heads that read "
                        "something else out of heads=, or run all heads in the model's forward and pass feature=..."
                    ) from error

    def _note(self, ran: Sequence[int], axes: int) -> None:
        """Remember what the heads of a forward read; tell once of heads that read something else."""
        self._axes.update(dict.fromkeys(ran, axes))
        others = {index for index, known in self._axes.items() if known != axes}
        if others <= self._told:
            return
        self._told |= {*others, *ran}
        listed = [f"{self._heads.names[index]!r} ({known} axes)" for index, known in sorted(self._axes.items())]
        warn_user(
            f"run_all_heads=True: the heads are called with tensors of different kinds, {', '.join(listed)}. A head is left "
            "out of batches whose tensor has another number of axes; distances from before each head had run in the model's "
            "forward may be of heads on tensors that they do not see in training. Give all heads one kind of tensor."
        )


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Within, buffers (running statistics) are copies, so that samples of another task do not move them."""
    before = [(own, name, buffer) for own in module.modules() for name, buffer in own._buffers.items()]
    try:
        for own, name, buffer in before:
            own._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for own, name, buffer in before:
            own._buffers[name] = buffer


def autocast_as_now(kind: str) -> AbstractContextManager[Any]:
    """Return a context with the autocast that is on now for this kind of device."""
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
