"""Regularizers and surgeries that are attached to a model, while something else runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from saliency_reg.capture.feature_capture import FeatureCapture
from saliency_reg.torch_tools.hooks import is_hooked

__all__ = ["paused"]


@contextlib.contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Within, forwards of ``model`` are not captured; one that waits to be read stays as it is."""
    captures = _captures_on(model)
    before = [capture.enabled for capture in captures]
    try:
        for capture in captures:
            capture.enabled = False
        yield
    finally:
        for capture, enabled in zip(captures, before):
            capture.enabled = enabled


def _captures_on(model: nn.Module) -> list[FeatureCapture]:
    found: dict[int, FeatureCapture] = {}
    for module in model.modules():
        if not is_hooked(module):
            continue
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
            reference = getattr(hook, "_method", None)  # weak: a hook does not keep its owner alive
            method = reference() if callable(reference) else None
            owner = getattr(method, "__self__", None)
            if isinstance(owner, FeatureCapture):
                found[id(owner)] = owner
    return list(found.values())
