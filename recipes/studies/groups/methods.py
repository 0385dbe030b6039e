"""The methods that are compared on groups, and the values that are tried for each."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...methods.methods import METHODS as COMMON
from ...methods.methods import Method, Methods
from ..trials import Space


@dataclass(frozen=True)
class GroupMethod(Method):
    """A way to learn the groups.

    Attributes:
        closed: fitted without any value to tune, and without a network.
    """

    closed: bool = False

    @property
    def parameter(self) -> str:
        """A fit that is closed tunes nothing."""
        return "" if self.closed else super().parameter


METHODS = Methods()
CONSTANT = METHODS.add(GroupMethod("constant", "Mean of the group", closed=True)).key
SINGLE_TASK = METHODS.add(GroupMethod("single_task", "Single-task", architecture="single_task")).key
HARD_SHARING = METHODS.add(GroupMethod("hard_sharing", "Hard sharing")).key
POOLED = METHODS.add(GroupMethod("pooled", "One head, intercept per group")).key
MIXED_MODEL = METHODS.add(GroupMethod("mixed_model", "Mixed model", closed=True)).key
#: It tunes nothing, so that it can learn from the validation rows, too.
MIXED_MODEL_MORE = METHODS.add(GroupMethod("mixed_model_more", "Mixed model, validation rows too", closed=True)).key
# With linear columns the squared distance of all pairs is that from their mean, times a number.
METHODS.add(GroupMethod("mean_regularised", "Mean-regularised", rule="fixed", metric="sqeuclidean"))
for _key in (
    *("srdml_uniform", "srdml_uniform_cosine", "srdml"),
    *("srdml_sqeuclidean", "srdml_cosine", "srdml_sqchordal", "srdml_default"),
):
    _common = COMMON[_key]
    METHODS.add(GroupMethod(**{entry.name: getattr(_common, entry.name) for entry in fields(Method)}))

#: As many values for each that tunes one.
SPACES: dict[str, Space] = {
    "weight decay": (0.0, 1.0, 3.0, 10.0, 30.0, 100.0),
    "share": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    **{key: ({},) for key, method in METHODS.items() if isinstance(method, GroupMethod) and method.closed},
}
