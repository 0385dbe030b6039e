"""The methods that are compared, under the names that all tables use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from saliency_reg import RelationWeights, SaliencyRegularizer

from .attach import PCGRAD, Backward, Surgery

__all__ = ["BASELINE", "FULL_LABELS", "METHODS", "MISSING_LABELS", "Method", "backward_of"]

BASELINE = "hard_sharing"


@dataclass(frozen=True)
class Method:
    """A way to train a shared backbone; each has exactly one hyper-parameter that is tuned."""

    key: str
    label: str
    rule: str | None = None
    """Relation rule of SRDML, ``"fixed"`` for uniform weights; without one there is no regularizer."""
    metric: str = "l1"
    """Of the distance between saliencies."""
    surgery: Surgery | None = None

    @property
    def parameter(self) -> str:
        """What is tuned."""
        return "weight decay" if self.rule is None else f"strength, {self.metric}"


_PCGRAD = PCGRAD["pcgrad_feature"]

METHODS = {
    method.key: method
    for method in (
        Method(BASELINE, "hard sharing"),
        Method("uniform", "uniform weights", rule="fixed"),
        Method("srdml_projected", "SRDML, `projected`", rule="projected"),
        Method("srdml_entropic", "SRDML, `entropic`", rule="entropic"),
        Method("srdml_cosine", "SRDML, `entropic`, `cosine`", rule="entropic", metric="cosine"),
        Method("srdml_sqchordal", "SRDML, `entropic`, `sqchordal`", rule="entropic", metric="sqchordal"),
        Method("pcgrad", _PCGRAD.label, surgery=_PCGRAD),
        Method("srdml_pcgrad", f"SRDML w/ {_PCGRAD.label}", rule="entropic", surgery=_PCGRAD),
        Method("pcgrad_parameters", PCGRAD["pcgrad_parameters"].label, surgery=PCGRAD["pcgrad_parameters"]),
        Method("srdml_authors", "SRDML, `authors`", rule="authors"),
    )
}

#: The tables with all labels, and those with few, where other metrics may do better.
FULL_LABELS = (BASELINE, "uniform", "srdml_projected", "srdml_entropic", "pcgrad", "srdml_pcgrad")
MISSING_LABELS = (*FULL_LABELS[:4], "srdml_cosine", "srdml_sqchordal", *FULL_LABELS[4:])


class _Attached(Protocol):
    """What :func:`backward_of` reads of a method."""

    @property
    def rule(self) -> str | None: ...
    @property
    def metric(self) -> str: ...
    @property
    def surgery(self) -> Surgery | None: ...


def backward_of(
    method: _Attached,
    model: nn.Module,
    tasks: Sequence[str],
    optimizer: torch.optim.Optimizer,
    *,
    strength: float,
    batch_size: int,
    seed: int,
    temperature: float | None = None,
    channel_axis: int | None = None,
    process_group: Any = None,
) -> Backward:
    """What the method adds to a plain step, attached to the model.

    Args:
        method: which.
        model: with a ``backbone`` and ``heads``.
        tasks: of the heads.
        optimizer: of the training.
        strength: of the penalty, for a mean over the batch.
        batch_size: of a whole step; the authors' penalty is summed over the batch, and divided by it here.
        seed: of the order of PCGrad.
        temperature: of the ``entropic`` rule; the library's by default.
        channel_axis: of the feature map, if it is not the usual one.
        process_group: of surgery and relations.
    """

    def regularizer(surgery: Any) -> SaliencyRegularizer:
        common: dict[str, Any] = {
            "heads": "heads",
            "optimizer": optimizer,
            "process_group": process_group,
            "surgery": surgery,
            "channel_axis": channel_axis,
        }
        if method.rule == "authors":
            return SaliencyRegularizer.authors(model, strength=strength / batch_size, **common)
        relations: str | RelationWeights = method.rule or "fixed"
        if method.rule == "entropic" and temperature is not None:
            relations = RelationWeights(len(tasks), "entropic", temperature=temperature)
        return SaliencyRegularizer(model, strength=strength, metric=method.metric, relations=relations, **common)

    build = None if method.rule is None else regularizer
    return Backward(model, "heads", tasks, optimizer, method.surgery, build, seed, process_group=process_group)
