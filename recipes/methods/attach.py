"""What a method adds to the plain training step: the saliency regularizer, gradient surgery, both, or nothing."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from saliency_reg import GradNorm, HeadPenalty, RelationWeights, RepMTL, SaliencyRegularizer

from ..data.task_kinds import TaskKind
from ..runtime.errors import OptionError
from .backward import Backward
from .growth import Growth, RelationPhase, permutation_seed
from .methods import BRANCHING, GROUPS_APART, SOFT_SHARING, Method
from .reshaping import Reshaping, SharedEstimators, first_phase

#: Of the ``entropic`` rule, where none is given: the library's when the tables in docs/ were trained.
TEMPERATURE = 0.3


def attach(
    method: Method,
    model: nn.Module,
    tasks: Sequence[str],
    optimizer: torch.optim.Optimizer,
    *,
    strength: float,
    share: float | str | None = None,
    batch_size: int,
    seed: int,
    temperature: float | None = None,
    channel_axis: int | None = None,
    process_group: Any = None,
    kinds: Mapping[str, TaskKind] | None = None,
    epochs: int = 0,
    steps_per_epoch: int = 0,
) -> Backward:
    """Attach what the method adds to a plain step to a model.

    Args:
        method: which.
        model: with a ``backbone`` and ``heads``, a module for each task or one ``Linear`` with a column for each.
        tasks: of the heads.
        optimizer: of the training.
        strength: of the penalty, for a mean over the batch.
        share: in place of the strength: at which the penalty is held, of the losses.
        batch_size: of a whole step; the authors' penalty is summed over the batch, and divided by it here.
        seed: of the order of PCGrad.
        temperature: of the ``entropic`` rule, by default ``TEMPERATURE``; a method that is not tuned has the library's.
        channel_axis: of the feature map, if it is not the usual one.
        process_group: of surgery and relations.
        kinds: of the tasks, for weights of their losses, and for relations between them.
        epochs, steps_per_epoch: of the training, for methods that change the model on the way.
    """

    def regularizer(surgery: Any) -> SaliencyRegularizer:
        common: dict[str, Any] = {
            "heads": "heads",
            # Heads with names keep them.
            "tasks": None if isinstance(getattr(model, "heads", None), nn.ModuleDict) else tasks,
            "optimizer": optimizer,
            "process_group": process_group,
            "surgery": surgery,
            "channel_axis": channel_axis,
            **method.saliency,
        }
        if not method.tuned:
            return by_share(SaliencyRegularizer, model, share, **common)
        if method.rule == "authors" and method.metric == "l1":  # their conventions; otherwise their rule alone
            if share is not None:
                return by_share(SaliencyRegularizer.authors, model, share, **common)
            return SaliencyRegularizer.authors(model, strength=strength / batch_size, **common)
        relations: str | RelationWeights = method.rule or "fixed"
        if method.rule == "entropic":
            relations = RelationWeights(len(tasks), "entropic", temperature=temperature or TEMPERATURE)
        if share is not None:
            return by_share(SaliencyRegularizer, model, share, metric=method.metric, relations=relations, **common)
        return SaliencyRegularizer(model, strength=strength, metric=method.metric, relations=relations, **common)

    build = None if method.rule is None else regularizer
    plug: dict[str, Any] = {"heads": "heads", "tasks": tasks, "optimizer": optimizer}
    extra: dict[str, Any] = {}
    if method.gradnorm:
        extra["gradnorm"] = GradNorm(model, process_group=process_group, channel_axis=channel_axis, **plug)
    if method.head_penalty is not None:
        extra["head_penalty"] = penalty = HeadPenalty(model, kind=method.head_penalty, strength=strength, **plug)
        own = dict(model.named_parameters())
        # Or two penalties would act on them.
        _set_apart(optimizer, [own[name] for name in penalty.weight_names], weight_decay=0.0)
    if method.rep_mtl:
        strengths: dict[str, Any] = {"task_specific_strength": strength, "cross_task_strength": strength}
        extra["rep_mtl"] = RepMTL(model, channel_axis=channel_axis, process_group=process_group, **strengths, **plug)
    if method.architecture == SOFT_SHARING:
        soft: Any = model
        soft.strength = strength
        extra["weight_penalty"] = soft.penalty
    if method.loss_weighting is not None:
        extra["loss_weighting"] = weighting = method.loss_weighting.build(kinds or {})
        extra["splittable"] = method.loss_weighting.splittable
        extra["after"] = method.loss_weighting.after
        if parameters := list(weighting.parameters()):
            _set_apart(optimizer, parameters, weight_decay=0.0)
    if method.by_relations:
        extra["reshaping"] = _reshaping(
            method, model, kinds or {}, optimizer, seed, process_group, epochs, steps_per_epoch
        )
    return Backward(model, "heads", tasks, optimizer, method.surgery, build, seed, process_group=process_group, **extra)


def _reshaping(
    method: Method,
    model: nn.Module,
    kinds: Mapping[str, TaskKind],
    optimizer: torch.optim.Optimizer,
    seed: int,
    process_group: Any,
    epochs: int,
    steps_per_epoch: int,
) -> Reshaping:
    if method.selective or method.view is None:
        return SharedEstimators(model, tuple(kinds), optimizer, process_group, epochs=epochs)
    if method.architecture == GROUPS_APART:
        return RelationPhase(method.view, model, kinds, optimizer, epochs * steps_per_epoch, process_group)
    if method.architecture != BRANCHING:
        raise OptionError(
            f"{method.key} has a view of relations, and nothing that is split along it. Use {BRANCHING!r}."
        )
    return Growth(
        method.view,
        model,
        kinds,
        optimizer,
        first_phase(epochs) * steps_per_epoch,
        process_group,
        epochs=epochs,
        permuted=permutation_seed(seed) if method.permuted else None,
    )


def by_share(
    build: Callable[..., SaliencyRegularizer], model: nn.Module, share: float | str | None, **options: Any
) -> SaliencyRegularizer:
    """A regularizer that holds its penalty at a share of the losses, which each call has to give.

    A ``share`` in words is the package's own choice.
    """
    return build(model, strength="auto", share=None if isinstance(share, str) else share, **options)


def _set_apart(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], **options: Any) -> None:
    """Move parameters into a group of their own, before the first step; those that the optimizer does not have, too."""
    apart = list(parameters)
    known = set(map(id, apart))
    for group in optimizer.param_groups:
        group["params"] = [own for own in group["params"] if id(own) not in known]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    optimizer.add_param_group({"params": apart, **options})
