"""Whether a loss counts its labels, measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def takes_means(
    loss_with: Callable[[Any], Tensor], items: Any, gather: Callable[[Tensor], Tensor] | None
) -> bool | None:
    """Whether a loss does not depend on the number of items; ``None`` if a loss of 0 or NaN does not tell.

    ``gather`` joins what several processes found, which have to agree.
    """
    with torch.no_grad():
        loss, with_twice_as_many = loss_with(items), loss_with(2 * items)
    # 0: says nothing, 1: a mean, 2: counts its labels.
    says = torch.zeros(1, device=loss.device)
    if torch.isfinite(loss) and loss != 0:
        says += 1 if torch.equal(loss, with_twice_as_many) else 2
    found = says if gather is None else gather(says)
    known = found[found > 0]
    return None if not len(known) else bool((known == 1).all())
