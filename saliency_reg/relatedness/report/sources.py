"""What a report looks at: whatever has hooks on the heads already."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Union

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ...capture import CapturedForward, FeatureCapture
from ...distributed import Ranks
from ...errors import CaptureError, ReaderError, TaskError, WrongTypeError
from ...regularizer import RepMTL, SaliencyRegularizer
from ...saliency import Given, SaliencyExtractor, pairwise_distances
from ...surgery.feature import FeatureSurgery
from ...tasks import spread
from ...torch_tools import state_dtype

#: GradNorm is a FeatureSurgery.
Source = Union[SaliencyRegularizer, FeatureSurgery, RepMTL]


def checked_source(source: object) -> tuple[FeatureCapture, Ranks, tuple[str, ...]]:
    """Return the capture of a source, its processes, and its tasks, at least three."""
    if not isinstance(source, (SaliencyRegularizer, FeatureSurgery, RepMTL)):
        raise WrongTypeError(
            f"a report looks at a SaliencyRegularizer, FeatureSurgery, GradNorm or RepMTL, found {type(source).__name__}. "
            "For a model without any, attach SaliencyRegularizer(model, ..., strength=0), which changes nothing of it."
        )
    if source._capture is None or not source._capture.attached:
        raise CaptureError(
            f"this {type(source).__name__} is attached to no model (it was removed, is a copy, or was built without one). "
            "Build it with the model, and the report with it."
        )
    tasks = tuple(source.tasks)
    if len(tasks) < 3:
        raise TaskError(
            f"found {len(tasks)} tasks {list(tasks)}: there is one relation between them, and nothing to compare it with. "
            "A report needs at least 3."
        )
    if isinstance(source, SaliencyRegularizer):
        return source._capture, source._joined_batch.ranks, tasks
    return source._capture, source.ranks if isinstance(source, FeatureSurgery) else source._ranks, tasks


def look_no_more(capture: FeatureCapture) -> None:
    capture.observed = False
    capture.look_away()


def passing(source: object) -> AbstractContextManager[None]:
    """Return a context in which no surgery of the source changes gradients."""
    surgery = source.surgery if isinstance(source, SaliencyRegularizer) else source
    return surgery.passing() if hasattr(surgery, "passing") else nullcontext()


class OwnDistances:
    """Distances between saliencies where the source has none: cosine, of outputs, pooled by their sum."""

    def __init__(self, tasks: Sequence[str], channel_axis: int | None) -> None:
        self._tasks = len(tasks)
        self._extractor = SaliencyExtractor(
            tasks,
            target="output",
            scalarize="auto",
            pool="sum",
            channel_axis=channel_axis,
            loss_reduction="mean",
            fix_statistics=True,
        )

    def of(self, forward: CapturedForward) -> tuple[Tensor, Tensor]:
        """Return ``[T, T]`` twice: distances, summed over the samples, and their number."""
        with torch.enable_grad():  # one number of each output is made
            saliencies = self._extractor.extract(forward, Given(), create_graph=False)
        present, values = saliencies.present, saliencies.values.detach()
        distances = pairwise_distances(values, "cosine", "sum").to(state_dtype(values.device))
        if values.shape[1] != saliencies.batch_size:
            distances = distances * saliencies.batch_size
        counts = torch.full_like(distances, saliencies.batch_size)
        return spread(distances, present, self._tasks, 0.0), spread(counts, present, self._tasks, 0.0)


class BackwardHooks:
    """Refuses heads with backward hooks of others, which would take the passes of a report for those of the losses."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._hooks_so_far = -1  # in the whole process: torch numbers them

    def refuse(self, forward: CapturedForward) -> None:
        if self._hooks_so_far == RemovableHandle.next_id:
            return
        for index in forward.ran:
            for part in forward.modules[index].modules():
                if part._backward_hooks or part._backward_pre_hooks:
                    raise ReaderError(
                        f"there are backward hooks on {type(part).__name__} in head {self._names[index]!r}, for which the "
                        "passes of a report look like those of the losses. Take them off (hooks on parameters are possible: "
                        "register_post_accumulate_grad_hook), or pass views= without 'gradient_cosine' and 'tag'."
                    )
        self._hooks_so_far = RemovableHandle.next_id
