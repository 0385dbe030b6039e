"""The methods that are compared at each level of a factor: the penalty as it is, and with one choice made otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...methods.methods import Methods, package_defaults
from ..groups.methods import GroupMethod


@dataclass(frozen=True)
class AblationMethod(GroupMethod):
    """A way to learn, with at most one choice that is not the package's default.

    Attributes:
        unlabelled: so many images without labels come with each labelled one, for the penalty alone.
    """

    unlabelled: int = 0


METHODS = Methods()
CONSTANT = METHODS.add(AblationMethod("constant", "Constant", closed=True)).key
HARD_SHARING = METHODS.add(AblationMethod("hard_sharing", "Hard sharing")).key
TUNED, DEFAULT = "srdml_tuned", "srdml_default"
_DEFAULTS = package_defaults()


def penalised(variant: str = "") -> tuple[str, str]:
    """Keys of the two methods with the penalty: without anything tuned, and with a tuned share.

    Args:
        variant: which choice is another one; by default none.
    """
    ending = variant and f":{variant}"
    return f"{DEFAULT}{ending}", f"{TUNED}{ending}"


def _add(variant: str = "", label: str = "", *, unlabelled: int = 0, **choices: Any) -> None:
    """Make a variant known; its choices are arguments of the regularizer."""
    rule, metric = choices.get("relations", _DEFAULTS["rule"]), choices.get("metric", _DEFAULTS["metric"])
    others = {name: value for name, value in choices.items() if name not in ("relations", "metric")}
    default, tuned = penalised(variant)
    name = f"SRDML, {label and f'{label}, '}"
    common: dict[str, Any] = {"rule": rule, "metric": metric, "unlabelled": unlabelled}
    METHODS.add(AblationMethod(tuned, f"{name}share tuned", **common, saliency=others))
    METHODS.add(AblationMethod(default, f"{name}not tuned", **{**_DEFAULTS, **common}, saliency=choices))


_add()
_add("uniform", "uniform weights", relations="fixed")
for _rule, _label in {"projected": "projected", "per_task": "per task", "authors": "rule of the authors"}.items():
    _add(_rule, _label, relations=_rule)
for _metric in ("l1", "sqchordal"):
    _add(_metric, _metric, metric=_metric)
_add("mean", "mean over positions", pool="mean")
_add("unpooled", "not pooled", pool=None)
_add("loss", "saliency of the losses", target="loss")
#: Images without labels for each one with labels.
UNLABELLED = (4,)
for _count in UNLABELLED:
    _add(f"unlabelled-{_count}", f"{_count} unlabelled images each", unlabelled=_count)
