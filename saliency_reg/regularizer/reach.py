"""Whether the penalty reaches the backbone: what the layers of the heads tell, and what is measured until it is known."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import CapturedForward
from ..errors import SecondDerivativeError
from ..saliency import (
    PIECEWISE_LINEAR_SCALARIZATIONS,
    Derivatives,
    Saliencies,
    ScalarizeChoice,
    custom_functions,
    derivatives_of,
    is_torchs_own,
)
from ..torch_tools import Edge, derives_from, gradients_of, nodes_behind, warn_user

logger = logging.getLogger("saliency_reg")

_NO_REACH = (
    "The penalty does not reach the backbone: the heads are piecewise linear (Linear, ReLU), so their saliency is locally "
    "constant in the feature map, and the penalty trains the heads only. For it to shape the backbone too, use a smooth "
    "activation such as GELU in the heads, or target='loss'."
)

# What torch says of an operation, a compiled part or a cuDNN layer without a second derivative.
_NO_SECOND_DERIVATIVE = ("is not implemented", "double backward", "not implemented for", "does not support")

_NO_GRADIENT = (
    "the penalty has a value and no gradient, so that it trains nothing: neither a parameter of the heads nor the feature "
    "map changes the saliency (frozen heads, or a backward that detaches). Train the heads, use a smooth activation in "
    "them, or set strength=0."
)
_TENSOR_PARALLEL = (
    "the heads of {tasks} are tensor-parallel (their parameters are DTensors), through which torch has no second "
    "derivative: the penalty would have a value and no gradient. Leave the heads out "
    "of parallelize_module, or use fully_shard for them."
)
_NOT_FIRST = (
    "what is between the feature map and the output of {tasks} has a backward that is not its derivative{names}, as "
    "gradient reversal, scaling and straight-through estimators have. Its saliency is what this backward says, and "
    "not that of the function. Move it in front of the feature map, or pass custom_backward='ignore' if it is meant."
)
_NOT_SECOND = (
    "a part of the penalty's gradient is missing: what is between the feature map and the output of {tasks} has a backward "
    "that cannot be differentiated as a whole{names} (it saves an intermediate result, or detaches). Save inputs or "
    "outputs with ctx.save_for_backward and compute the rest in backward, or pass custom_backward='ignore'."
)
_TURNED = (
    "heads {heads} read the feature map through something that changes its gradient alone (reversal, detach, a hook): "
    "their saliency is taken behind it, and what the penalty gives to the backbone goes back through it, if it can. Leave "
    "these heads out of heads=, or, to take their saliency in front of it, name the feature map, e.g. feature='backbone', "
    "custom_backward='ignore'. If it is meant as it is, pass custom_backward='ignore' alone."
)
_NOT_LOOKED_AT = (
    "a backward of your own is between the feature map and the outputs{names}, and it could not be looked at whether it "
    "is the derivative. Check it with torch.autograd.gradgradcheck, and pass custom_backward='ignore' if it is."
)

#: Functions that are the same as layers without a second derivative.
_SAME_FUNCTION = {"Hardsigmoid": "relu6(x + 3) / 6", "Hardswish": "x * relu6(x + 3) / 6"}

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

    # Of earlier versions, whose pickles lack these.
    _custom_backward = "ignore"
    _told: frozenset[str] = frozenset()

    def __init__(
        self,
        heads: Sequence[nn.Module] | None,
        target: str,
        scalarize: ScalarizeChoice,
        custom_backward: str = "ignore",
    ) -> None:
        self.form = HeadForm.UNKNOWN if heads is None else form_of_heads(heads)
        #: ``None`` while it is not known.
        self.reaches = _reaches_backbone(self.form, target, scalarize)
        self._differentiated: set[str] = set()
        self._custom_backward = custom_backward

    def go_on_from(self, before: Reach, tasks: Sequence[str]) -> None:
        """Know of the tasks that stay what was known of other heads; whether it reaches is measured anew."""
        self._differentiated = before._differentiated & set(tasks)
        self._told = before._told

    def describe(self) -> str:
        return {True: "yes", False: "no, it trains the heads only", None: "not known yet"}[self.reaches]

    def tell(self) -> None:
        """Log it if the penalty does not reach the backbone."""
        if self.reaches is False:
            logger.warning(_NO_REACH)

    def measure(
        self, penalty: Tensor, saliencies: Saliencies, forward: CapturedForward, tasks: Sequence[str], *, alone: bool
    ) -> None:
        """Look at the gradient of the penalty, until it is known whether it reaches, and that it exists for each task.

        ``alone``: no other process waits while heads are looked at.
        """
        present = [tasks[task] for task in saliencies.present]
        if self.reaches is not None and self._differentiated.issuperset(present):
            return
        heads = (
            {} if forward.columns else {tasks[task]: forward.modules[task] for task in forward.ran if forward.modules}
        )
        _check_not_parallel(penalty, heads)
        edges = dict.fromkeys(edge for feature in forward.features for edge in feature.edges)
        found = reach_of_penalty(penalty, saliencies.values, present, list(edges), heads)
        if not penalty.requires_grad:
            self._tell(_NO_GRADIENT)
        new = [task for task in present if task not in self._differentiated]
        if new and self._custom_backward == "warn" and not saliencies.closed_form:
            self._look_at_derivatives(forward, heads, new, list(edges), alone)
        self._differentiated.update(present)
        if self.reaches is None:
            self.reaches = found
            self.tell()

    def _look_at_derivatives(
        self, forward: CapturedForward, heads: dict[str, nn.Module], new: Sequence[str], edges: list[Edge], alone: bool
    ) -> None:
        if forward.columns and forward.modules:
            heads = {"all tasks": forward.modules[0]}
        direct = alone and len(forward.features) == 1 and forward.features[0].direct
        said: dict[Derivatives, list[str]] = {found: [] for found in Derivatives}
        for task, head in heads.items():
            if direct and (task in new or forward.columns) and not is_torchs_own(head):
                said[derivatives_of(head, forward.features[0].tensor)].append(task)
        if turned := [name for feature in forward.features for name in feature.turned]:
            self._tell(_TURNED.format(heads=turned))
        functions = custom_functions(forward.outputs, edges)
        names = f" ({', '.join(functions)})" if functions else ""
        for found, words in ((Derivatives.NOT_FIRST, _NOT_FIRST), (Derivatives.NOT_SECOND, _NOT_SECOND)):
            if said[found]:
                self._tell(words.format(tasks=said[found], names=names))
        if functions and (said[Derivatives.UNKNOWN] or not direct):
            self._tell(_NOT_LOOKED_AT.format(names=names))

    def _tell(self, words: str) -> None:
        if words not in self._told:
            self._told |= {words}
            warn_user(words)


def _check_not_parallel(penalty: Tensor, heads: dict[str, nn.Module]) -> None:
    parallel = [t for t, head in heads.items() if any(derives_from(one, "DTensor") for one in head.parameters())]
    if parallel and not penalty.requires_grad:
        raise SecondDerivativeError(_TENSOR_PARALLEL.format(tasks=parallel))


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
    heads: dict[str, nn.Module],
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
        raise _no_second_derivative(task, str(error).strip().splitlines()[0], heads.get(task)) from error
    parts = saliencies.grad_fn.next_functions if saliencies.grad_fn is not None else ()
    if len(parts) == len(present):  # one per task, stacked
        for task, (node, _) in zip(present, parts):
            if _ends_in_error(node):
                raise _no_second_derivative(task, "a function in it is marked with @once_differentiable.")
    if not bool(penalty.detach() > 0):
        return None
    return any(gradient is not None and bool(gradient.any()) for gradient in found)


def _no_second_derivative(task: str, reason: str, head: nn.Module | None = None) -> SecondDerivativeError:
    if "torch.compile" in reason:
        return SecondDerivativeError(
            f"the output of task {task!r} comes out of compiled code, which has no second derivative: {reason} Compile the "
            "backbone alone, model.backbone.compile() in place of torch.compile(model)."
        )
    layers = {} if head is None else _layers_without(head)
    named = [f"{name!r} is a {kind}" if name else f"it is a {kind}" for name, kind in layers.items()]
    operation = re.search(r"aten::_?(\w+?)_backward", reason)
    kinds = set(layers.values()) | {kind for kind in _SAME_FUNCTION if operation and kind.lower() == operation[1]}
    advice = "".join(
        f" In place of {kind} use {_SAME_FUNCTION[kind]}, which is the same function, or choose a feature map behind it."
        for kind in sorted(kinds & _SAME_FUNCTION.keys())
    )
    if named:
        reason = f"{reason} In this head {', '.join(named)}."
    if advice or (layers and "attention" not in reason):
        advice = advice or " Put another layer in its place, or choose a feature map behind it."
        return SecondDerivativeError(
            f"what is between the feature map and the output of task {task!r} has no second derivative: {reason}{advice}"
        )
    return SecondDerivativeError(
        f"what is between the feature map and the output of task {task!r} has no second derivative: {reason} For "
        "attention, run it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH) or choose a feature map behind it; "
        "for an RNN on CUDA, under torch.backends.cudnn.flags(enabled=False); do not compile heads."
    )


def _layers_without(head: nn.Module) -> dict[str, str]:
    """Name the innermost modules of a head that torch cannot differentiate twice: those without parameters are tried."""
    found = {}
    for name, module in head.named_modules():
        if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
            continue
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            x = torch.linspace(-1.0, 1.0, 16).view(1, 4, 2, 2).requires_grad_()
            try:
                (gradient,) = gradients_of([copy.copy(module)(x).sum()], [x], create_graph=True)
                if gradient is not None and gradient.requires_grad:
                    gradients_of([gradient.sum()], [x])
            except Exception as error:  # not made for this shape, or what is looked for
                if any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
                    found[name] = type(module).__name__
    return found


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
