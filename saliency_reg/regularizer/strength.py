"""How strong the penalty is in each optimizer step."""

from __future__ import annotations

from .options import Options


def strength_at(step: int, options: Options) -> float:
    """Return 0 for ``start_step`` optimizer steps, then a linear rise over ``warmup_steps``, then ``strength``."""
    since_start = step - options.start_step
    if since_start < 0:
        return 0.0
    return options.strength * min(1.0, (since_start + 1) / max(options.warmup_steps, 1))
