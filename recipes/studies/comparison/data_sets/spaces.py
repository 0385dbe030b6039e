"""The values that methods try for the one hyper-parameter that they tune, as many for each."""

from __future__ import annotations

from ...trials import Space

#: Of the penalty in the losses: where it trains heads alone, and where it reaches the backbone through smooth heads.
SHARES_ON_HEADS, SHARES_THROUGH_HEADS = (0.1, 0.3, 1.0), (0.001, 0.01, 0.1)
#: By what is tuned; three for each. A data set may have others.
SPACES: dict[str, Space] = {
    "weight decay": (0.0, 0.05, 0.5),
    "share": SHARES_THROUGH_HEADS,
    "strength, lasso": (0.001, 0.01, 0.1),
    "strength, l21": (0.01, 0.1, 1.0),
    "strength, mean": (0.001, 0.03, 1.0),
    "strength, mrn": (0.001, 0.01, 0.1),
    "strength, mtrl": (0.001, 0.01, 0.1),
    "strength, rep_mtl": (0.01, 0.1, 0.9),
    "strength, soft_sharing": (0.001, 0.01, 0.1),
    "scaling": (0.1, 0.3, 1.0),
    "constant": ({},),
}
