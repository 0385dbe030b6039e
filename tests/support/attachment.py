"""What a regularizer puts on a model, and relations that count all pairs alike."""

from __future__ import annotations

from torch import nn

from saliency_reg import RelationWeights

TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Everything on the modules that is not a tensor or a sub-module."""
    return {
        f"{name}.{key}": (list(value) if key in TABLES else repr(type(value)))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_modules", "_buffers")
    }


def is_clean(model: nn.Module) -> bool:
    """No hook, and no attribute that a class does not have."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "__getstate__" in vars(module)
        for module in model.modules()
    ) and not {"forward_head", "forward_features", "forward"} & set(vars(model))


def uniform(tasks: int) -> RelationWeights:
    """All pairs weigh 1."""
    return RelationWeights(tasks, "fixed", mass=float(tasks * (tasks - 1) // 2))
