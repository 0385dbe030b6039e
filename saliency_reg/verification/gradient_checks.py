"""Rows ``reach`` and ``derivatives``: where the gradient of the penalty arrives, and whether it is the derivative."""

from __future__ import annotations

import torch
from torch import nn

from ..regularizer import HeadForm
from ..saliency import custom_functions
from ..tasks import first_few
from ..torch_tools import derives_from, gradients_of
from .culprits import (
    Part,
    behind_the_feature,
    changed_in_place,
    detached_parts,
    heads_without_backbone,
    parts_without_derivative,
    patched,
    watched_run,
)
from .finite_differences import STEPS, agrees, behind, of_outputs, of_penalty
from .report import Check
from .subject import Run, Subject


def reach(subject: Subject) -> Check:
    """Take the gradient of the penalty with respect to all parameters."""
    run, parts = watched_run(subject)
    try:
        return _detached(subject, run, parts) or _reach_of(subject, run)
    except RuntimeError as error:
        changed = changed_in_place(parts) if "inplace" in str(error) or "in place" in str(error) else []
        if not changed:
            raise
        text = f"a tensor was changed in place that a gradient needs, one that these made or read: {_names(changed)}"
        return Check("reach", False, text, "Use the operation that makes a new tensor: x = x + y, not x += y.")


def _detached(subject: Subject, run: Run, parts: list[Part]) -> Check | None:
    if found := detached_parts(run, parts):
        if not any(part.with_gradients or part.module in subject.in_heads for part in found):
            text = (
                f"these parts can be trained, but ran under no_grad, so that no gradient reaches them: {_names(found)}"
            )
            return Check("reach", False, text, _NO_GRAD)
        text = f"the outputs do not depend on these parts, which ran and can be trained: {_names(found)}"
        return Check("reach", False, text, f"{_DETACHED} them and the outputs.")
    if heads_apart := heads_without_backbone(run, subject.trained()[1]):
        text = f"heads read what is detached from the backbone: {[subject.heads.names[index] for index in heads_apart]}"
        return Check("reach", False, text, f"{_DETACHED} the backbone and these heads.")
    return None


def _reach_of(subject: Subject, run: Run) -> Check:
    backbone = subject.backbone(run)
    penalty = subject.penalty(run)
    if not penalty.requires_grad:
        return Check("reach", False, "the penalty has a value and no gradient: it trains nothing", _TRAIN_HEADS)
    if not backbone:
        return Check(
            "reach", None, "it trains the heads: no parameter outside of them can be trained (frozen, or none)"
        )
    found = [one for one in gradients_of([penalty], backbone) if one is not None and bool(one.any())]
    if found:
        size = sum(float(one.double().square().sum()) for one in found) ** 0.5
        parameters = f"{len(found)} of {len(backbone)} parameter tensor{'s' * (len(backbone) > 1)}"
        text = f"yes: {parameters} outside of the heads, and the gradient's length is {size:.2g}"
        return Check("reach", True, text)
    if bool(penalty.detach() == 0):
        return Check("reach", None, "not known: the penalty is 0 in this batch (all saliencies are equal)")
    if run.twin._reach.reaches is False and run.twin._reach.form is not HeadForm.SMOOTH:
        return Check(
            "reach",
            None,
            "no, it trains the heads only: their saliency is locally constant (piecewise linear)",
            _SMOOTH,
        )
    text = f"no gradient arrives at the {len(backbone)} parameters outside of the heads"
    return Check("reach", False, text, f"{_DETACHED} them and the heads.")


def _names(parts: list[Part]) -> str:
    return first_few([str(part) for part in parts])


_DETACHED = "Look for .detach(), .data, .item() or no_grad between"
_NO_GRAD = "Run them with gradients, without no_grad, or freeze them by requires_grad_(False) if that is meant."
_SMOOTH = "Use a smooth activation such as GELU in the heads, or target='loss', if it is to reach the backbone."
_TRAIN_HEADS = "Train the heads (they are frozen, or their backward detaches), or use a smooth activation in them."


def derivatives(subject: Subject, tolerance: float | None) -> Check:
    """Compare with finite differences: the saliency along the feature map, and the penalty's gradient along parameters."""
    run, parts = watched_run(subject)
    turned = [name for feature in run.forward.features for name in feature.turned]
    subject.penalty(run)  # raises where torch knows that something cannot be differentiated twice
    wrong, dtype = subject.in_double(lambda: _compared(subject, tolerance))
    if turned:
        wrong.append(f"heads {turned} read the feature map through something that changes its gradient alone")
    if not wrong:
        text = f"finite differences agree with the saliency and with the penalty's gradient ({str(dtype)[6:]})"
        return Check("derivatives", True, text)
    run = subject.run()
    found = parts_without_derivative(subject, parts)
    words = [f"{kind}: {_names(guilty)}" for kind, guilty in found.items()]
    edges = [edge for feature in run.forward.features for edge in feature.edges]
    if functions := custom_functions(run.forward.outputs, edges):
        words.append(f"autograd functions on the way: {', '.join(functions)}")
    if changed := [] if found else patched(behind_the_feature(subject, parts)):
        words.append(f"parts with a forward of their own: {_names(changed)}")
    where = f" ({'; '.join(words)})" if words else ""
    text = f"{' and '.join(wrong)}{where}"
    if subject.options.custom_backward == "ignore":
        return Check("derivatives", None, f"{text} (meant: custom_backward='ignore')")
    if spectral := _spectral(parts):
        return Check("derivatives", False, f"{text}; spectral_norm: {_names(spectral)}", _SPECTRAL)
    return Check("derivatives", False, text, _TURNED if turned else _ADVICE)


def _spectral(parts: list[Part]) -> list[Part]:
    """Return the parts whose weight is computed by a spectral_norm in train mode, under no_grad."""

    def has_one(module: nn.Module) -> bool:  # as a parametrization, or as a hook
        return any(
            derives_from(one, "_SpectralNorm", "SpectralNorm") for one in (module, *module._forward_pre_hooks.values())
        )

    return [part for part in parts if part.module.training and has_one(part.module)]


_SPECTRAL = (
    "Run spectral_norm in eval mode, layer.eval() after model.train(): in train mode it changes its weight in each forward, "
    "under no_grad; or take it out of the heads."
)
_TURNED = (
    "Name the feature map to take the saliency in front of it, e.g. feature='backbone', or pass custom_backward='ignore' if "
    "it is meant."
)


_ADVICE = (
    "Move what is meant (reversal, scaling, straight-through) in front of the feature map; otherwise save inputs by "
    "ctx.save_for_backward and compute in backward with torch operations; custom_backward='ignore' if it is meant."
)


_MISSING = "a part of the penalty's gradient is missing"


def _compared(subject: Subject, tolerance: float | None) -> tuple[list[str], torch.dtype]:
    """Return what is not as it should be, in words, and the number format in which that was found out."""
    dtype = subject.run().forward.features[0].tensor.dtype
    used = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = tolerance or (1e-2 if used == torch.float64 else 5e-2)
    if subject.replaceable:
        functions = {
            "the saliency is not the derivative of the outputs": of_outputs(subject),
            f"{_MISSING} at the feature map": of_penalty(subject, []),
            f"{_MISSING} at the parameters behind it": of_penalty(subject, behind(subject), move_maps=False),
        }
    else:
        functions = {f"{_MISSING} at the parameters of the heads": of_penalty(subject, subject.trained()[0])}
    wrong = [words for words, function in functions.items() if not agrees(function, STEPS[used], allowed)]
    return wrong, dtype
