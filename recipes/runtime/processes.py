"""The data-parallel processes that a recipe was started with, and accelerators for its trainings."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import OptionError, RecipeError, need

Result = TypeVar("Result")

PRECISIONS = ("no", "bf16", "fp16")


def launched_precision() -> str:
    """What ``accelerate launch --mixed_precision`` was told."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


@contextlib.contextmanager
def started_ranks() -> Iterator[Any]:
    """Within, this process works with those that ``torchrun`` or ``accelerate launch`` started: a ``PartialState``."""
    joined = dist.is_available() and dist.is_initialized()
    # Without cpu=True, accelerate starts no process group where there is no GPU.
    state = need("accelerate").PartialState(cpu=not torch.cuda.is_available())
    try:
        yield state
    finally:
        if state.num_processes > 1 and not joined:
            state.destroy_process_group()


def open_accelerator(
    mixed_precision: str = "no",
    *,
    trackers: Sequence[str] = (),
    folder: Path | None = None,
    find_unused_parameters: bool = False,
) -> Any:
    """An ``accelerate.Accelerator`` for one training.

    Args:
        mixed_precision: one of :data:`PRECISIONS`, the same for all trainings of a process.
        trackers: names that accelerate knows, such as ``"tensorboard"``; ``folder`` is theirs.
        find_unused_parameters: for models with parameters that no loss depends on.

    Raises:
        OptionError: a format that the device does not have, or another one than before.
    """
    accelerate = need("accelerate")
    cpu = not torch.cuda.is_available()
    if mixed_precision not in PRECISIONS:
        raise OptionError(f"found the mixed precision {mixed_precision!r}. Use one of {', '.join(PRECISIONS)}.")
    if mixed_precision == "fp16" and cpu:
        raise OptionError("fp16 needs a GPU, and none was found. Use --mixed-precision bf16, or no.")
    # Of DistributedDataParallel, about speed: second derivatives are laid out in another way than first ones.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        return accelerate.Accelerator(
            mixed_precision=mixed_precision,
            cpu=cpu,
            log_with=list(trackers) or None,
            project_dir=None if folder is None else str(folder),
            # Accumulation is done by the engine, whatever accelerate's environment says.
            gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
        )
    except ValueError as error:
        if "mixed_precision" not in str(error):
            raise
        raise OptionError(
            f"this process has trained with another precision than {mixed_precision!r} before. Start a new one."
        ) from error


class Ranks:
    """Small collectives of the processes of an ``Accelerator`` or a ``PartialState``, on the host: no GPU is waited for.

    They do nothing in a single process.
    """

    _groups: ClassVar[dict[str | None, Any]] = {}
    _made_in: ClassVar[Any] = None

    def __init__(self, state: Any) -> None:
        self.size: int = state.num_processes
        self.rank: int = state.process_index
        self.is_main: bool = state.is_main_process

    @property
    def group(self) -> Any:
        """A group over all processes, for what is done within backward passes; ``None`` for a single one.

        Not the default one, in which DistributedDataParallel works at the same time; and one for all trainings, because
        each takes file handles as long as the process lives.
        """
        return self._kept(None) if self.size > 1 else None

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a tensor on the host; in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._host())
        return tensor

    def from_main(self, value: Any) -> Any:
        """What the main process has; small plain objects."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self._host())
        return box[0]

    def by_main(self, task: str, function: Callable[[], Result]) -> Result:
        """Call a function on the main process alone, and give all of them what it returns, or its error."""
        found: Any = None
        failure: BaseException | None = None
        told: BaseException | None = None
        if self.is_main:
            try:
                found = function()
            except (Exception, SystemExit) as error:
                failure = error
                reason = f"the main process could not {task} ({type(error).__name__}: {error})."
                told = error if isinstance(error, (RecipeError, SystemExit)) else RecipeError(reason)
        found, told = self.from_main((found, told))
        if told is not None:
            raise failure or told
        return found  # type: ignore[no-any-return]

    def of_all(self, value: Any) -> list[Any]:
        """What all processes have, on the host, in their order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._host())
        return values

    def same_weights(self, tensors: Sequence[Tensor]) -> None:
        """Give the tensors of the main process to all; in place, on the device."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def rows_of_all(self, own: Tensor) -> Tensor:
        """``[sum of n, ...]`` on the host: the rows ``[n, ...]`` of all processes, in their order."""
        parts = self.of_all(own.detach().cpu())
        formats = [(list(rows.shape[1:]), str(rows.dtype)) for rows in parts]
        if any(found != formats[0] for found in formats):
            raise OptionError(
                f"the processes predict rows of different shapes or formats: {formats}. Pad them to one length."
            )
        return torch.cat(parts)

    def _host(self) -> Any:
        return None if dist.get_backend() == "gloo" else self._kept("gloo")

    @classmethod
    def _kept(cls, backend: str | None) -> Any:
        if cls._made_in is not dist.group.WORLD:  # also after a new start of the default group
            cls._groups, cls._made_in = {}, dist.group.WORLD
        if backend not in cls._groups:
            cls._groups[backend] = dist.new_group(backend=backend)
        return cls._groups[backend]
