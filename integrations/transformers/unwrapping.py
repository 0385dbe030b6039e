"""Finding the model of transformers inside of its wrappers."""

from __future__ import annotations

from torch import nn

from ..shared.looking import unwrapped


def unwrapped_model(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside of DistributedDataParallel, ``torch.compile``, or a peft model."""
    model = unwrapped(model, "config")
    peft = getattr(model, "get_base_model", None)
    found = peft() if hasattr(model, "peft_config") and callable(peft) else model
    return found if isinstance(found, nn.Module) else model
