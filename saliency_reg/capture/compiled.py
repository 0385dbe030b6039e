"""Whether a model is compiled where it cannot be."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import ConfigurationError

__all__ = ["check_not_compiled"]

_COMPILED = (
    "{} is compiled by torch.compile, which has no second derivative and hides what hooks see. Compile the backbone alone: "
    "model.backbone.compile()."
)


def check_not_compiled(model: nn.Module, names: Sequence[str], heads: Sequence[nn.Module]) -> None:
    """Compiled code has no second derivative, and a model compiled as a whole hides what its hooks would see.

    Raises:
        ConfigurationError: the model or a part of a head is compiled.
    """
    inside = [
        (f"{name}.{inner}" if inner else name, module)
        for name, head in zip(names, heads)
        for inner, module in head.named_modules()
    ]
    heads_inside = {id(head) for head in heads}
    around = [
        (name or "the model", module)
        for name, module in model.named_modules()
        if _is_compiled(module) and any(id(part) in heads_inside for part in module.modules())
    ]
    for name, module in [*around, *inside]:
        if _is_compiled(module):
            raise ConfigurationError(_COMPILED.format(name))


def _is_compiled(module: nn.Module) -> bool:
    """Whether the module itself is compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    # Not hasattr: a wrapper may pass unknown names on to a part of it.
    return "_orig_mod" in vars(module).get("_modules", {}) or vars(module).get("_compiled_call_impl") is not None
