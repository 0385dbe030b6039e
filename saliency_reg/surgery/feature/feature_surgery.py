"""Gradient surgery at the feature map as an object of its own, without the penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ...capture import ColumnsChoice, FeatureCapture, FeatureChoice, HeadsChoice, Item, resolve_heads
from ...distributed import Ranks
from ...errors import WrongTypeError
from ...torch_tools import Removable, check_not_closure_only, unwrap_optimizer
from .. import PCGrad
from .combiner import GradientCombiner
from .forked_aliases import ForkedAliases


class FeatureSurgery(GradientCombiner, Removable):
    r"""Gradient surgery between the tasks at the feature map that their heads share, in an ordinary ``loss.backward()``.

    Each head gets its own alias of the feature map. In the backward pass the gradients ``c_t dL_t/dA`` of all tasks (with
    your loss weights ``c_t``) meet at the fork, their Gramian becomes weights ``w_t``, and ``sum_t w_t c_t dL_t/dA`` goes on
    to the backbone, which is passed once, whatever the number of tasks. Heads keep their plain gradients, and loss terms
    that go around the heads pass unchanged, as does all in a pass with ``create_graph=True``. With ``MGDAWeighting`` of
    TorchJD it is MGDA-UB (Sener and Koltun, NeurIPS 2018), with :class:`PCGrad` it is the upper-bound form of Yu et al.
    (NeurIPS 2020), whose own form is :class:`ParameterSurgery`. ``docs/surgery.md`` compares the two.

    It stays on the model until :meth:`remove`, whether or not you keep the object. To combine it with the saliency penalty,
    pass ``surgery=`` to :class:`SaliencyRegularizer` instead.

    Args:
        model: the model, or a wrapper around it.
        heads, tasks, columns: as in :class:`SaliencyRegularizer`; one head with the outputs of all tasks is possible.
        weighting: Gramian ``[T, T]`` to weights ``[T]``: :class:`PCGrad` (the default), a Gramian weighting of TorchJD, or
            any callable. Loss scales multiply the Gramian, so that under GradScaler it should not depend on its size.
        feature: only for heads that are called with several tensors: the modules whose outputs they share.
        output: which part of what a head returns is the task's output (for one head with a column per task).
        channel_axis: of the feature map, to find those columns: as in :func:`task_saliencies`.
        optimizer: only to be checked: one that calls a closure several times per step cannot be used.
        process_group: the data-parallel processes: a group of torch.distributed, or ``"local"`` for this process alone. By
            default a new group, over the processes of a ``DistributedDataParallel`` around the model, or over all.

    Raises:
        SaliencyRegError: one of its kinds, for arguments that cannot work; the model is then left as it was.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"backbone": nn.Linear(8, 4), "heads": nn.ModuleDict()})
        >>> for task in ("smiling", "young"):
        ...     model["heads"][task] = nn.Linear(4, 1)
        >>> surgery = FeatureSurgery(model, heads="heads")
        >>> feature = model["backbone"](torch.randn(16, 8))
        >>> loss = sum(head(feature).square().mean() for head in model["heads"].values())
        >>> loss.backward()
        >>> surgery.report.weights.shape
        torch.Size([2])
    """

    in_a_copy: ClassVar[dict[str, Any]] = {"_capture": None}

    def __init__(
        self,
        model: nn.Module,
        heads: HeadsChoice = None,
        *,
        weighting: Any = None,
        tasks: Sequence[str] | None = None,
        feature: FeatureChoice = None,
        output: Item | Mapping[str, Item | None] | None = None,
        channel_axis: int | None = None,
        columns: ColumnsChoice = None,
        optimizer: Any = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise WrongTypeError(f"model must be a torch.nn.Module, found {type(model).__name__}.")
        found = resolve_heads(model, heads, tasks, columns)
        super().__init__(
            found.tasks, PCGrad() if weighting is None else weighting, Ranks(process_group, model, apart=True)
        )
        if optimizer is not None:
            check_not_closure_only(unwrap_optimizer(optimizer))
        aliases = ForkedAliases(self, found, output, named=feature is not None, channel_axis=channel_axis)
        aliases.for_penalty = False
        self._capture: FeatureCapture | None = FeatureCapture(model, found, feature, output, aliases, keep=True)

    def remove(self) -> None:
        """Take everything off the model. The report stays readable."""
        if self._capture is not None:
            self._capture.remove()

    def __repr__(self) -> str:
        heads = "attached to no model" if self._capture is None else f"heads {self._capture.describe()[0]}"
        return f"FeatureSurgery({type(self.weighting).__name__}, {heads})"
