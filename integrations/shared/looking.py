"""Running a model once to look at it, without leaving a trace; and finding what is inside of its wrappers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ...capture import FeatureCapture


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode, and nothing is captured; after it, modes and random numbers are as before.

    In eval mode nothing updates statistics, and dropout and stochastic depth draw nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    captures = [(capture, capture.enabled) for capture in FeatureCapture.attached_to(model)]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for capture, _ in captures:
                capture.enabled = False
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for capture, enabled in captures:
                capture.enabled = enabled


def unwrapped(model: nn.Module, sign: str) -> nn.Module:
    """Return the model inside of ``DistributedDataParallel`` or ``torch.compile``, which has an attribute ``sign``."""
    model = getattr(model, "_orig_mod", model)
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, sign) else model


def first_line(error: BaseException) -> str:
    """Return what an error of another library says, in one line."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200].rstrip(".")
