"""Factors and their levels: what is varied, one at a time, and from where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .methods import UNLABELLED

DIGITS, GROUPS = "digits", "hsb82"


@dataclass(frozen=True)
class Level:
    """One choice.

    Attributes:
        label: for people.
        key: of its setting, after that of the factor; empty for the level that all factors of the data have in common.
        values: of the setting, that are others than there.
        variant: of the methods with the penalty; for all others such a level is the common one.
    """

    label: str
    key: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""


@dataclass(frozen=True)
class Factor:
    """What is varied, in the order of its levels."""

    key: str
    label: str
    levels: tuple[Level, ...]


def _of_method(key: str, label: str, common: str, variants: Mapping[str, str]) -> Factor:
    return Factor(key, label, (Level(common), *(Level(text, own, variant=own) for own, text in variants.items())))


_RULE = ("rule", "relation rule", "entropic")
_METRIC = ("metric", "distance of saliencies", "cosine")
#: The first one of each factor is the common one, unless the levels have an order.
FACTORS: dict[str, tuple[Factor, ...]] = {
    DIGITS: (
        _of_method(
            *_RULE, {"uniform": "uniform", "projected": "projected", "per_task": "per task", "authors": "authors"}
        ),
        _of_method(*_METRIC, {"l1": "l1", "sqchordal": "squared chordal"}),
        _of_method("pooling", "pooling over positions", "sum", {"mean": "mean", "unpooled": "none"}),
        _of_method("target", "saliency of", "outputs", {"loss": "losses"}),
        _of_method(
            "unlabelled",
            "unlabelled images per labelled one",
            "0",
            {f"unlabelled-{count}": f"{count}" for count in UNLABELLED},
        ),
        Factor("activation", "heads", (Level("GELU"), Level("ReLU", "relu", {"activation": "relu"}))),
        Factor(
            "tasks",
            "number of tasks",
            (*(Level(f"{tasks}", f"{tasks}", {"tasks": tasks}) for tasks in (2, 5)), Level("10")),
        ),
        # As many steps, of more images.
        Factor(
            "size",
            "training images of each digit",
            (
                Level("2", "2", {"train_per_class": 2, "batch_size": 4}),
                Level("5"),
                Level("20", "20", {"train_per_class": 20, "batch_size": 40}),
            ),
        ),
        Factor(
            "missing",
            "labels removed",
            (
                Level("0 %"),
                *(Level(f"{100 * share:.0f} %", f"{100 * share:.0f}", {"missing": share}) for share in (0.5, 0.8)),
            ),
        ),
    ),
    GROUPS: (
        _of_method(*_RULE, {"uniform": "uniform", "projected": "projected", "per_task": "per task"}),
        _of_method(*_METRIC, {"l1": "l1", "sqchordal": "squared chordal"}),
        Factor(
            "tasks",
            "number of schools",
            (*(Level(f"{groups}", f"{groups}", {"groups": groups}) for groups in (10, 40)), Level("159")),
        ),
        Factor(
            "size",
            "training rows of each school",
            (
                Level("5", "5", {"rows": 5}),
                Level("10"),
                Level("20", "20", {"rows": 20, "validation_rows": 5}),
            ),
        ),
    ),
}
#: Of either data, each once.
NAMES = tuple(dict.fromkeys(factor.key for factors in FACTORS.values() for factor in factors))


def setting_key(data: str, factor: Factor, level: Level) -> str:
    """The name of the setting of a level."""
    return f"{data}-{factor.key}-{level.key.removeprefix(f'{factor.key}-')}" if level.key else data
