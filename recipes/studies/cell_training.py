"""From a cell of a study to its result, in any process."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..runtime.processes import Ranks
from ..training.engine import LOG
from ..training.options import Options
from ..training.train import PRETRAINING
from .results_file import ResultsFile, key_of, timed
from .study import Cell, Trained

#: Names in the folder of a training.
_OF_ENGINE = ("checkpoint-*", f"{LOG}*", PRETRAINING, ".*")


class Result(Protocol):
    """What a training leaves."""

    def to_dict(self) -> dict[str, Any]:
        """With ``"validation"``, the score that is tuned by, and ``"macro"``, figures by metric."""


#: One training of a cell, on the data of a place, with a folder for checkpoints; a function that has a name, so that it
#: reaches workers. Only a reported cell may see the test split.
TrainOne = Callable[[Cell, Any, Path], Result]


@dataclass(frozen=True)
class CellTraining:
    """Trains cells.

    Attributes:
        train: one of them.
        data: folder or hub id.
        fingerprint: of the data.
        folder: of the checkpoints of trainings that are not finished.
        deadline: of ``time.time()``, after which no training begins.
        keeps: folders of finished trainings, for what trackers wrote.
        ranks: the processes that share each training; by default one.
    """

    train: TrainOne
    data: Any
    fingerprint: str
    folder: Path
    deadline: float | None = None
    keeps: bool = False
    ranks: Ranks | None = None

    def __call__(self, cell: Cell) -> Trained:
        """The cell, its result (``None`` after the deadline), and what else should be known about it."""
        if self._of_main(self.deadline is not None and time.time() > self.deadline):
            return cell, None, {}
        with timed(self.fingerprint) as about:
            outcome = self.train(cell, self.data, self._own(cell))
        return cell, self._of_main(outcome.to_dict()), about

    def forget(self, cell: Cell) -> None:
        """Remove the checkpoints of a training whose result is kept."""
        if not self.keeps and (self.ranks is None or self.ranks.is_main):
            shutil.rmtree(self._own(cell), ignore_errors=True)

    def forget_all(self, results: ResultsFile) -> None:
        """The same for results of runs that were killed before they removed them."""
        for own in list(self.folder.glob("*")) if not self.keeps else ():
            key, _, fingerprint = own.name.partition("-")
            if key in results and fingerprint == self.fingerprint and not _is_tracked(own):
                shutil.rmtree(own, ignore_errors=True)

    def _own(self, cell: Cell) -> Path:
        # The same values on other data, whose results are in another file, are another training.
        key = key_of(cell.to_dict())
        return self.folder / (f"{key}-{self.fingerprint}" if self.fingerprint else key)

    def _of_main(self, value: Any) -> Any:
        # Processes that share trainings have clocks, and rounding, of their own, but have to take the same decisions.
        return value if self.ranks is None else self.ranks.from_main(value)


def _is_tracked(folder: Path) -> bool:
    """Whether there is anything but what the engine writes: an earlier run may have had trackers."""
    return any(not any(map(path.match, _OF_ENGINE)) for path in folder.iterdir())


def cell_options(cell: Cell, **more: Any) -> Options:
    """The options of a cell's training that its setting names, on which its numbers depend.

    Args:
        cell: of which.
        more: options on which they depend up to rounding alone.
    """
    return dataclasses.replace(options_of(cell.setting.values), seed=cell.seed, **more)


def options_of(values: Mapping[str, Any]) -> Options:
    """The options that are among these values.

    Raises:
        OptionError: a value that cannot work.
    """
    names = {entry.name for entry in dataclasses.fields(Options)}
    return Options(**{name: value for name, value in values.items() if name in names})
