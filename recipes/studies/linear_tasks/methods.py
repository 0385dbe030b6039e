"""The methods that learn the linear tasks, and the values that are tried for each."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from ...methods.methods import METHODS as COMMON
from ...methods.methods import Method, Methods, package_defaults

SINGLE_TASK = ("single_task", "single_ridge")
Grid = tuple[dict[str, float], ...]


@dataclass(frozen=True)
class LinearMethod(Method):
    """A way to learn the tasks, with a linear layer before them if it is ``shared``.

    Attributes:
        grid: hyper-parameters by name, for each trial. Closed forms have none: they choose on validation for every seed.
    """

    grid: Grid = ({},)

    @property
    def parameter(self) -> str:
        """Values name what they tune."""
        return "" if self.tuned else super().parameter


def _read() -> Iterator[LinearMethod]:
    """Those of methods.json; grids were laid out by validation errors of the seeds 1000 to 1002."""
    text = resources.files(__package__).joinpath("methods.json").read_text(encoding="utf-8")
    for group in json.loads(text):
        grid = _combinations(group["grid"])
        for entry in group["methods"]:
            common = COMMON.get(entry["key"])
            surgery = None if common is None else common.surgery
            yield LinearMethod(**{**entry, "earlier": tuple(entry.get("earlier", ()))}, surgery=surgery, grid=grid)
    default = COMMON["srdml_default"]
    yield LinearMethod(default.key, default.label, architecture="single_task", **package_defaults())


def _combinations(values: dict[str, Sequence[float]]) -> Grid:
    """The first name changes fastest."""
    found = itertools.product(*reversed(values.values()))
    return tuple(dict(zip(values, reversed(combination))) for combination in found)


#: Those of the published table are the ones that are tuned.
METHODS = Methods()
_GRIDS = {METHODS.add(method).key: method.grid for method in _read()}
MOST_TRIALS = max(map(len, _GRIDS.values()))


def grids(trials: int = MOST_TRIALS) -> dict[str, Grid]:
    """At most so many values for each method, evenly spread over its grid."""
    return {
        key: tuple(grid[int((index + 0.5) * len(grid) / trials)] for index in range(trials))
        if len(grid) > trials
        else grid
        for key, grid in _GRIDS.items()
    }
