"""What is measured once, in the first training call: a plain look at the layers could not tell it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.forward import Captured
from ..errors import ConfigurationError, CrossSampleError, SecondDerivativeError
from ..saliency.task_saliencies import Feature
from ..torch_tools.autograd import DDP_SINK, nodes_behind

__all__ = ["FirstCall", "mixes_samples", "reach_of_penalty"]

#: So often it is tried to tell whether samples are mixed, where outputs do not react to the feature map at all.
_MOST_UNDECIDED = 20
CROSS_SAMPLE = ("warn", "error", "ignore")
_MIXES = (
    "an output of one sample depends on the feature map of another one, so the saliency of a sample is not its own. That is "
    "what a BatchNorm in train mode does between the feature map and the outputs: choose a feature map behind it, use "
    "LayerNorm or GroupNorm, put it in eval mode, or type cross_sample='ignore' if it is meant."
)

# What torch says of an operation, a compiled part or a cuDNN layer without a second derivative.
_NO_SECOND_DERIVATIVE = (
    "is not implemented",
    "double backward",
    "not implemented for",
    "does not support",
)


class FirstCall:
    """The measurements of one regularizer, and what its user is told of them.

    Args:
        cross_sample: ``"warn"``, ``"error"`` or ``"ignore"`` where samples are mixed.

    Raises:
        ConfigurationError: another choice.
    """

    def __init__(self, cross_sample: str) -> None:
        if cross_sample not in CROSS_SAMPLE:
            raise ConfigurationError(f"unknown cross_sample {cross_sample!r}. Choose 'warn', 'error' or 'ignore'.")
        self.cross_sample = cross_sample
        # Heads, with the modes that they and their parts were in.
        self._unmixed: set[tuple[int, tuple[bool, ...]]] = set()
        self._mixed: set[tuple[int, tuple[bool, ...]]] = set()
        self._undecided = 0
        self._saw_no_static_graph = False
        self._warned = cross_sample == "ignore"
        self._differentiated: set[str] = set()

    def check_samples(
        self, captured: Sequence[Captured], heads: Sequence[nn.Module], stacklevel: int, needed: bool = False
    ) -> None:
        """Tell if samples are mixed. ``stacklevel`` is that of the user's line, counted from the caller.

        ``needed``: measure even if there is nothing to tell any more.

        Measured when a head runs for the first time with its parts in train or in eval mode as they are.

        Raises:
            CrossSampleError: they are, and ``cross_sample="error"``.
        """
        if self._warned and not needed:
            return
        now = _as_they_are(captured, heads)
        if now <= self._unmixed or now & self._mixed or self._undecided >= _MOST_UNDECIDED:
            return
        mixes = mixes_samples(captured)
        if mixes is None:
            self._undecided += 1
        elif not mixes:
            self._unmixed |= now
        if mixes and self.cross_sample == "error":
            raise CrossSampleError(_MIXES[0].upper() + _MIXES[1:])
        if mixes:
            self._mixed |= now
        if mixes and not self._warned:
            self._warned = True
            warnings.warn(_MIXES, UserWarning, stacklevel=stacklevel + 1)

    def refuse_static_graph(self, tensors: Iterable[Any]) -> None:
        """Raise for what came out of ``DistributedDataParallel(static_graph=True)``, looked at once.

        It takes the first gradient that comes along there for its backward pass, and reduces gradients that are not whole.

        Raises:
            ConfigurationError: it did.
        """
        if self._saw_no_static_graph:
            return
        roots = [tensor.grad_fn for tensor in tensors if isinstance(tensor, Tensor)]
        for node in nodes_behind(roots):
            if node.name() == DDP_SINK and node.ddp_weakref().static_graph:  # type: ignore[attr-defined]
                raise ConfigurationError(
                    "DistributedDataParallel(static_graph=True) takes the gradient of these outputs or losses for its "
                    "backward pass, so that gradients would be wrong. Attach the regularizer to the model with "
                    "target='output', which takes the outputs from the heads, or type static_graph=False."
                )
        self._saw_no_static_graph = True

    def found_unmixed(self, captured: Sequence[Captured], heads: Sequence[nn.Module]) -> bool:
        """Whether these heads, with all parts in the mode they are in, have been seen to keep samples apart.

        A single sample is apart from all others, unless that is known to be otherwise for more of them: so that a resumed
        run which begins with one goes the way of the uninterrupted run.
        """
        if len(captured[0].feature) == 1:
            return not _as_they_are(captured, heads) & self._mixed
        return _as_they_are(captured, heads) <= self._unmixed

    def reach(
        self,
        penalty: Tensor,
        saliencies: Tensor,
        present: Sequence[str],
        edges: Sequence[Sequence[Feature]],
        known: bool | None,
    ) -> bool | None:
        """:func:`reach_of_penalty`, until it is ``known`` and the second derivative has been seen to exist."""
        if known is not None and self._differentiated.issuperset(present):
            return known
        found = reach_of_penalty(penalty, saliencies, present, edges)
        self._differentiated.update(present)
        return found if known is None else known


def _as_they_are(captured: Sequence[Captured], heads: Sequence[nn.Module]) -> set[tuple[int, tuple[bool, ...]]]:
    return {
        (index, tuple(module.training for module in heads[index].modules()) if heads else ())
        for index in captured[0].present
    }


def mixes_samples(captured: Sequence[Captured]) -> bool | None:
    """Whether the outputs of sample 0 depend on the feature map at other samples.

    ``None`` where that cannot be told: for a single sample, and where a head is blind to its own sample (zero weights).
    """
    decided = True
    for one in captured:
        outputs = [output for output in one.outputs if output.ndim > 0 and len(output) == len(one.feature)]
        if len(one.feature) < 2 or not outputs:
            return None
        # Unequal factors: the sum of softmax outputs is constant.
        first = [
            (
                output[:1].float() * torch.linspace(1, 2, output[:1].numel(), device=output.device).view_as(output[:1])
            ).sum()
            for output in outputs
        ]
        edges = list(dict.fromkeys(edge for own in one.edges for edge in own))
        for gradient in _gradients(first, edges):
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                return None
            if gradient is not None and bool(gradient[1:].any()):
                return True
            decided = decided and gradient is not None and bool(gradient[0].any())
    return False if decided else None


def reach_of_penalty(
    penalty: Tensor,
    saliencies: Tensor,
    present: Sequence[str],
    edges: Sequence[Sequence[Feature]],
) -> bool | None:
    """Whether the penalty's gradient reaches the feature map; ``None`` if the penalty is zero, which says nothing.

    Raises:
        SecondDerivativeError: a part between the feature map and an output has no second derivative; the task and what
            torch said of it are named.
    """
    if not penalty.requires_grad:
        return False
    places = list(dict.fromkeys(edge for own in edges for edge in own))
    try:
        # With respect to the feature map alone: gradients of parameters would call the hooks that users set on them.
        found = _gradients([penalty], places)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
            raise
        task = _culprit(saliencies, present, places)
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


def _culprit(saliencies: Tensor, present: Sequence[str], inputs: Sequence[Feature]) -> str:
    for task, saliency in zip(present, saliencies):
        try:
            if saliency.requires_grad:
                _gradients([saliency.sum()], inputs)
        except RuntimeError:
            return task
    return present[0]


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Feature]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        list(outputs),
        list(inputs),  # type: ignore[arg-type]  # edges are accepted, which older annotations do not say
        retain_graph=True,
        allow_unused=True,
    )
