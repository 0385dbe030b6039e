"""The whole state of a training: collected from all processes for a checkpoint, and put back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..methods.attach import Backward
from ..runtime.errors import CheckpointError, CheckpointMismatchError, OptionError
from ..runtime.log import RunLog
from ..runtime.processes import Ranks
from ..runtime.random_state import derived_seed, load_random_state, random_state, seed_all
from .checkpoints import Checkpoints, check, load, step_of
from .loss_sums import LossSums

__all__ = ["Parts", "Position", "SavedTraining", "Stateful"]


class Stateful(Protocol):
    """Anything whose state belongs into checkpoints: tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass
class Position:
    """How far a training is: optimizer steps in all, whole epochs, and steps of the present epoch."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


@dataclass(frozen=True)
class Parts:
    """What a checkpoint holds.

    Attributes:
        identity: plain values that have to be the same in a resumed training.
        model, optimizer, scheduler, scaler, backward: of the training; there may be no scaler.
        others: what else was given, under names.
        sums: of each process, under names.
        position: of the training, which is changed in place.
        seed: of the training, for processes without a saved random state.
    """

    identity: Mapping[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Stateful
    scaler: Stateful | None
    backward: Backward
    others: Mapping[str, Stateful]
    sums: Mapping[str, LossSums]
    position: Position
    seed: int


class SavedTraining:
    """The checkpoints of a training in several processes, of which the main one writes.

    Args:
        folder: of the training.
        keep: how many checkpoints.
        parts: what they hold.
        ranks: the processes.
        device: of this process.
        log: which is cut back to the checkpoint that is loaded.
    """

    def __init__(self, folder: Path, keep: int, parts: Parts, ranks: Ranks, device: torch.device, log: RunLog) -> None:
        self.checkpoints = Checkpoints(folder, keep)
        self._parts = parts
        self._ranks = ranks
        self._device = device
        self._log = log
        self._saved_step: int | None = None
        self._read_back = False

    def save(self) -> bool:
        """Write a checkpoint, on all processes; whether it is there. A disk that is full does not end the training.

        Raises:
            CheckpointError: it cannot be written or read again for another reason, which the main process tells; on all.
        """
        parts = self._parts
        if self._saved_step == parts.position.step:
            return True
        own = {
            "random": random_state(self._device),
            "sums": {name: sums.state_dict() for name, sums in parts.sums.items()},
        }
        of_ranks = self._ranks.of_all(own)
        written, failure, failed = False, None, None
        if self._ranks.is_main:
            try:
                written = self._write(of_ranks)
            except Exception as error:
                failure, failed = error, f"{type(error).__name__}: {error}"
        # What happened to the main process is known to all: the others would wait for it, or it for them.
        written, failed = self._ranks.from_main((written, failed))
        if failure is not None:
            raise failure
        if failed is not None:
            raise CheckpointError(f"the main process could not write a checkpoint ({failed}).")
        self._saved_step = parts.position.step if written else None
        return bool(written)

    def _write(self, of_ranks: list[dict[str, Any]]) -> bool:
        parts = self._parts
        about = {**parts.identity, "processes": self._ranks.size, "log_bytes": self._log.settle()}
        try:
            written = self.checkpoints.save(parts.position.step, self._content(of_ranks), about)
        except OSError as error:
            self._complain(
                f"no checkpoint could be written at step {parts.position.step} in {self.checkpoints.folder} "
                f"({error.strerror}). Training goes on; there are {len(self.checkpoints.all())} older ones, which are whole."
            )
            return False
        if not self._read_back:  # now, and not when it is needed
            self._read_back = True
            for part in ("training", "others", "processes"):
                load(written, part)
        return True

    def resume(self, how: str | Path) -> None:
        """Put everything back, on all processes; ``how`` as in :meth:`recipes.training.engine.Engine.run`.

        Raises:
            OptionError, CheckpointError, SaliencyRegError: as there.
        """
        chosen: str | None = None
        failure: Exception | None = None
        if self._ranks.is_main:
            try:
                path = self._choose(how)
                chosen = None if path is None else str(path)
            except Exception as error:
                failure = error
        # An error of the main process is one of all: the others would wait.
        chosen, failed = self._ranks.from_main((chosen, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        if failed is not None:
            raise CheckpointError(failed)
        if chosen is not None:
            self._load(Path(chosen))

    def _content(self, of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
        parts = self._parts
        training = {
            "optimizer": parts.optimizer.state_dict(),
            "scheduler": parts.scheduler.state_dict(),
            "scaler": None if parts.scaler is None else parts.scaler.state_dict(),
            "backward": parts.backward.state_dict(),
            "epoch": parts.position.epoch,
            "step_in_epoch": parts.position.step_in_epoch,
        }
        return {
            "model": parts.model.state_dict(),
            "training": training,
            "others": {name: part.state_dict() for name, part in parts.others.items()},
            "processes": of_ranks,
        }

    def _choose(self, how: str | Path) -> Path | None:
        checkpoints = self.checkpoints
        if how == "never":
            if found := checkpoints.all():
                raise OptionError(
                    f"{checkpoints.folder} has checkpoints, the newest of step {step_of(found[-1])}. Use --resume auto to "
                    "go on there, or choose another folder."
                )
            checkpoints.clean()
            self._log.start_anew()
            return None
        checkpoints.clean()
        if how == "auto":
            complaints: list[str] = []
            path = checkpoints.newest(complaints.append)
            if path is None:
                self._log.start_anew()
            else:
                self._log.cut(int(check(path)["log_bytes"]))
            for complaint in complaints:
                self._complain(complaint)
            return path
        path = Path(how)
        manifest = check(path)
        if later := [other.name for other in checkpoints.all() if step_of(other) > step_of(path)]:
            raise OptionError(
                f"{checkpoints.folder} has later checkpoints than {path.name}: {', '.join(later)}. Remove them first, or "
                "use --resume auto."
            )
        if path.parent.resolve() == checkpoints.folder.resolve():
            self._log.cut(int(manifest["log_bytes"]))
        else:  # the checkpoint of another run, with a log of its own
            self._log.start_anew()
        return path

    def _load(self, path: Path) -> None:
        parts = self._parts
        manifest = check(path)
        for name, value in parts.identity.items():
            if manifest.get(name) != value:
                raise CheckpointMismatchError(
                    f"{path} was saved with {name} {manifest.get(name)}, but here it is {value}. Choose the same, or "
                    "another folder."
                )
        training, others = load(path, "training"), load(path, "others")
        # First: its errors say best what is another one.
        parts.backward.load_state_dict(training["backward"])
        if set(others) != set(parts.others):
            raise CheckpointMismatchError(
                f"{path} was saved with the states {sorted(others)}, but here they are {sorted(parts.others)}. Choose "
                "another folder."
            )
        try:
            parts.model.load_state_dict(load(path, "model"))
            parts.optimizer.load_state_dict(training["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointMismatchError(
                f"{path} was saved by another model or optimizer: {error}. Choose the same, or another folder."
            ) from error
        parts.scheduler.load_state_dict(training["scheduler"])
        if parts.scaler is not None and training["scaler"] is not None:
            parts.scaler.load_state_dict(training["scaler"])
        for name, part in parts.others.items():
            part.load_state_dict(others[name])
        parts.position.step = step_of(path)
        parts.position.epoch, parts.position.step_in_epoch = training["epoch"], training["step_in_epoch"]
        self._load_own(load(path, "processes"))

    def _load_own(self, of_ranks: list[dict[str, Any]]) -> None:
        rank = self._ranks.rank
        for name, sums in self._parts.sums.items():
            saved = [of_rank["sums"][name] for of_rank in of_ranks]
            if len(saved) == self._ranks.size:
                sums.load_state_dict(saved[rank])
            else:  # in another number of processes, the main one has the sums of all
                sums.load_state_dict(LossSums.joined(saved, only_counts=rank > 0))
        if rank < len(of_ranks):
            load_random_state(of_ranks[rank]["random"], self._device)
        else:
            seed_all(derived_seed("resumed", self._parts.seed, rank, self._parts.position.step))

    def _complain(self, message: str) -> None:
        warnings.warn(message, stacklevel=2)
        self._log.write("warning", {"message": message})
