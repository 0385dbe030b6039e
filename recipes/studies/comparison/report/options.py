"""What the door of a comparison gives its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Of the model that learns nothing from the inputs, and of separate networks, in every study that has them.
TRIVIAL, SINGLE_TASK = "constant", "single_task"


@dataclass(frozen=True)
class Published:
    """Figures that a paper printed: in a table of their own, since data, networks and tuning were others.

    Attributes:
        title: data set and network.
        source: the paper, and the place in it.
        figures: method to metric to value, in the paper's words and digits.
    """

    title: str
    source: str
    figures: Mapping[str, Mapping[str, str | float]]


@dataclass(frozen=True)
class Comparison:
    """Makes the report of a study that of a comparison of many methods.

    Its question is whether anything beats the tuned baseline: intervals and the verdict hold for all methods at once, and
    the report has what methods cost, their gain over single-task, and their ranks.

    Attributes:
        published: figures of papers on the same data.
    """

    published: Sequence[Published] = ()
