"""Row ``surgery``: the gradient of one backward pass against an explicit reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..saliency import resolve_channel_axis, task_columns
from ..surgery import PCGrad, task_weights
from ..torch_tools import Gradient, gradients_of
from .report import Check
from .subject import Handed, Run, Subject

#: What the user's loop does with the losses and the penalty: ``backward(losses, penalty)``.
Backward = Callable[[Mapping[str, Tensor], Tensor], Any]
_Named = list[tuple[str, nn.Parameter]]


def surgery(subject: Subject, backward: Backward | None, tolerance: float | None) -> Check:
    """Compare the parameters' gradients of one backward pass with task gradients that were combined by hand."""
    combiner = subject.run().twin.surgery
    if combiner is None and backward is None:
        return Check(
            "surgery", None, "not checked: no surgery", "Pass surgery=PCGrad(), or backward= for your own loop."
        )
    if subject.losses is None:
        return Check(
            "surgery", None, "not checked", "Pass losses=, a function of what the model returns: {task: loss}."
        )
    return subject.in_double(lambda: _compared(subject, backward, tolerance))


def _compared(subject: Subject, backward: Backward | None, tolerance: float | None) -> Check:
    named = [(name, one) for name, one in subject.model.named_parameters() if one.requires_grad]
    run = subject.run(surgery=True)
    found = _of_backward(subject, run, backward, named)
    report, weights = None, None
    if run.twin.surgery is None:
        expected = _plain(subject, named)
    else:
        report = run.twin.surgery.report
        if report is None and not subject.backbone(run):
            return Check("surgery", None, "nothing is weighed: no parameter outside of the heads can be trained")
        if report is None:
            return Check("surgery", False, "the surgery has weighed no gradient in this backward pass", _NEVER)
        weights, expected = _reference(subject, named)
    dtype = next(one.dtype for _, one in named)
    allowed = tolerance or 1e4 * torch.finfo(dtype).eps
    off = {name: _distance(found[name], one) for name, one in expected.items()}
    size = max((float(one.double().norm()) for one in expected.values() if one is not None), default=0.0)
    name, worst = max(off.items(), key=lambda item: item[1])
    text = (
        f"largest difference of a parameter's gradient from the reference: {worst / (size or 1.0):.1e} of the longest"
    )
    if weights is not None and report is not None:
        text += f", weights {_few(report.weights)} (reference {_few(weights)})"
    if worst <= allowed * size:
        return Check("surgery", True, text)
    guilty = f"{text}; at {name!r}"
    return Check("surgery", False, guilty, _OWN if backward is not None else _WEIGHTING)


_NEVER = (
    "Pass the losses of the heads' outputs, and call backward on their sum without create_graph=True; nothing else may take "
    "the place of the heads' outputs on the way."
)
_OWN = (
    "Add losses and penalty, call backward on the sum once, and leave weighing to surgery=: gradients that were added up "
    "before the surgery, a penalty that was detached, or weighed with the losses, are not what was asked for."
)
_WEIGHTING = "Look at the weighting, and at code of your own between the heads' outputs and the losses."


def _of_backward(subject: Subject, run: Run, backward: Backward | None, named: _Named) -> dict[str, Gradient]:
    penalty = subject.penalty(run)
    losses = {subject.tasks[task]: loss for task, loss in subject.losses_of(run).items()}
    # On copies of the parameters: hooks on the originals, and their gradients, are left alone.
    if backward is None:
        with torch.enable_grad():
            total = sum((loss.mean() for loss in losses.values()), start=penalty)
        return dict(zip([name for name, _ in named], gradients_of([total], [one for _, one in named])))
    with torch.enable_grad():
        backward(losses, penalty)
    return {name: one.grad for name, one in named}


def _plain(subject: Subject, named: _Named) -> dict[str, Gradient]:
    """Return the gradient of the losses, added up, and of the penalty."""
    run = subject.run()
    penalty = subject.penalty(run)
    with torch.enable_grad():
        total = sum((loss.mean() for loss in subject.losses_of(run).values()), start=penalty)
    return dict(zip([name for name, _ in named], gradients_of([total], [one for _, one in named])))


def _reference(subject: Subject, named: _Named) -> tuple[Tensor, dict[str, Gradient]]:
    """Return the weights, and the plain gradient with ``sum_t (w_t - 1) g_t`` added where the heads read the feature map."""
    sources: list[Tensor] = []

    def note(_: int, source: Tensor) -> Tensor:
        sources.append(source)
        return source

    run = subject.run(Handed(subject.heads, False, note))
    shared = sources[0]
    gradients = _task_gradients(subject, shared.detach())
    weights = _weights(subject, gradients)
    change = sum((weight - 1) * gradient.double() for weight, gradient in zip(weights, gradients))
    assert isinstance(change, Tensor)
    parameters = [one for _, one in named]
    with torch.enable_grad():
        total: Tensor = sum(loss.mean() for loss in subject.losses_of(run).values())  # type: ignore[assignment]
    plain = gradients_of([total], parameters)
    behind: Sequence[Gradient] = [None] * len(parameters)
    if shared.requires_grad and shared.grad_fn is not None:
        behind = gradients_of([shared], parameters, [change.to(shared.dtype)])
    again = subject.run()
    penalty = subject.penalty(again)
    alone = gradients_of([penalty], parameters) if penalty.requires_grad else [None] * len(parameters)
    found: dict[str, Gradient] = {}
    for (name, _), *parts in zip(named, plain, behind, alone):
        present = [part for part in parts if part is not None]
        found[name] = sum(present[1:], start=present[0]) if present else None
    return weights, found


def _task_gradients(subject: Subject, values: Tensor) -> list[Tensor]:
    """Return ``dL/dA`` through each head alone, ``[B, ...]`` for each task, zero for one without a loss."""
    leaves: dict[int, Tensor] = {}

    def own_leaf(head: int, _: Tensor) -> Tensor:
        leaves[head] = values.clone().requires_grad_()
        return leaves[head].clone()  # heads may work on it in place

    run = subject.run(Handed(subject.heads, False, own_leaf))
    forward = run.forward
    with torch.enable_grad():
        total: Tensor = sum(loss.mean() for loss in subject.losses_of(run).values())  # type: ignore[assignment]
    zero = torch.zeros_like(values)
    if not forward.columns:
        found = dict(zip(leaves, gradients_of([total], list(leaves.values()))))
        rows = [found.get(task) for task in range(len(subject.tasks))]
        return [zero if row is None else row for row in rows]
    output = forward.outputs[0]
    (at_output,) = gradients_of([total], [output])
    feature, axis = forward.features[0].tensor, subject.options.channel_axis
    given = next(iter(axis), None) if isinstance(axis, Sequence) else axis
    columns = task_columns(
        output, len(subject.tasks), feature.shape, resolve_channel_axis(feature.shape, given), forward.groups
    )
    places = torch.arange(output.numel(), device=output.device).view(output.shape)
    rows = []
    for task in range(len(subject.tasks)):
        own = torch.zeros(output.numel(), dtype=output.dtype, device=output.device)
        own[columns.part(places, task).flatten()] = 1
        seed = torch.zeros_like(output) if at_output is None else at_output * own.view(output.shape)
        rows += gradients_of([output], [leaves[0]], [seed])
    return [zero if row is None else row for row in rows]


def _weights(subject: Subject, gradients: list[Tensor]) -> Tensor:
    flat = torch.stack([gradient.flatten().double() for gradient in gradients])
    combiner = subject.run().twin.surgery
    assert combiner is not None
    weighting = copy.deepcopy(combiner.weighting)
    if isinstance(weighting, PCGrad):
        return _pcgrad(flat, PCGrad.order(weighting, len(flat)))
    with torch.no_grad():
        return task_weights(weighting, flat @ flat.T, Ranks("local"))


def _pcgrad(gradients: Tensor, order: Tensor) -> Tensor:
    """Algorithm 1 of Yu et al. on the gradients ``[T, N]`` themselves; the weights of their sum, ``[T]``."""
    weights = torch.ones(len(gradients), dtype=gradients.dtype, device=gradients.device)
    for task, others in enumerate(order.tolist()):
        projected = gradients[task].clone()
        for other in others:
            product = projected @ gradients[other]
            if product < 0:
                share = product / (gradients[other] @ gradients[other])
                projected -= share * gradients[other]
                weights[other] -= share
    return weights


def _distance(found: Gradient, expected: Gradient) -> float:
    both = [one.detach().double() for one in (found, expected) if one is not None]
    return float((both[0] - both[1]).norm()) if len(both) == 2 else sum(float(one.norm()) for one in both)


def _few(weights: Tensor) -> str:
    shown = ", ".join(f"{weight:.3g}" for weight in weights.tolist()[:4])
    return f"[{shown}{', ...' if len(weights) > 4 else ''}]"
