"""Whether the penalty reaches the backbone: what the layers of the heads tell, and what is measured until it is known."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import Enum
from typing import Any

from torch import Tensor, nn

from ..capture import CapturedForward
from ..errors import SecondDerivativeError
from ..saliency import PIECEWISE_LINEAR_SCALARIZATIONS, Saliencies, ScalarizeChoice
from ..torch_tools import Edge, gradients_of, nodes_behind

logger = logging.getLogger("saliency_reg")

_NO_REACH = (
    "The penalty does not reach the backbone: the heads are piecewise linear (Linear, ReLU), so their saliency is locally "
    "constant in the feature map, and the penalty trains the heads only. For it to shape the backbone too, use a smooth "
    "activation such as GELU in the heads, or target='loss'."
)

# What torch says of an operation, a compiled part or a cuDNN layer without a second derivative.
_NO_SECOND_DERIVATIVE = ("is not implemented", "double backward", "not implemented for", "does not support")

# Layers whose derivative is locally constant, containers that only call their children, and smooth layers.
_LINEAR = (nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten, nn.Upsample, nn.modules.conv._ConvNd)
_KINKED = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,
    nn.Threshold,
    nn.modules.dropout._DropoutNd,
)
_POOLING = ("_MaxPoolNd", "_AvgPoolNd", "_AdaptiveAvgPoolNd", "_AdaptiveMaxPoolNd")
_PIECEWISE_LINEAR = (*_LINEAR, *_KINKED, *(getattr(nn.modules.pooling, name) for name in _POOLING))
_ACTIVATIONS = (
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
)
_SMOOTH = (*_ACTIVATIONS, nn.LogSigmoid, nn.Softmax, nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention, nn.RNNBase)


class HeadForm(Enum):
    """How a head's saliency depends on its input."""

    PIECEWISE_LINEAR = "piecewise linear: the saliency is locally constant in the feature map"
    SMOOTH = "smooth: the saliency changes with the feature map"
    UNKNOWN = "not known from the layers: measured in the first training call"


class Reach:
    """Whether the penalty's gradient reaches the feature map, by the layers of the ``heads`` or by a measurement.

    ``heads`` is ``None`` where they do not tell all that is between the feature map and the outputs.
    """

    def __init__(self, heads: Sequence[nn.Module] | None, target: str, scalarize: ScalarizeChoice) -> None:
        self.form = HeadForm.UNKNOWN if heads is None else form_of_heads(heads)
        #: ``None`` while it is not known.
        self.reaches = _reaches_backbone(self.form, target, scalarize)
        self._differentiated: set[str] = set()

    def describe(self) -> str:
        return {True: "yes", False: "no, it trains the heads only", None: "not known yet"}[self.reaches]

    def tell(self) -> None:
        """Log it if the penalty does not reach the backbone."""
        if self.reaches is False:
            logger.warning(_NO_REACH)

    def measure(self, penalty: Tensor, saliencies: Saliencies, forward: CapturedForward, tasks: Sequence[str]) -> None:
        """Look at the gradient of the penalty, until it is known whether it reaches, and that it exists for each task."""
        present = [tasks[task] for task in saliencies.present]
        if self.reaches is not None and self._differentiated.issuperset(present):
            return
        edges = dict.fromkeys(edge for feature in forward.features for edge in feature.edges)
        found = reach_of_penalty(penalty, saliencies.values, present, list(edges))
        self._differentiated.update(present)
        if self.reaches is None:
            self.reaches = found
            self.tell()


def form_of_heads(heads: Sequence[nn.Module]) -> HeadForm:
    """The form that all heads share; smooth as soon as one is."""
    forms = [_form(head) for head in heads]
    for form in (HeadForm.SMOOTH, HeadForm.UNKNOWN):
        if form in forms:
            return form
    return HeadForm.PIECEWISE_LINEAR


def _form(module: nn.Module) -> HeadForm:
    if "forward" in vars(module):
        return HeadForm.UNKNOWN  # patched
    if isinstance(module, _SMOOTH):
        return HeadForm.SMOOTH
    if isinstance(module, _PIECEWISE_LINEAR):
        return HeadForm.PIECEWISE_LINEAR
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        # With batch statistics it is no longer linear, and a user may switch that at any time.
        return HeadForm.UNKNOWN
    if type(module) is nn.Sequential:
        return form_of_heads(list(module.children()))
    return HeadForm.UNKNOWN  # a forward of its own may do anything


def _reaches_backbone(form: HeadForm, target: str, scalarize: ScalarizeChoice) -> bool | None:
    """Whether the penalty's gradient reaches the feature map, or ``None`` where only a measurement can tell."""
    if form is HeadForm.SMOOTH or target == "loss":
        return True
    if form is HeadForm.UNKNOWN or scalarize not in PIECEWISE_LINEAR_SCALARIZATIONS:
        return None
    return False


def reach_of_penalty(
    penalty: Tensor,
    saliencies: Tensor,
    present: Sequence[str],
    edges: Sequence[Edge],
) -> bool | None:
    """Whether the penalty's gradient reaches the feature map; ``None`` if the penalty is zero, which says nothing.

    Raises :class:`SecondDerivativeError`, with the task, for a part that has no second derivative.
    """
    if not penalty.requires_grad:
        return False
    try:
        # With respect to the feature map alone: gradients of parameters would call the hooks that users set on them.
        found = gradients_of([penalty], edges)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
            raise
        task = _culprit(saliencies, present, edges)
        raise _no_second_derivative(task, str(error).strip().splitlines()[0]) from error
    parts = saliencies.grad_fn.next_functions if saliencies.grad_fn is not None else ()
    if len(parts) == len(present):  # one per task, stacked
        for task, (node, _) in zip(present, parts):
            if _ends_in_error(node):
                raise _no_second_derivative(task, "a function in it is marked with @once_differentiable.")
    if not bool(penalty.detach() > 0):
        return None
    return any(gradient is not None and bool(gradient.any()) for gradient in found)


def _no_second_derivative(task: str, reason: str) -> SecondDerivativeError:
    if "torch.compile" in reason:
        return SecondDerivativeError(
            f"the output of task {task!r} comes out of compiled code, which has no second derivative: {reason} Compile the "
            "backbone alone, model.backbone.compile() in place of torch.compile(model)."
        )
    return SecondDerivativeError(
        f"what is between the feature map and the output of task {task!r} has no second derivative: {reason} For "
        "attention, run it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH) or choose a feature map behind it; "
        "for an RNN on CUDA, under torch.backends.cudnn.flags(enabled=False); do not compile heads."
    )


def _ends_in_error(node: Any) -> bool:
    """Whether autograd has put a node there that raises as soon as a gradient arrives (off the way to the feature map)."""
    return any("Error" in behind.name() for behind in nodes_behind([node]))


def _culprit(saliencies: Tensor, present: Sequence[str], inputs: Sequence[Edge]) -> str:
    for task, saliency in zip(present, saliencies):
        try:
            if saliency.requires_grad:
                gradients_of([saliency.sum()], inputs)
        except RuntimeError:
            return task
    return present[0]
