"""The smallest classifier of each family of timm models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["families", "smallest_models"]


def families() -> list[str]:
    """Modules of timm that register models."""
    import timm

    return [str(module) for module in timm.list_modules() if timm.list_models(module=module)]


def smallest_models(chosen: Iterable[str], classes: int) -> dict[str, dict[str, Any]]:
    """``{family: {"model": name, "parameters": number}}``; the reason in place of them where no model can be built.

    Models are built without memory for their weights. Those without a classifier (encoders) count only where a family has
    no other.
    """
    import timm

    found: dict[str, dict[str, Any]] = {}
    for family in chosen:
        sizes: list[tuple[bool, int, str]] = []
        reason = "no model is registered"
        for name in timm.list_models(module=family):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, num_classes=classes)
            except Exception as error:  # of timm or of one of its models: told in the table
                reason = f"{type(error).__name__}: {error}"
                continue
            encoder = getattr(model, "num_classes", 0) != classes
            sizes.append((encoder, sum(parameter.numel() for parameter in model.parameters()), name))
        if sizes:
            _, parameters, name = min(sizes)
            found[family] = {"model": name, "parameters": parameters}
        else:
            found[family] = {"model": None, "parameters": None, "reason": reason}
    return found
