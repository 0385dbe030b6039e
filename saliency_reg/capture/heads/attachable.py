"""Whether hooks can be set on the heads of a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...errors import AlreadyAttachedError, ConfigurationError
from ...torch_tools import is_hooked
from .branches import Branch, first_part, last_part
from .resolve import Heads


def check_attachable(model: nn.Module, heads: Heads, *, run_all: bool, instead_of: Sequence[object] = ()) -> None:
    """Refuse models and heads that cannot be captured; hooks of the owners ``instead_of`` do not count."""
    if isinstance(model, nn.DataParallel):
        raise ConfigurationError(
            "a DataParallel model runs copies of the heads, which cannot be captured. Use DistributedDataParallel, or "
            "pass model.module and run it unwrapped."
        )
    if run_all and any(isinstance(head, Branch) for head in heads.modules):
        raise ConfigurationError(
            "run_all_heads=True calls heads, and a head of several modules cannot be called. Leave it out, or make each "
            "head one module."
        )
    for name, module in zip(heads.names, heads.modules):
        if is_hooked(first_part(module), instead_of) or is_hooked(last_part(module), instead_of):
            raise AlreadyAttachedError(
                f"a regularizer or surgery is attached to head {name!r} already. Call .remove() on it first, or use it; "
                "for a regularizer with surgery, use SaliencyRegularizer(..., surgery=PCGrad())."
            )
