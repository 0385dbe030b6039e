"""Rep-MTL as a plug-in, attached to a model and an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ...capture import ColumnsChoice, FeatureCapture, FeatureChoice, HeadsChoice, Item
from ...distributed import Ranks
from ...errors import CaptureError, ConfigurationError, WrongTypeError
from ...tasks import Losses
from ...torch_tools import Removable, StepHook, refuse_reader, unwrap_optimizer
from ..options import tasks_and_heads
from .loss_penalties import LossPenalties
from .options import RepMTLOptions


class RepMTL(LossPenalties, Removable):
    r"""The two penalties of Rep-MTL on the saliencies of the task losses (Wang, Li and Xu, ICCV 2025), for any model.

    ``S_bt = d l_bt / d Z_b`` is the gradient of the loss of task ``t`` at sample ``b`` with respect to the feature map that
    the heads share, with a graph. ``rep(losses=...)`` after a forward returns the sum of two penalties on it:

    * ``task_specific_strength`` times the task-specific saliency regulation (eq. 4 to 6): the entropy of the tasks' shares
      ``|mean_c S_bt| / sum_k |mean_c S_bk|`` at each position, averaged over positions and samples, in ``[0, log T]``. It
      is smallest where each position belongs to one task.
    * ``cross_task_strength`` times the cross-task saliency alignment (eq. 7 to 9): ``log sum_{k != b} exp(<a_b, a_k> / tau)
      - mean_t <a_b, z_bt> / tau``, averaged over the samples. ``z_bt`` is ``S_bt S_bt'`` over its length and ``a_b`` is
      ``A_b A_b'`` over its length, where ``A_b`` ``[C, T]`` are the saliencies of the tasks averaged over positions. As in
      the paper the positive is no part of the denominator, so that this term may be negative.

    Add it to the loss and call ``backward`` once. It acts exactly when gradients are enabled and the outputs carry a graph.
    Nothing of it is approximate, and a ``[C, C]`` matrix is formed only where it is smaller than what says the same.

    A task counts at a sample where its saliency is not 0: let the loss be 0 where a label is missing (``mask * loss``). It
    is no part of the shares and the anchor there. Samples with fewer than two tasks, and positions without any saliency,
    are left out; a batch with fewer than two such samples has no alignment term.

    There is no public code; what the paper leaves open is decided here. ``temperature`` is not given in it: 0.5 is what
    SimCLR takes for small images (Chen et al., 2020); with less the alignment outweighs the losses. The sum over tasks in
    eq. 9 is a mean. The paper takes logarithms of the losses, as DB-MTL does: with ``log_losses`` saliencies are divided by
    their task's loss in this batch, which is taken as a constant, because its derivative would reward a loss for being
    large. Both terms are blind to a factor that all losses have in common; give the losses without a loss scale. Negatives
    are the other samples of this call: with accumulation those of the micro-batch, in several processes those of all of
    them (their anchors are gathered). Each process returns the penalty of the joined batch, whose gradient is such that the
    mean over the processes is right.

    Between piecewise-linear heads (``Linear``, ReLU) and the backbone it acts only through the curvature of the losses
    (cross-entropy, squared error; not L1). Task-specific regulation pulls saliencies apart where
    :class:`SaliencyRegularizer` pulls them together: do not use both.

    Args:
        model: the model, or a wrapper around it.
        heads, output, tasks, columns: as in :class:`SaliencyRegularizer`.
        feature: the same; one map, not several.
        task_specific_strength, cross_task_strength: factors, ``>= 0``; the paper has 0.9 for both, stable in 0.7 to 1.5 on
            feature maps. On pooled features, ``[B, C]``, try 0.01 and 0.1, too: 0.9 can slow learning down a lot there.
        temperature: of the alignment, ``> 0``.
        log_losses: whether saliencies are those of the logarithms of the losses; then losses must not be negative.
        channel_axis, batch_axis: of the feature map, as in :func:`task_saliencies`.
        optimizer: the optimizer whose steps count for ``start_step`` and ``warmup_steps``, see :meth:`attach_optimizer`.
        process_group: as in :class:`SaliencyRegularizer`.
        start_step, warmup_steps: the penalties are 0 for so many optimizer steps, then rise linearly over so many.
        cross_sample, custom_backward: as in :class:`SaliencyRegularizer`.

    Raises:
        SaliencyRegError: one of its kinds, for arguments that cannot work; the model is then left as it was.

    Example:
        >>> model = nn.ModuleDict({"backbone": nn.Linear(8, 4), "heads": nn.ModuleDict()})
        >>> for task in ("smiling", "young"):
        ...     model["heads"][task] = nn.Linear(4, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> rep = RepMTL(model, heads="heads", optimizer=optimizer)
        >>> feature = model["backbone"](torch.randn(16, 8))
        >>> losses = {task: head(feature).square().squeeze(1) for task, head in model["heads"].items()}  # [B] each
        >>> (sum(loss.mean() for loss in losses.values()) + rep(losses=losses)).backward()
        >>> optimizer.step()
        >>> rep.report.samples.tolist(), int(rep.steps)
        ([16, 16], 1)
    """

    # A copy is not attached: the hooks belong to the original and its model.
    in_a_copy: ClassVar[dict[str, Any]] = {"_capture": None, "_step_hook": None}

    def __init__(
        self,
        model: nn.Module,
        heads: HeadsChoice = None,
        *,
        feature: FeatureChoice = None,
        output: Item | Mapping[str, Item | None] | None = None,
        tasks: Sequence[str] | None = None,
        columns: ColumnsChoice = None,
        task_specific_strength: float = 0.9,
        cross_task_strength: float = 0.9,
        temperature: float = 0.5,
        log_losses: bool = True,
        channel_axis: int | None = None,
        batch_axis: int = 0,
        optimizer: Any = None,
        process_group: Any = None,
        start_step: int = 0,
        warmup_steps: int = 0,
        cross_sample: str = "fix",
        custom_backward: str = "warn",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise WrongTypeError(f"model must be a torch.nn.Module, found {type(model).__name__}.")
        if isinstance(feature, (list, tuple)) and len(feature) != 1:
            raise ConfigurationError(
                f"Rep-MTL is defined at one feature map, found {len(feature)} in feature=. Name one."
            )
        options = RepMTLOptions.among(locals())
        names, found, told = tasks_and_heads(model, heads, tasks, columns, {"feature": feature, "output": output})
        assert found is not None  # there is a model
        super().__init__(names, options, Ranks(process_group, model), told)
        followed = None if optimizer is None else unwrap_optimizer(optimizer)
        # All has been checked: nothing was set on the model or the optimizer before this line.
        self._capture: FeatureCapture | None = FeatureCapture(model, found, feature, output)
        self._step_hook = None if followed is None else StepHook(followed, self.step)
        self._strength_changes()

    @_disable_dynamo  # within a compiled function it runs as it is written, and says what does not work there
    def forward(self, *, losses: Losses | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the penalty of the latest forward, and release that forward.

        Args:
            losses: per sample, ``{task: [B]}`` or a sequence of T, before any weighting (``reduction="none"``; of dense
                outputs the mean over the positions of each sample). Tasks may be left out of a mapping; a loss is 0 where a
                label is missing.
            mask: ``[B, positions...]``, true at real positions of the feature map, or ``[B]``, true at real samples.

        Returns:
            0-dim, on the feature map's device, float32 or float64. Zero under ``no_grad``, for outputs without a graph, and
            while ``enabled`` is false.

        Raises:
            MissingArgumentError: no losses.
            ShapeError: a loss that is not per sample.
            ConfigurationError: losses of a task with a negative sum, with ``log_losses``.
            CaptureError: no unread forward, or one that cannot be used.
            SaliencyRegError: one of its kinds, for arguments that do not fit.
        """
        refuse_reader()
        if self._capture is None:
            raise CaptureError("this RepMTL is a copy, which is attached to no model. Build one with the copied model.")
        if not self.enabled or not torch.is_grad_enabled():
            self._capture.drop()
            return self._zero()
        forward = self._capture.take(empty_on=self.steps.device if self._ranks.size > 1 else None)
        if forward is None:
            return self._zero()
        with self._capture.sharded.gathered():
            return self._penalty_of(forward, losses, mask)

    def attach_optimizer(self, optimizer: Any) -> None:
        """Count this optimizer's steps (and no longer those of an earlier one); one that GradScaler skips does not count.

        Raises:
            WrongTypeError: no optimizer.
        """
        inner = unwrap_optimizer(optimizer)
        if self._step_hook is not None:
            self._step_hook.remove()
        self._step_hook = StepHook(inner, self.step)

    def remove(self) -> None:
        """Take everything off the model and the optimizer. The report stays readable."""
        if self._capture is not None:
            self._capture.remove()
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None

    @property
    def enabled(self) -> bool:
        """While false, calls return zero and the hooks do nothing."""
        return self._capture is not None and self._capture.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if self._capture is not None:
            self._capture.enabled = bool(value)

    @property
    def follows_optimizer(self) -> bool:
        """Whether the steps of an attached optimizer are counted."""
        return self._step_hook is not None

    def __repr__(self) -> str:
        where = "attached to no model" if self._capture is None else f"heads {self._capture.describe()[0]}"
        own, cross = self.options.task_specific_strength, self.options.cross_task_strength
        return f"RepMTL({where}, task_specific_strength={own:g}, cross_task_strength={cross:g})"

    def _zero(self) -> Tensor:
        return torch.zeros((), device=(self._capture and self._capture.device()) or self.steps.device)

    def _strength_changes(self, *, stepped: bool = False) -> None:
        # A penalty that is off leaves the model's graph as it is, to the bit.
        if self._capture is not None:
            self._capture.aliases.for_penalty = self.acts
            if stepped:
                self._capture.stepped()
