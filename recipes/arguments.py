"""Kinds of command-line arguments, with errors that say what to type instead."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

__all__ = ["folder_name", "real_number", "whole_number"]


def whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"found {text!r}. Type a whole number from {least} on, such as {least + 2}.")

    return parse


def real_number(above_zero: bool) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and (value > 0 or (value == 0 and not above_zero)):
            return value
        least = "above 0" if above_zero else "from 0 on"
        raise argparse.ArgumentTypeError(f"found {text!r}. Type a finite number {least}, such as 0.1.")

    return parse


def folder_name(text: str) -> str:
    if text in ("", ".", "..") or Path(text).name != text or "\\" in text:
        raise argparse.ArgumentTypeError(f"found {text!r}. Type a plain folder name, such as first-run.")
    return text
