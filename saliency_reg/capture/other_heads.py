"""Running the heads that a forward did not run, as those that did were called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, ConfigurationError, SaliencyRegError
from ..torch_tools import warn_user
from .forward import RecordedForward
from .heads import Heads
from .nested import first_tensor, taken_by


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
