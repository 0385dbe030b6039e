"""Whether a loss counts its labels, measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def takes_means(
    loss: Tensor, with_twice_as_many: Tensor, gather: Callable[[Tensor], Tensor] | None = None
) -> bool | None:
    """Whether a loss does not depend on ``num_items_in_batch``; ``None`` if a loss of 0 or NaN does not tell.

    Args:
        loss, with_twice_as_many: of the same micro-batch.
        gather: over the processes, which have to agree.
    """
    # 0: says nothing, 1: a mean, 2: counts its labels.
    says = torch.zeros(1, device=loss.device)
    if torch.isfinite(loss) and loss != 0:
        says += 1 if torch.equal(loss, with_twice_as_many) else 2
    found = says if gather is None else gather(says)
    known = found[found > 0]
    return None if not len(known) else bool((known == 1).all())
