"""What can be said of a saliency from the layers of a head alone."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from torch import nn

from ..saliency.scalars import PIECEWISE_LINEAR_SCALARIZATIONS, ScalarizeChoice
from ..torch_tools.hooks import only_ours

__all__ = ["HeadForm", "form_of_heads", "is_plain_linear", "reaches_backbone"]

# Layers whose derivative is locally constant, and containers that only call their children.
_PIECEWISE_LINEAR = (
    nn.Linear,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,
    nn.Threshold,
    nn.modules.conv._ConvNd,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Upsample,
)
_SMOOTH = (
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Softmax,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.GLU,
)


NO_REACH = (
    "The penalty does not reach the backbone: the heads are piecewise linear (Linear, ReLU), so their saliency is locally "
    "constant in the feature map, and the penalty trains the heads only. For it to shape the backbone too, use a smooth "
    "activation such as GELU in the heads, or target='loss'."
)
REACH = {True: "yes", False: "no, it trains the heads only", None: "not known yet"}


class HeadForm(Enum):
    """How a head's saliency depends on its input."""

    PIECEWISE_LINEAR = "piecewise linear: the saliency is locally constant in the feature map"
    SMOOTH = "smooth: the saliency changes with the feature map"
    UNKNOWN = "not known from the layers: measured in the first training call"


def form_of_heads(heads: Sequence[nn.Module]) -> HeadForm:
    """The form that all heads share; smooth as soon as one is."""
    forms = [_form(head) for head in heads]
    for form in (HeadForm.SMOOTH, HeadForm.UNKNOWN):
        if form in forms:
            return form
    return HeadForm.PIECEWISE_LINEAR


def _form(module: nn.Module) -> HeadForm:
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


def is_plain_linear(module: nn.Module) -> bool:
    """A ``Linear`` whose output is nothing but ``x @ weight.T + bias``: no subclass, parametrisation, foreign hook."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and only_ours(module)


def reaches_backbone(form: HeadForm, target: str, scalarize: ScalarizeChoice) -> bool | None:
    """Whether the penalty's gradient reaches the feature map, or ``None`` where only a measurement can tell."""
    if form is HeadForm.SMOOTH or target == "loss":
        return True
    if form is HeadForm.UNKNOWN or scalarize not in PIECEWISE_LINEAR_SCALARIZATIONS:
        return None
    return False
