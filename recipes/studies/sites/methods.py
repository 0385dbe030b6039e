"""The methods that are compared on kinds of tasks at many sites, and the values that are tried for each."""

from __future__ import annotations

from dataclasses import dataclass

from ...methods.methods import Method, Methods
from ..trials import Space


@dataclass(frozen=True)
class SiteMethod(Method):
    """A way to learn tasks of which some are of one kind.

    Attributes:
        late: the penalty begins after a part of the training, when the heads differ by what they have learned.
        knows_kinds: it is told which tasks are of one kind.
        heads: ``"tasks"`` for one each, ``"kinds"`` for one of each kind, ``"one"`` for all, with an intercept each.
    """

    late: bool = False
    knows_kinds: bool = False
    heads: str = "tasks"


METHODS = Methods()
HARD_SHARING = METHODS.add(SiteMethod("hard_sharing", "Hard sharing")).key
METHODS.add(SiteMethod("pooled", "One head, intercept per task", heads="one"))
METHODS.add(SiteMethod("head_per_kind", "Kinds known: one head each", heads="kinds", knows_kinds=True))
METHODS.add(SiteMethod("oracle_cosine", "Kinds known: cosine", rule="fixed", metric="cosine", knows_kinds=True))
_LEARNED = {"entropic": "entropic", "per_task": "per task", "projected": "projected"}
#: Metric, whether it begins late, and the rules that are compared with uniform weights of the same kind.
FAMILIES: dict[tuple[str, bool], tuple[str, ...]] = {
    ("l1", False): ("entropic", "per_task", "projected"),
    ("cosine", False): ("entropic", "per_task"),
    ("cosine", True): ("entropic", "per_task", "projected"),
    ("sqchordal", True): ("entropic", "per_task"),
}


def key_of(rule: str, metric: str, late: bool) -> str:
    """The name of a method with a penalty."""
    return f"{'uniform' if rule == 'fixed' else rule}_{metric}{'_late' if late else ''}"


for (_metric, _late), _rules in FAMILIES.items():
    for _rule in ("fixed", *_rules):
        _label = f"SRDML, {_metric}, {_LEARNED.get(_rule, 'uniform weights')}{', late' if _late else ''}"
        METHODS.add(SiteMethod(key_of(_rule, _metric, _late), _label, rule=_rule, metric=_metric, late=_late))

#: Those of the published tables.
PUBLISHED = (
    *(HARD_SHARING, "pooled", "head_per_kind", "oracle_cosine", "uniform_l1", "per_task_l1"),
    *(key_of(rule, "cosine", late=True) for rule in ("fixed", "entropic", "per_task", "projected")),
)
#: As many values for each.
SPACES: dict[str, Space] = {
    "weight decay": (0.3, 1.0, 3.0, 10.0, 30.0),
    "share": (0.03, 0.1, 0.3, 1.0, 3.0),
}
