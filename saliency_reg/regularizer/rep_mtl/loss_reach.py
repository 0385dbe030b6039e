"""Whether the penalties reach the backbone: the losses decide, where heads are piecewise linear."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from ..reach import HeadForm, Reach

logger = logging.getLogger("saliency_reg")

_NO_REACH = (
    "The penalties of Rep-MTL do not reach the backbone: the losses have a locally constant derivative (L1, hinge), and the "
    "heads are piecewise linear (Linear, ReLU), so that no loss saliency changes with the feature map. They train the heads "
    "only. Use a loss that curves (cross-entropy, squared error) or a smooth activation such as GELU in the heads."
)


class LossReach(Reach):
    """Measures it, unless the heads are smooth: the losses are of the user, and no layer tells what they are."""

    def __init__(self, heads: Sequence[nn.Module] | None, custom_backward: str) -> None:
        super().__init__(heads, "loss", "auto", custom_backward)
        self.reaches = True if self.form is HeadForm.SMOOTH else None

    def tell(self) -> None:
        """Log it if the penalties do not reach the backbone."""
        if self.reaches is False:
            logger.warning(_NO_REACH)
