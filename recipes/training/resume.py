"""The whole state of a training: collected from all processes for a checkpoint, and put back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..methods.backward import Backward
from ..runtime.errors import CheckpointMismatchError, OptionError
from ..runtime.log import RunLog
from ..runtime.processes import Ranks
from ..runtime.random_state import derived_seed, load_random_state, random_state, seed_all
from .checkpoints import Checkpoints, check, load, step_of
from .loss_sums import LossSums
from .options import Options


class Stateful(Protocol):
    """Anything whose state belongs into checkpoints: tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass
class Position:
    """How far a training is: optimizer steps in all, and whole epochs."""

    step: int = 0
    epoch: int = 0


@dataclass
class SavedTraining:
    """The checkpoints of a training in several processes, of which the main one writes.

    Attributes:
        log: is cut back to the checkpoint that is loaded.
        identity: plain values that have to be the same in a resumed training.
        position: is changed in place.
        states: of the optimizer and the like.
        others: what does not belong to the engine.
        sums: of each process.
    """

    checkpoints: Checkpoints
    ranks: Ranks
    device: torch.device
    log: RunLog
    identity: Mapping[str, Any]
    seed: int
    position: Position
    model: nn.Module
    backward: Backward
    states: Mapping[str, Stateful]
    others: dict[str, Stateful]
    sums: Mapping[str, LossSums]
    _saved_step: int | None = None
    _read_back: bool = False

    def save(self) -> bool:
        """Write a checkpoint, on all processes; whether it is there. A disk that is full does not end the training.

        Raises:
            RecipeError: it cannot be written or read again for another reason, which the main process tells; on all.
        """
        if self._saved_step == self.position.step:
            return True
        sums = {name: own.state_dict() for name, own in self.sums.items()}
        of_ranks = self.ranks.of_all({"random": random_state(self.device), "sums": sums})
        written = self.ranks.by_main("write a checkpoint", lambda: self._write(of_ranks))
        self._saved_step = self.position.step if written else None
        return written

    def _write(self, of_ranks: list[dict[str, Any]]) -> bool:
        about = {**self.identity, "processes": self.ranks.size, "log_bytes": self.log.settle()}
        states = {"backward": self.backward, **self.states}
        content = {
            "model": self.model.state_dict(),
            "training": {"epoch": self.position.epoch, **_states(states)},
            "others": _states(self.others),
            "processes": of_ranks,
        }
        try:
            written = self.checkpoints.save(self.position.step, content, about)
        except OSError as error:
            self._complain(
                f"no checkpoint could be written at step {self.position.step} in {self.checkpoints.folder} "
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
        chosen = self.ranks.by_main("choose a checkpoint", lambda: self._choose(how))
        if chosen is not None:
            self._load(*chosen)

    def _choose(self, how: str | Path) -> tuple[Path, dict[str, Any]] | None:
        checkpoints = self.checkpoints
        if how == "never" and (found := checkpoints.all()):
            raise OptionError(
                f"{checkpoints.folder} has checkpoints, the newest of step {step_of(found[-1])}. Use --resume auto to "
                "go on there, or choose another folder."
            )
        checkpoints.clean()
        complaints: list[str] = []
        chosen = None
        if how == "auto":
            chosen = checkpoints.newest(complaints.append)
        elif how != "never":
            path = Path(how)
            chosen = path, check(path)
            if later := [other.name for other in checkpoints.all() if step_of(other) > step_of(path)]:
                raise OptionError(
                    f"{checkpoints.folder} has later checkpoints than {path.name}: {', '.join(later)}. Remove them first, "
                    "or use --resume auto."
                )
        if chosen is not None and chosen[0].parent.resolve() == checkpoints.folder.resolve():
            self.log.cut(int(chosen[1]["log_bytes"]))
        else:  # the checkpoint of another run has a log of its own
            self.log.start_anew()
        for complaint in complaints:
            self._complain(complaint)
        return chosen

    def _load(self, path: Path, manifest: Mapping[str, Any]) -> None:
        for name, value in self.identity.items():
            if manifest.get(name) != value:
                raise CheckpointMismatchError(
                    f"{path} was saved with {name} {manifest.get(name)}, but here it is {value}. Choose the same, or "
                    "another folder."
                )
        training, others = load(path, "training"), load(path, "others")
        # First: its errors say best what is another one.
        self.backward.load_state_dict(training["backward"])
        if set(others) != set(self.others):
            raise CheckpointMismatchError(
                f"{path} was saved with the states {sorted(others)}, but here they are {sorted(self.others)}. Choose "
                "another folder."
            )
        try:
            self.model.load_state_dict(load(path, "model"))
            for name, part in self.states.items():
                part.load_state_dict(training[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointMismatchError(
                f"{path} was saved by another model or optimizer: {error}. Choose the same, or another folder."
            ) from error
        for name, part in self.others.items():
            part.load_state_dict(others[name])
        self.position.step, self.position.epoch = step_of(path), training["epoch"]
        self._load_own(load(path, "processes"))

    def _load_own(self, of_ranks: list[dict[str, Any]]) -> None:
        rank = self.ranks.rank
        for name, sums in self.sums.items():
            saved = [of_rank["sums"][name] for of_rank in of_ranks]
            if len(saved) == self.ranks.size:
                sums.load_state_dict(saved[rank])
            else:  # in another number of processes, the main one has the sums of all
                sums.load_state_dict(LossSums.joined(saved, only_counts=rank > 0))
        if rank < len(of_ranks):
            load_random_state(of_ranks[rank]["random"], self.device)
        else:
            seed_all(derived_seed("resumed", self.seed, rank, self.position.step))

    def _complain(self, message: str) -> None:
        warnings.warn(message, stacklevel=2)
        self.log.write("warning", {"message": message})


def identity_of(
    tasks: Sequence[str], options: Options, samples: int, accelerator: Any, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """What has to be the same in a resumed training; micro-batches, processes and data workers may be others."""
    groups = optimizer.param_groups
    identity: dict[str, Any] = {
        "tasks": list(tasks),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "samples": samples,
        "clip_norm": options.clip_norm,
        "warmup_steps": options.warmup_steps,
        "decay": options.decay,
        "mixed precision": accelerator.mixed_precision,
        "dtype": str(groups[0]["params"][0].dtype),
        "learning rates": [float(group.get("initial_lr", group["lr"])) for group in groups],
        "weight decays": [float(group.get("weight_decay", 0.0)) for group in groups],
    }
    if options.decay != "constant":  # otherwise a training may be made longer
        identity["epochs"] = options.epochs
    return identity


def _states(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}
