"""Row ``surgery``: the gradient of one backward pass against an explicit reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..regularizer import SaliencyRegularizer
from ..saliency import Pooling, batch_first, task_columns
from ..surgery.parameters import ParameterSurgery
from ..torch_tools import Gradient, added, gradients_of
from .parameter_level import (
    ParameterLevel,
    TaskGradients,
    held_by,
    lent_to_a_loop,
    possible_weights,
    shared_names,
    task_gradients,
    weights_of,
)
from .report import Check
from .subject import Handed, Run, Subject, called
from .unchanged import lent

#: What the user's loop does with the losses and the penalty: ``backward(losses, penalty)``.
Backward = Callable[[Mapping[str, Tensor], Tensor], Any]
_Named = list[tuple[str, nn.Parameter]]


def surgery(
    subject: Subject,
    backward: Backward | None,
    tolerance: float | None,
    level: ParameterLevel | None = None,
    *,
    attached: bool = False,
) -> Check:
    """Compare the parameters' gradients of one backward pass with task gradients that were combined by hand.

    ``level``: they are combined at the parameters. ``attached``: the surgery is that of the user's own regularizer.
    """
    combiner = subject.surgery
    if combiner is None and backward is None and level is None:
        return Check(
            "surgery", None, "not checked: no surgery", "Pass surgery=PCGrad(), or backward= for your own loop."
        )
    if subject.losses is None:
        return Check(
            "surgery", None, "not checked", "Pass losses=, a function of what the model returns: {task: loss}."
        )
    if level is not None:
        return subject.in_double(lambda: _at_parameters(subject, backward, tolerance, level))
    if combiner is not None and not combiner.enabled:
        return Check("surgery", None, "not checked: regularizer.surgery.enabled is False, so that nothing is weighed")
    others = [one for one in held_by(backward, SaliencyRegularizer) if one.surgery not in (None, combiner)]
    if others:
        return Check("surgery", None, "not checked: your loop uses the surgery of another regularizer", _OTHER)
    try:
        check = subject.in_double(lambda: _compared(subject, backward, tolerance))
        built = combiner is not None and backward is not None and not attached
        return replace(check, advice=_BUILT) if check.passed and built else check
    except SurgeryError as error:
        if backward is None or combiner is None or _APART not in str(error):
            raise
        text = str(error).split(", so that")[0]
        if attached:
            return Check("surgery", False, text, _ONCE)
    # A loop that takes the gradients of the tasks one by one may combine them itself.
    by_hand = ParameterLevel(combiner.weighting)
    return subject.in_double(lambda: _at_parameters(subject, backward, tolerance, by_hand, text))


def _compared(subject: Subject, backward: Backward | None, tolerance: float | None) -> Check:
    named, combiner = subject.named(), subject.surgery
    used = next(iter(held_by(backward, ParameterSurgery)), None)
    weighting = {} if combiner is None else {"weighting": copy.deepcopy(combiner.weighting)}
    with lent(combiner, _report=None, **weighting), lent_to_a_loop(used):
        run = subject.run(surgery=True)
        found = _of_backward(subject, run, backward, named)
        report = None if run.twin.surgery is None else run.twin.surgery.report
    if run.twin.surgery is None:
        return _beside_plain(_Loop(found, tolerance), task_gradients(subject, named), used is not None)
    if report is None and not subject.backbone(run):
        return Check("surgery", None, "nothing is weighed: no parameter outside of the heads can be trained")
    if report is None:
        return Check("surgery", False, "the surgery has weighed no gradient in this backward pass", _NEVER)
    plain = _of_backward(subject, subject.run(), None, named)
    weights, expected = _reference(subject, named, plain)
    loop = _Loop(found, tolerance)
    text, right = loop.beside(expected)
    text += f", weights {_few(report.weights)} at the feature map (reference {_few(weights)})"
    nothing = bool((weights - 1).abs().max() < 1e-9)
    if right:
        return Check("surgery", True, text + _NO_CONFLICT if nothing else text)
    if not nothing and loop.beside(plain)[1]:
        return Check("surgery", False, f"{_SUMMED}; {text}", _OWN if backward is not None else _WEIGHTING)
    return Check("surgery", False, text, _OWN if backward is not None else _WEIGHTING)


@dataclass
class _Loop:
    """The gradients that a backward pass left, to be compared."""

    found: dict[str, Gradient]
    tolerance: float | None

    def beside(self, expected: Mapping[str, Gradient]) -> tuple[str, bool]:
        """Return the difference in words, and whether it is but rounding."""
        present = [one for one in expected.values() if one is not None]
        allowed = self.tolerance or 1e4 * max((torch.finfo(one.dtype).eps for one in present), default=0.0)
        off = {name: _distance(self.found[name], one) for name, one in expected.items()}
        size = max((float(one.double().norm()) for one in present), default=0.0)
        name, worst = max(off.items(), key=lambda item: item[1])
        right = worst <= allowed * size
        text = f"largest difference of a parameter's gradient from the reference: {worst / (size or 1.0):.1e} of the longest"
        return text + f" gradient{'' if right else f' (at {name!r})'}", right

    def away(self, gradients: TaskGradients, weights: Tensor, shared: set[str]) -> float:
        """Return the distance from the gradients under these weights."""
        expected = gradients.combined(weights, shared)
        return sum(_distance(self.found[name], expected[name]) for name in shared)


def _beside_plain(loop: _Loop, gradients: TaskGradients, holds_surgery: bool) -> Check:
    """Compare a loop, without an algorithm to compare it with, with the sum of the losses and the penalty."""
    ones = torch.ones(len(gradients.tasks))
    plain = gradients.combined(ones, set())
    text, right = loop.beside(plain)
    if right and holds_surgery:
        found = "your loop holds a ParameterSurgery, and its gradient is the plain sum of losses and penalty"
        return Check("surgery", None, found, "Pass surgery=it to compare with the algorithm.")
    if right:
        return Check("surgery", True, f"{text}, which is the plain sum of losses and penalty: no surgery acts in it")
    if _without_penalty(loop, gradients):
        return Check("surgery", False, f"{text}: the penalty's gradient is missing", _MISSING)
    pairs = [(one, plain[name]) for name, one in loop.found.items()]
    both = [(x.flatten().double(), y.flatten().double()) for x, y in pairs if x is not None and y is not None]
    if not both:
        return Check("surgery", False, "your loop leaves no gradient at any parameter", _MISSING)
    x, y = (torch.cat(parts) for parts in zip(*both))
    cosine = float(torch.nn.functional.cosine_similarity(x, y, dim=0))
    return Check("surgery", None, f"your loop changes the sum of the gradients (cosine {cosine:.4g})", _COMPARE)


def _without_penalty(loop: _Loop, gradients: TaskGradients) -> bool:
    """Whether the penalty is missing where no surgery acts: at parameters of one task alone, or everywhere."""
    alone = [n for place, n in enumerate(gradients.names) if gradients.reached(place) == 1]
    without = gradients.combined(torch.ones(len(gradients.tasks)), set(), penalty=False)
    least = {name: without[name] for name in alone} or without
    whole = gradients.combined(torch.ones(len(gradients.tasks)), set())
    return loop.beside(least)[1] and not loop.beside({name: whole[name] for name in least})[1]


def _at_parameters(
    subject: Subject,
    backward: Backward | None,
    tolerance: float | None,
    level: ParameterLevel,
    apart: str = "",
) -> Check:
    """Compare with task gradients that are weighed at the shared parameters; ``apart``: why not at the feature map."""
    named = subject.named()
    gradients = task_gradients(subject, named)
    shared, measured = shared_names(gradients, level.surgery)
    if not shared:
        return Check("surgery", None, "nothing is weighed: no trained parameter is shared by two tasks")
    choices = possible_weights(level, gradients.gramian(measured or shared))
    with lent_to_a_loop(level.surgery):
        own = backward if backward is not None else level.surgery.backward if level.surgery is not None else None
        found = _of_backward(subject, subject.run(), own, named)
    loop = _Loop(found, tolerance)
    nothing = bool((choices[0] - 1).abs().max() < 1e-9)
    best = min(choices, key=lambda one: loop.away(gradients, one, shared))
    text, right = loop.beside(gradients.combined(best, shared))
    text += f", weights {_few(best)} of the {len(shared)} parameters that tasks share"
    plain = loop.beside(gradients.combined(torch.ones(len(best)), set()))[1]
    if apart and plain:
        if nothing:
            return Check("surgery", None, f"{apart}, and add up to their plain sum{_NO_CONFLICT}", _OTHER_BATCH)
        return Check("surgery", False, f"{_SUMMED} ({apart})", f"{_PER_TASK} {_AT_FEATURE}")
    if right:
        return Check("surgery", True, text + _NO_CONFLICT if nothing else text)
    if plain:
        return Check("surgery", False, f"{_SUMMED}; {text}", _PER_TASK)
    if _without_penalty(loop, gradients):
        return Check("surgery", False, f"{text}: the penalty's gradient is missing", _MISSING)
    return Check("surgery", False, text, _PER_TASK)


_APART = "arrived in separate backward passes"
_SUMMED = "PCGrad on summed gradients: tasks conflict, and the gradient is their plain sum all the same"
_NO_CONFLICT = "; no tasks conflict in this batch, so that nothing was projected (weights all 1)"
_COMPARE = "Pass surgery=PCGrad() (or the ParameterSurgery) to compare with the algorithm."
_MISSING = "Call backward on the penalty, too: add it to the losses, or pass it as surgery.backward(losses, penalty)."
_PER_TASK = (
    "Take the gradient of each task's own loss, combine these, and add the penalty's gradient after that, as "
    "ParameterSurgery.backward(losses, penalty) does."
)
_AT_FEATURE = "For the surgery at the feature map, call backward once, on the sum of losses and penalty."
_OTHER_BATCH = "Try another batch, in which tasks conflict."
_OTHER = "Pass regularizer=, the one that the loop uses."
_ONCE = (
    "Add the losses and the penalty and call backward once on the sum, for the surgery at the feature map. For a loop that "
    "combines the task gradients itself, build the regularizer without surgery=, and pass surgery= to verify alone."
)
_NEVER = (
    "Pass the losses of the heads' outputs, and call backward on their sum without create_graph=True and outside of "
    "surgery.passing(); nothing else may take the place of the heads' outputs on the way."
)
_OWN = (
    "Add losses and penalty and call backward on the sum once: gradients that were added up before the surgery, a penalty "
    "that was detached, or weighed with the losses, are not what was asked for."
)
_BUILT = (
    "The surgery is that of a regularizer that was built here. For a loop that combines the task gradients itself, pass its "
    "regularizer=, too, built without surgery=."
)
_WEIGHTING = "Look at the weighting, and at code of your own between the heads' outputs and the losses."


def _of_backward(subject: Subject, run: Run, backward: Backward | None, named: _Named) -> dict[str, Gradient]:
    """Return the gradients that a backward pass leaves: that of a loop, or of the sum of losses and penalty."""
    penalty = subject.penalty(run)
    if backward is None:
        with torch.enable_grad():
            total = subject.total_loss(run) + penalty
        return dict(zip([name for name, _ in named], gradients_of([total], [one for _, one in named])))
    losses = {subject.tasks[task]: loss for task, loss in subject.losses_of(run).items()}
    # On copies of the parameters: hooks on the originals, and their gradients, are left alone.
    with torch.enable_grad():
        called("backward", backward, losses, penalty)
    return {name: one.grad for name, one in named}


def _reference(subject: Subject, named: _Named, plain: Mapping[str, Gradient]) -> tuple[Tensor, dict[str, Gradient]]:
    """Return the weights, and the plain gradient with ``sum_t (w_t - 1) g_t`` added where the heads read the feature map."""
    sources: list[Tensor] = []

    def note(_: int, source: Tensor) -> Tensor:
        sources.append(source)
        return source

    subject.run(Handed(subject.heads, False, note))
    shared = sources[0]
    assert subject.surgery is not None
    gradients = _task_gradients(subject, shared.detach())
    weights = weights_of(subject.surgery.weighting, torch.stack([one.flatten().double() for one in gradients]))
    if shared.grad_fn is None:
        return weights, dict(plain)
    change = added(*[(weight - 1) * one.double() for weight, one in zip(weights, gradients)])
    assert change is not None
    behind = gradients_of([shared], [one for _, one in named], [change.to(shared.dtype)])
    return weights, {name: added(plain[name], one) for (name, _), one in zip(named, behind)}


def _task_gradients(subject: Subject, values: Tensor) -> list[Tensor]:
    """Return ``dL/dA`` through each head alone, ``[B, ...]`` for each task, zero for one without a loss."""
    leaves: dict[int, Tensor] = {}

    def own_leaf(head: int, _: Tensor) -> Tensor:
        leaves[head] = values.clone().requires_grad_()
        return leaves[head].clone()  # heads may work on it in place

    run = subject.run(Handed(subject.heads, False, own_leaf))
    forward, total = run.forward, subject.total_loss(run)
    zero = torch.zeros_like(values)
    if not forward.columns:
        found = dict(zip(leaves, gradients_of([total], list(leaves.values()))))
        rows = [found.get(task) for task in range(len(subject.tasks))]
        return [zero if row is None else row for row in rows]
    output = forward.outputs[0]
    (at_output,) = gradients_of([total], [output])
    feature, axis = forward.features[0], subject.channel_axis(run, 0)
    forward.outputs = [torch.arange(output.numel(), device=output.device).view(output.shape)]
    batch_first(forward, subject.options.batch_axis)
    pooling, (places,) = Pooling(feature.tensor.shape, axis, None, None, feature.batch_axis), forward.outputs
    columns = task_columns(places, len(subject.tasks), pooling.shape, pooling.channel_axis, forward.groups)
    rows = []
    for task in range(len(subject.tasks)):
        own = torch.zeros(output.numel(), dtype=output.dtype, device=output.device)
        own[columns.part(places, task).flatten()] = 1
        seed = torch.zeros_like(output) if at_output is None else at_output * own.view(output.shape)
        rows += gradients_of([output], [leaves[0]], [seed])
    return [zero if row is None else row for row in rows]


def _distance(found: Gradient, expected: Gradient) -> float:
    both = [one.detach().double() for one in (found, expected) if one is not None]
    return float((both[0] - both[1]).norm()) if len(both) == 2 else sum(float(one.norm()) for one in both)


def _few(weights: Tensor) -> str:
    shown = ", ".join(f"{weight:.3g}" for weight in weights.tolist()[:4])
    return f"[{shown}{', ...' if len(weights) > 4 else ''}]"
