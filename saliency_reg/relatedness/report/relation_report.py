"""The report itself: it looks at the forwards of a training, and keeps what they say of the relations between the tasks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ...capture import FeatureCapture
from ...errors import AlreadyAttachedError, CaptureError, ConfigurationError
from ...regularizer import SaliencyRegularizer
from ...torch_tools import Removable, check_choice, positive_number, real_device, refuse_reader, whole_number
from ..views import VIEWS, RelationViews
from .gatherer import Gatherer
from .labels import Labels
from .sources import Source, checked_source, look_no_more, passing
from .task_losses import LossChoice


def relation_report(
    source: Source,
    *,
    kinds: Mapping[str, str] | Sequence[str] | str | None = None,
    loss: LossChoice = None,
    views: Sequence[str] | None = None,
    every: int = 1,
    tag_every: int = 10,
    tag_step: float = 0.01,
    decay: float = 0.99,
    points: int = 20,
    channel_axis: int | None = None,
) -> RelationReport:
    """Return a report that looks at the forwards of a training, by the hooks of a ``source``; see :class:`RelationReport`.

    Args:
        source: a :class:`SaliencyRegularizer` (with surgery or without), :class:`FeatureSurgery`, :class:`GradNorm` or
            :class:`RepMTL` that is attached to a model, with T >= 3 tasks.
        kinds: ``"binary"`` (labels 0 and 1, one logit), ``"number"`` or ``"class"`` (K logits), for all tasks, in their
            order, or by task. Left out: a task with K outputs has classes, one with a single output is binary if all labels
            in the first batch with any are 0 or 1, and a number otherwise.
        loss: a function ``(output, label) -> [B]``, or one by task, in place of the loss of the kind: cross-entropy with
            logits, or squared error. Missing labels come as 0, and what is returned for them does not count.
        views: keys of :data:`VIEWS`, to gather some of them alone.
        every: take up each so many-th call of ``update``.
        tag_every: take TAG in each so many-th update.
        tag_step: length of the step of TAG, relative to that of the feature map, ``> 0``.
        decay: of the running means, in ``(0, 1]``: with 0.99 they are of the latest 100 updates or so, with 1 of all.
        points: how many points of the training are kept at most for the trajectory; 0 for none.
        channel_axis: of the feature map, as in :func:`task_saliencies`.

    Raises:
        TaskError: fewer than three tasks, or names that are not tasks.
        CaptureError: a source that is attached to no model.
        AlreadyAttachedError: another report looks at this source.
        WrongTypeError, ConfigurationError: other arguments that cannot be used.
    """
    return RelationReport(
        source,
        kinds=kinds,
        loss=loss,
        views=views,
        every=every,
        tag_every=tag_every,
        tag_step=tag_step,
        decay=decay,
        points=points,
        channel_axis=channel_axis,
    )


class RelationReport(Gatherer, Removable):
    r"""Five views of the relations between T tasks, gathered during a normal training. Made by :func:`relation_report`.

    Call :meth:`update` with the labels of the batch between the model's forward and ``loss.backward()``, and read
    :meth:`views` at any time. The training is the same to the bit: the backbone is not passed, no gradient is accumulated,
    and heads that are run again (for TAG) find the random numbers and buffers of their forward, and call no hooks. All of it
    is of the joined batch of all processes, by one all-reduce in each update, and another one where TAG is taken.

    - ``saliency_distance`` and ``relation_weights``: the distances in the calls of the regularizer, by its metric, and its
      weights. Of another source, the cosine distance of the saliencies of outputs, pooled by their sum, and no weights.
    - ``gradient_cosine``: of ``dL_i/dA`` and ``dL_j/dA`` at the feature map, before any surgery, ``L`` being means over the
      labelled samples; the mean over the updates in which both tasks had a gradient.
    - ``error_cooccurrence`` (Lu et al., CVPR 2017, sec. 3.1): how often two tasks are both hard or both easy, a sample being
      hard whose margin (``|y - p|``, ``|y - o|``, or ``1 - p`` of the label's class) is at least the running mean margin
      before this batch. Counted over samples with both labels, where the authors' code counts a missing label as easy; and
      not in the first batch, which has no threshold, where theirs counts all samples as hard. ``error_kappa``: the same
      corrected for what tasks that are unrelated have by chance (Cohen's kappa).
    - ``label_correlation``: of all labels seen so far of tasks whose head has run, see :meth:`LabelTables.association`.
    - ``tag`` (Fifty et al., NeurIPS 2021) at the feature map: ``Z[i, j] = 1 - L_i(A - eta_j dL_j/dA) / L_i(A)``, with heads
      as they are. ``eta_j`` is ``tag_step |A| / |dL_j/dA|``: steps of all tasks have one length, whatever the scale of their
      losses. The paper takes steps of all shared parameters, by the learning rate.

    Sums forget by ``decay`` in each update, and so do their normalisers (of TAG, in each update that takes it); with missing
    labels a batch counts by its labelled samples.

    Raises:
        SaliencyRegError: one of its kinds; see :func:`relation_report`.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"backbone": nn.Linear(8, 4), "heads": nn.ModuleDict()})
        >>> for task in ("smiling", "young", "glasses"):
        ...     model["heads"][task] = nn.Linear(4, 1)
        >>> regularizer = SaliencyRegularizer(model, heads=["smiling", "young", "glasses"], strength=0.1)
        >>> report = relation_report(regularizer)
        >>> labels = torch.randint(2, (16, 3)).float()
        >>> feature = model["backbone"](torch.randn(16, 8))
        >>> outputs = torch.cat([head(feature) for head in model["heads"].values()], 1)
        >>> loss = nn.functional.binary_cross_entropy_with_logits(outputs, labels) + regularizer()
        >>> report.update(labels)
        >>> loss.backward()
        >>> list(report.views().matrices)[:3]
        ['saliency_distance', 'relation_weights', 'gradient_cosine']
    """

    calls: Tensor
    in_a_copy: ClassVar[dict[str, Any]] = {"_source": None, "_capture": None, "_lets_go": None}

    def __init__(
        self,
        source: Source,
        *,
        kinds: Mapping[str, str] | Sequence[str] | str | None,
        loss: LossChoice,
        views: Sequence[str] | None,
        every: int,
        tag_every: int,
        tag_step: float,
        decay: float,
        points: int,
        channel_axis: int | None,
    ) -> None:
        capture, ranks, tasks = checked_source(source)
        self.names = _checked_views(views, isinstance(source, SaliencyRegularizer))
        self.every = whole_number("every", every, least=1)
        if positive_number("decay", decay) > 1:
            raise ConfigurationError(f"decay must be in (0, 1], found {decay}.")
        if capture.observed:
            raise AlreadyAttachedError("another report looks at this source. Call .remove() on it first, or use it.")
        super().__init__(
            tasks,
            ranks,
            capture.heads.names,
            named=bool(capture.feature_names),
            kinds=kinds,
            loss=loss,
            tag_every=whole_number("tag_every", tag_every, least=1),
            tag_step=positive_number("tag_step", tag_step),
            decay=float(decay),
            points=whole_number("points", points),
            channel_axis=channel_axis,
        )
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=real_device()))
        self._source: tuple[Source] | None = (source,)  # no part of this
        self._capture: FeatureCapture | None = capture
        capture.observed = True
        # Once only: what is gone for good must not blind a report that came after it.
        self._lets_go: weakref.finalize[..., Any] | None = weakref.finalize(self, look_no_more, capture)
        self._lets_go.atexit = False

    @_disable_dynamo
    @torch.no_grad()
    def update(self, labels: Labels) -> None:
        """Take up the latest forward, with its labels; between the forward and ``loss.backward()``, once for each forward.

        In several processes all of them have to call it, also with a batch without labels or heads.

        Args:
            labels: ``[B, T]``, or ``[B]`` for each task, by name or in their order; a mapping may leave tasks out. Numbers,
                0 and 1, or classes. NaN marks a missing label, in whole numbers -100, among classes any negative number.

        Raises:
            CaptureError: no forward with gradients that was not counted, or one whose graph is gone.
            ConfigurationError: labels or outputs that do not fit the kind of their task.
            TaskError, ShapeError, WrongTypeError, NonFiniteError: labels that cannot be used.
            ReaderError: backward hooks of others in heads.
        """
        refuse_reader()
        if self._capture is None or self._source is None:
            raise CaptureError("this report is a copy, or was removed. Make one with relation_report(source).")
        if not self._capture.attached:
            raise CaptureError(
                "what this report looks at was removed from its model. Attach it anew, and make a new report."
            )
        if not self._capture.enabled:
            raise CaptureError("what this report looks at is not enabled, and sees no forward. Set .enabled = True.")
        calls = self._value("calls")
        if calls % self.every:
            self._capture.look_away()
            self._set_value("calls", calls + 1)
            return
        forward = self._capture.look(empty_on=self.calls.device if self._ranks.size > 1 else None)
        if forward is None:
            raise CaptureError(
                "the latest forward ran without gradients, and a report is of a training. Call update after forwards with "
                "gradients only."
            )
        self._set_value("calls", calls + 1)
        if self.calls.device != forward.device:
            self.to(forward.device)
        self._take_distances()
        with self._capture.sharded.gathered(), passing(self._source[0]):
            self._take_up(forward, labels)

    @torch.no_grad()
    def views(self) -> RelationViews:
        """Return the views of the training so far.

        Raises:
            CaptureError: no update yet.
        """
        if not self.trajectory.number:
            raise CaptureError("nothing was gathered yet. Call report.update(labels) in each training step.")
        self._take_distances()
        now = self._matrices(self._weights()).cpu().double()
        self._tell(self.tables.association().diagonal())
        points = self.trajectory.points().cpu().double()
        places = {name: place for place, name in enumerate(VIEWS) if name in self.names}
        skill = 1 - self.running.mean_losses().cpu().double() / self.tables.best_constant()
        skill[list(self._losses.given)] = torch.nan
        return RelationViews(
            tasks=self.tasks,
            matrices={name: now[place] for name, place in places.items()},
            common_labels=self.tables.common.cpu().round().long(),
            trajectory={name: points[:, place].clone() for name, place in places.items()},
            skill=torch.where(skill.isfinite(), skill, torch.nan),
        )

    def remove(self) -> None:
        """Look at the model no longer. What was gathered stays readable."""
        if self._lets_go is not None:
            self._lets_go()
        self._capture = None

    def __repr__(self) -> str:
        return f"RelationReport({len(self.tasks)} tasks, {self.trajectory.number} updates, views {list(self.names)})"

    def _take_distances(self) -> None:
        """Take up the distances of the regularizer's latest call; where it comes after the update, in the next one."""
        source = None if self._source is None else self._source[0]
        if isinstance(source, SaliencyRegularizer) and (report := source.report) is not None:
            self._note_distances(report.distances)

    def _weights(self) -> Tensor | None:
        source = None if self._source is None else self._source[0]
        return source.relations.matrix() if isinstance(source, SaliencyRegularizer) else None


def _checked_views(views: Sequence[str] | None, with_weights: bool) -> tuple[str, ...]:
    if views is None:
        return tuple(name for name in VIEWS if with_weights or name != "relation_weights")
    if isinstance(views, str):
        views = [views]
    for name in views:
        check_choice("view", name, tuple(VIEWS))
    if "relation_weights" in views and not with_weights:
        raise ConfigurationError(
            "relation_weights are those of a SaliencyRegularizer, and the source is none. Leave them out."
        )
    return tuple(name for name in VIEWS if name in views)
