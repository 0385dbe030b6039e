"""Checks of single arguments, and the warning that points at the user's own line."""

from __future__ import annotations

import math
import numbers
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import ConfigurationError, WrongTypeError

#: Where the user's own line is not: this package, and torch, through whose modules it is called.
_NOT_THE_USERS = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")


def whole_number(name: str, value: object, *, least: int = 0) -> int:
    """Return ``value`` as an int of at least ``least``; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise WrongTypeError(f"{name} must be an int, found {value!r} ({type(value).__name__}).")
    if value < least:
        raise ConfigurationError(f"{name} must be at least {least}, found {value}.")
    return int(value)


def non_negative_number(name: str, value: object) -> float:
    """Return ``value`` as a float, finite and ``>= 0``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise WrongTypeError(f"{name} must be a number, found {value!r} ({type(value).__name__}).")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ConfigurationError(f"{name} must be a finite number >= 0, found {value}.")
    return number


def positive_number(name: str, value: object) -> float:
    """Return ``value`` as a float, finite and ``> 0``."""
    number = non_negative_number(name, value)
    if number == 0:
        raise ConfigurationError(f"{name} must be a finite number > 0, found {value}.")
    return number


def share_below_one(name: str, value: object) -> float:
    """Return ``value`` as a float in ``[0, 1)``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise WrongTypeError(f"{name} must be a number in [0, 1), found {value!r} ({type(value).__name__}).")
    if not 0 <= float(value) < 1:
        raise ConfigurationError(f"{name} must be in [0, 1), found {value}.")
    return float(value)


def check_choice(what: str, value: object, allowed: Sequence[object]) -> None:
    """Raise an error for a value that is not among those ``allowed``."""
    if value not in allowed:
        raise ConfigurationError(f"unknown {what} {value!r}. Choose one of {', '.join(map(repr, allowed))}.")


def derives_from(value: object, *class_names: str) -> bool:
    """Tell whether a base class has one of these names: for classes of packages that may not be installed."""
    return any(base.__name__ in class_names for base in type(value).__mro__)


def users_place(error: BaseException) -> str:
    """Return the last place in the user's code that an error came through, `` (file:line)``, or nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if not one.filename.startswith((*_NOT_THE_USERS, "<frozen"))]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def warn_user(message: str) -> None:
    """Warn at the user's line: the innermost one that is neither in this package nor in torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
