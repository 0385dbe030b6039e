"""Whether a state dict belongs to a regularizer, and what regularizers in several processes must have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..capture.feature_capture import FeatureCapture
from ..errors import StateMismatchError
from ..relations.weights import RelationWeights
from ..saliency.extraction import SaliencyEvaluator
from ..surgery.feature.combiner import ForkSurgery
from .strength import StrengthSchedule
from .task_sample import TaskSampler

__all__ = ["check_state", "settings"]


def check_state(
    state: Mapping[str, Any], prefix: str, tasks: Sequence[str], task_names: Tensor, surgery: ForkSurgery | None
) -> None:
    """Check the tasks and the surgery; surgery that is new in a resumed run is put into ``state`` as it is.

    Raises:
        StateMismatchError: the state is that of other tasks, or of a regularizer with surgery where there is none.
    """
    saved = state.get(prefix + "task_names")
    if saved is not None and not torch.equal(saved.cpu(), task_names.cpu()):
        names = bytes(saved.tolist()).decode(errors="replace").split("\n")
        raise StateMismatchError(
            f"the state dict was saved for the tasks {names}, but this regularizer has {list(tasks)}. Build it "
            "with the same tasks in the same order."
        )
    with_surgery = any(key.startswith(prefix + "surgery.") for key in state)
    if with_surgery and surgery is None:
        raise StateMismatchError(
            "the state dict was saved with gradient surgery, but this regularizer has none. Build it with surgery=..., "
            "or leave out the keys that begin with 'surgery.'."
        )
    if surgery is not None and not with_surgery:
        own = {f"{prefix}surgery.{key}": value for key, value in surgery.state_dict().items()}
        cast("dict[str, Any]", state).update(own)


def settings(
    tasks: tuple[str, ...],
    steps: int,
    schedule: StrengthSchedule,
    relations: RelationWeights,
    distance: tuple[str, str],
    evaluator: SaliencyEvaluator,
    capture: FeatureCapture | None,
    sampler: TaskSampler,
    surgery: ForkSurgery | None,
    check_finite: bool,
    thorough: bool,
) -> dict[str, Any]:
    """What has to be the same in all processes, in words; ``thorough``: with the relation weights."""
    scalarize = evaluator.scalarize
    found: dict[str, Any] = {
        "tasks": tasks,
        "strength": schedule.strength,
        "warmup_steps and start_step": (schedule.warmup_steps, schedule.start_step),
        "optimizer steps so far": steps,
        "relations": repr(relations),
        "metric and reduction": distance,
        "heads and feature": None if capture is None else capture.describe(),
        "saliencies (target, pool, scalarize, channel_axis, loss_reduction)": (
            evaluator.target,
            evaluator.pool,
            scalarize if isinstance(scalarize, str) else "one per task, or a function",
            evaluator.channel_axis,
            evaluator.loss_reduction,
        ),
        "check_finite": check_finite,
        "max_tasks_per_step and seed": (sampler.most, sampler.seed),
        "surgery": None if surgery is None else type(surgery.weighting).__name__,
    }
    if thorough:
        found["relation weights"] = relations.matrix().flatten().tolist()
    return found
