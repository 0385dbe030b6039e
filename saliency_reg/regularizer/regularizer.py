"""The plug-in itself: the penalty, attached to a model and an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..capture import (
    CapturedForward,
    ColumnsChoice,
    FeatureChoice,
    HeadsChoice,
    Item,
)
from ..distributed import Ranks
from ..errors import CaptureError, ConfigurationError
from ..relations import RelationWeights
from ..saliency import Given, ScalarizeChoice, captured_by_hand
from ..tasks import Losses, first_few
from ..torch_tools import Removable, StepHook, check_not_closure_only, refuse_reader, unwrap_optimizer
from .options import Options, tasks_and_heads
from .state.changing_tasks import ChangingTasks


class SaliencyRegularizer(ChangingTasks, Removable):
    r"""Penalty on the distance between the saliencies of related tasks, for any multi-head model.

    ``regularizer()`` after a forward returns ``strength * sum_{i<j} w_ij D_ij`` (Bai and Zhao, KDD 2022, eq. 6), where
    ``D_ij`` is the distance between the input gradients of tasks ``i`` and ``j`` with respect to the feature map that
    their heads share, and ``w`` are relation weights, learned by :class:`RelationWeights`.

    Add it to the loss and call ``backward`` once. It acts exactly when gradients are enabled and the outputs carry a
    graph, whatever ``model.training`` says; under ``no_grad`` it returns a zero. It has no parameters, draws no random
    number, and runs no module twice (but in the first call copies of heads with code of their own, on two samples). Hooks on
    tensors between feature map and outputs see the gradient taken here; full backward hooks of modules there are refused.

    In several processes distances and relations are those of the joined batch, by one small all-reduce in each call, which
    every process has to make (also without samples or heads). Each returns its part, times ``N * n_r / n`` for ``n_r`` of
    ``n`` samples in ``N`` processes (``N`` for ``reduction="sum"``), so that their mean is the penalty of the joined batch.

    Tasks may come and go: :meth:`add_task`, :meth:`remove_task`; a state of other tasks is taken by :meth:`load_state_dict`.

    The authors' code sums over the batch, so that its 0.1 is a ``strength`` of 0.1 times the batch size here, and learns the
    relations by another rule; :meth:`authors` follows it exactly. With piecewise-linear heads (``Linear``, ReLU) saliency is
    locally constant, and the penalty trains the heads only; GELU, tanh, or ``target="loss"`` let it reach the backbone.

    Args:
        model: the model, or a wrapper around it; ``None`` if only ``regularizer(outputs=..., features=...)`` is used.
        heads: names (exact, dotted suffix, or pattern such as ``"heads.*"``), modules, a list of them, or a mapping
            ``{task: name or module}``. A ``ModuleDict`` or ``ModuleList`` stands for its children; a list ``["towers.0",
            "last.0"]`` in its place is one head, with the output of the last. A single module returns ``[B, T]`` or
            ``[B, T, K]``. Left out: found, if the choice is unambiguous.
        feature: the module whose output (``"layer4"``) or input (``"pool:input"``) is the feature map; a part of it as
            ``"encoder:output.last_hidden_state"`` or ``"rnn:output.0"``. If it runs several times, the last run counts.
            A list names several maps, whose saliencies are joined. Left out: the first floating-point tensor that the
            heads are called with.
        output: which part of what a head returns is the task's output: a key, an attribute, an index, a function, or a
            mapping ``{task: part}``. Left out, for some tasks or all: all of it.
        tasks: T task names; by default taken from the heads.
        columns: for one head with several columns for each task: ``{"colour": slice(0, 4), "size": 4, ...}``.
        target: ``"output"``: saliency of the scalarised output (the paper). ``"loss"``: saliency of the task's loss, per
            sample; then pass ``losses=`` in each call.
        strength: factor of the penalty (the paper's lambda), ``>= 0``; or ``"auto"``: it holds the penalty at a ``share``,
            ``> 0``, of the task losses, as measured in every 10 optimizer steps for the next 10. Then pass ``losses=``.
            Its default: 0.2 where the penalty trains the heads only, 0.001 where it reaches the backbone, or may do so.
        metric, reduction: of the distance, as in :func:`task_distances`.
        pool, scalarize, channel_axis, batch_axis: of the saliency, as in :func:`task_saliencies`.
        relations: name of a rule, or a :class:`RelationWeights`.
        optimizer: the optimizer whose steps the relations follow, see :meth:`attach_optimizer`.
        surgery: gradient surgery between the tasks at the feature map that the heads share ("SRDML w/ PCGrad"):
            :class:`PCGrad`, a Gramian weighting of TorchJD, or any callable ``[T, T] -> [T]``. ``loss.backward()`` stays as
            it is; the penalty's gradient is added, never weighed. What it means: :class:`FeatureSurgery`.
        process_group: the data-parallel processes, whose joined batch the penalty and the relations are of: a group of
            torch.distributed, or ``"local"`` for this process alone. By default a new group, over the processes of a
            ``DistributedDataParallel`` around the model, or over all.
        start_step, warmup_steps: the strength is 0 for so many optimizer steps, then rises linearly over so many.
        loss_reduction: what 0-dim task losses are for ``target="loss"``: the ``"mean"`` over the samples of the batch, or
            the ``"sum"``. For anything else, such as a mean over the labelled samples, pass per-sample losses ``[B]``.
        max_tasks_per_step: for very many tasks: draw this many anew in each call, by a generator of its own with this
            ``seed``; the penalty is scaled so that its mean is that of all pairs.
        run_all_heads: for batches that each belong to one task, whose head alone runs in the forward: run the other heads
            on the same feature map, for their saliency, with a copy of the random state and of their running statistics.
            In several processes run all heads in the model's forward instead.
        cross_sample: where outputs of one sample depend on the feature map of another. ``"fix"``: a BatchNorm in train mode
            has constant statistics in the derivative, so that a sample's saliency is its own; all else is told once.
            ``"warn"`` once, raise an ``"error"`` (:class:`CrossSampleError`), or ``"ignore"`` it: with a BatchNorm.
        check_finite: raise :class:`NonFiniteError` in a call whose distances are not finite. By default they propagate
            into the loss, so that GradScaler skips the step; the relations do not move then.
        custom_backward: ``"warn"`` once if the backward of a part between feature map and outputs is not its derivative
            (gradient reversal, scaling, straight-through), or ``"ignore"`` it.

    Raises:
        SaliencyRegError: one of its kinds, for arguments that cannot work; the model is then left as it was.

    Example:
        >>> model = nn.ModuleDict({"backbone": nn.Linear(8, 4), "heads": nn.ModuleDict()})
        >>> for task in ("smiling", "young"):
        ...     model["heads"][task] = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 1))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> regularizer = SaliencyRegularizer(model, heads=["smiling", "young"], optimizer=optimizer)
        >>> feature = model["backbone"](torch.randn(16, 8))
        >>> outputs = {task: head(feature) for task, head in model["heads"].items()}
        >>> losses = {task: output.square().mean() for task, output in outputs.items()}
        >>> (sum(losses.values()) + regularizer(losses=losses)).backward()
        >>> optimizer.step()
        >>> regularizer.relations.matrix()
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """

    # A copy is not attached: the hooks belong to the original and its model.
    in_a_copy: ClassVar[dict[str, Any]] = {"_capture": None, "_step_hook": None}

    def __init__(
        self,
        model: nn.Module | None,
        heads: HeadsChoice = None,
        *,
        feature: FeatureChoice = None,
        output: Item | Mapping[str, Item | None] | None = None,
        tasks: Sequence[str] | None = None,
        columns: ColumnsChoice = None,
        target: str = "output",
        strength: float | str = "auto",
        share: float | None = None,
        metric: str = "cosine",
        pool: str | None = "sum",
        reduction: str = "mean",
        scalarize: ScalarizeChoice = "auto",
        channel_axis: int | Sequence[int | None] | None = None,
        batch_axis: int | Sequence[int] = 0,
        relations: str | RelationWeights = "entropic",
        optimizer: Any = None,
        surgery: Any = None,
        process_group: Any = None,
        warmup_steps: int = 0,
        start_step: int = 0,
        loss_reduction: str = "mean",
        max_tasks_per_step: int | None = None,
        seed: int = 0,
        run_all_heads: bool = False,
        cross_sample: str = "fix",
        check_finite: bool = False,
        custom_backward: str = "warn",
    ) -> None:
        options = Options.among(locals())
        for_a_model = {"feature": feature, "output": output, "surgery": surgery}
        names, found, told = tasks_and_heads(model, heads, tasks, columns, for_a_model)
        ranks = Ranks(process_group, model, apart=surgery is not None)
        super().__init__(names, options, relations, surgery, ranks, told)
        self._enabled = True
        followed = None if optimizer is None else self._checked_optimizer(optimizer)
        # All arguments have been checked: nothing was set on the model or the optimizer before this line.
        self._without_model = model is None
        self._capture = None if model is None or found is None else self._captured_in(model, found, feature, output)
        if self._capture is not None and model is not None:
            self._reminders.attach(model, self._capture.heads.names, self._capture.heads.ends)
        self._step_hook = None if followed is None else StepHook(followed, self.step)
        self._strength_changes()
        if options.strength != 0:  # one that only watches has no penalty that could reach anything
            self._reach.tell()

    @classmethod
    def authors(
        cls, model: nn.Module | None, heads: HeadsChoice = None, *, strength: float = 0.1, **options: Any
    ) -> SaliencyRegularizer:
        """The conventions of the published code: sums over positions and over the batch, l1, and its relation rule.

        ``strength`` is their ``mu``, 0.1 by default. Their synthetic script keeps it at 0 for the first 11 steps
        (``start_step=11``). Other options are those of the class.

        Raises:
            ConfigurationError: an option that the conventions fix.

        Example:
            >>> heads = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
            >>> SaliencyRegularizer.authors(nn.ModuleDict({"heads": heads})).relations.rule
            'authors'
        """
        fixed = {"pool": "sum", "reduction": "sum", "metric": "l1", "relations": "authors", "target": "output"}
        if clash := sorted(set(fixed) & set(options)):
            raise ConfigurationError(
                f"{clash} are fixed by the authors' conventions. Use SaliencyRegularizer(...) instead."
            )
        return cls(model, heads, strength=strength, **{**options, **fixed})

    @_disable_dynamo  # within a compiled function it runs as it is written, and says what does not work there
    def forward(
        self,
        *,
        losses: Losses | Tensor | None = None,
        targets: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        outputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the penalty of the latest forward, and release that forward.

        Args:
            losses: task losses, before any weighting, as a mapping or a sequence of T: 0-dim, or ``[B]`` per sample.
                Needed for ``target="loss"``; their sum is enough for ``strength="auto"`` and ``report.share``.
            targets: class labels per task, for the ``"label"`` scalarisations.
            mask: ``[B, positions...]``, true at real positions (an ``attention_mask``; not a ``key_padding_mask``, which
                is its opposite), or ``[B]``, true at real samples. Samples without a real position do not count.
            outputs, features: instead of a captured forward: task outputs, and the feature map ``A`` they were computed
                from (or one alias ``A.view_as(A)`` per output), as in :func:`task_saliencies`.

        Returns:
            0-dim, ``>= 0``, float32 or float64, on the feature map's device; in several processes this one's part. Zero
            under ``no_grad``, for outputs without a graph, for fewer than two tasks, and while ``enabled`` is false.

        Raises:
            CaptureError: no unread forward, or one that cannot be used; without any head in all processes (NoHeadRanError).
            MissingArgumentError: no losses, for ``strength="auto"``.
            SaliencyRegError: one of its kinds, for arguments that do not fit.
        """
        refuse_reader()
        forward = self._forward_to_read(outputs, features)
        if forward is None:
            return self._zero()
        if outputs is None and forward.features:
            prepared = self.prepare(forward)
            mask = prepared if mask is None else mask
        whole = nullcontext() if self._capture is None else self._capture.sharded.gathered()
        with whole, nullcontext() if self.surgery is None else self.surgery.passing():
            return self._penalty_of(forward, Given(losses, targets, mask, outputs))

    def prepare(self, forward: CapturedForward) -> Tensor | Sequence[Tensor | None] | None:
        """Look at a captured forward before its saliencies are taken. For classes that know more of a model than this one.

        They may replace ``forward.outputs`` (of the heads ``forward.ran``), and return what ``mask=`` is in calls without
        one. It is not called for outputs passed by hand, nor for a forward without heads.
        """
        return None

    def attach_optimizer(self, optimizer: Any) -> None:
        """Let the relations follow this optimizer's steps (and no longer those of an earlier one).

        Wrappers that carry it as ``.optimizer`` are unwrapped. A step that GradScaler skips does not count.

        Raises:
            WrongTypeError: no optimizer.
        """
        inner = self._checked_optimizer(optimizer)
        if self._step_hook is not None:
            self._step_hook.remove()
        self._step_hook = StepHook(inner, self.step)

    def remove(self) -> None:
        """Take everything off the model and the optimizer. The relations stay readable."""
        self._reminders.remove()
        if self._capture is not None:
            self._capture.remove()
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The head modules in the model (of several, the last); none for a copy, or if it was built without a model."""
        return () if self._capture is None else self._capture.heads.ends

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The feature maps that were named; none where it is what the heads are called with."""
        return () if self._capture is None else tuple(self._capture.feature_names)

    @property
    def enabled(self) -> bool:
        """While false, calls return zero and the hooks do nothing."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = self._reminders.enabled = bool(value)
        if self._capture is not None:
            self._capture.enabled = self._enabled

    @property
    def follows_optimizer(self) -> bool:
        """Whether the relations move with the steps of an attached optimizer."""
        return self._step_hook is not None

    def describe(self) -> str:
        """Return a few lines: heads and feature that were found, form of the saliency, reach of the penalty, relations."""
        heads, feature = ("given in each call",) * 2 if self._capture is None else self._capture.describe()
        lines = {
            "tasks": f"{len(self.tasks)}: {first_few(self.tasks)}",
            "heads": heads,
            "feature": f"{feature}, shape {'not seen yet' if self._seen is None else self._seen[0]}",
            **self._described(),
        }
        width = max(map(len, lines))
        return "SaliencyRegularizer\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in lines.items())

    __repr__ = describe

    def _forward_to_read(self, outputs: Any, features: Any) -> CapturedForward | None:
        """The forward of this call; ``None`` where there is nothing to differentiate."""
        if not self._enabled or not torch.is_grad_enabled():
            if self._capture is not None:
                self._capture.drop()
            return None
        if outputs is not None or features is not None:
            if self.surgery is not None:
                raise ConfigurationError(
                    "outputs= and features= cannot be used under surgery, whose fork they may not have come from. Call "
                    "regularizer() after the model, or leave surgery= out."
                )
            return captured_by_hand(outputs, features, self.tasks)
        if self._capture is None:
            raise CaptureError(
                "this regularizer is attached to no model (it was built without one, or is a copy). Build it with the "
                "model, or pass regularizer(outputs=..., features=...)."
            )
        forward = self._capture.take(empty_on=self.steps.device if self._joined_batch.ranks.size > 1 else None)
        if forward is None:
            self._reminders.without_graph()
        return forward

    def _checked_optimizer(self, optimizer: Any) -> torch.optim.Optimizer:
        inner = unwrap_optimizer(optimizer)
        if self.surgery is not None:
            check_not_closure_only(inner)
        return inner

    def _zero(self) -> Tensor:
        return torch.zeros((), device=(self._capture and self._capture.device()) or self.steps.device)

    def _strength_changes(self, *, stepped: bool = False) -> None:
        # A penalty that is off leaves the model's graph as it is, to the bit.
        if self._capture is not None:
            self._capture.aliases.for_penalty = self.current_strength > 0
            if stepped:
                self._capture.stepped()

    def _settings(self, thorough: bool) -> Mapping[str, Any]:
        return {**super()._settings(thorough), "heads and feature": self._capture and self._capture.describe()}
