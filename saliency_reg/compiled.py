"""Whether a model is compiled where it cannot be."""

from __future__ import annotations

from torch import nn

from .errors import ConfigurationError
from .heads import Heads

__all__ = ["check_not_compiled"]


def check_not_compiled(model: nn.Module, heads: Heads) -> None:
    """Compiled code has no second derivative, and a model compiled as a whole hides what its hooks would see.

    Raises:
        ConfigurationError: the model or a part of a head is compiled.
    """
    inside = [
        (f"{name}.{inner}" if inner else name, module)
        for name, head in zip(heads.names, heads.modules)
        for inner, module in head.named_modules()
    ]
    heads_inside = {id(head) for head in heads.modules}
    around = [
        (name or "the model", module)
        for name, module in model.named_modules()
        if _is_compiled(module) and any(id(part) in heads_inside for part in module.modules())
    ]
    for name, module in [*around, *inside]:
        if _is_compiled(module):
            raise ConfigurationError(
                f"{name} is compiled by torch.compile, which has no second derivative and hides what hooks see. Compile the "
                "backbone alone: model.backbone = torch.compile(model.backbone)."
            )


def _is_compiled(module: nn.Module) -> bool:
    # Not hasattr: a wrapper may pass unknown names on to a part of it.
    return "_orig_mod" in vars(module).get("_modules", {}) or vars(module).get("_compiled_call_impl") is not None
