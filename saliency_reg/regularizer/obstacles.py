"""What between the feature map and the outputs is not to be differentiated for saliencies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch.utils.hooks import RemovableHandle

from ..capture import CapturedForward, is_plain_linear
from ..errors import ReaderError, SaliencyRegError, SecondDerivativeError
from ..torch_tools import nodes_between, warn_user

_WATCHED = (
    "there are backward hooks on {where}, for which the pass that takes the saliencies looks like that of the losses: "
    "libraries of per-sample gradients (Opacus, BackPACK) use up there what they saved in the forward. {so} To look at "
    "gradients, use hooks on parameters: register_post_accumulate_grad_hook."
)
_COMPILED = (
    "the outputs come out of code of torch.compile, which has no second derivative. {so} Compile the backbone alone, "
    "model.backbone.compile(), in place of the model or of the function that makes the loss."
)
_SYNCHRONISED = (
    "there is a SyncBatchNorm in train mode between the feature map and the outputs, which has no second derivative and "
    "joins processes in each backward pass. {so} Choose a feature map behind it, put it in eval mode, or use a BatchNorm or "
    "GroupNorm there."
)
_REFUSED: dict[type[SaliencyRegError], str] = {
    ReaderError: "Take them off, pass strength=0, or choose a feature map behind them.",
    SecondDerivativeError: "That is what a penalty needs.",
}
_LEFT_OUT = "So no saliencies are taken while the strength is 0, and the relations do not move."


class Obstacles:
    """Keeps saliencies away from backward hooks of others and from compiled code; looks again when hooks were set."""

    def __init__(self) -> None:
        self._hooks_so_far = -1  # in the whole process: torch numbers them
        self._found: tuple[type[SaliencyRegError], str] | None = None
        self._told = False

    def kept_clear(self, forward: CapturedForward, tasks: Sequence[str], strength: float) -> CapturedForward:
        """Return the forward, or without any strength one without heads where there is an obstacle; otherwise raise."""
        changed = self._hooks_so_far != RemovableHandle.next_id
        if (changed or self._found is not None) and forward.features:  # that a hook was taken off is not counted
            self._look(forward, tasks)
            self._hooks_so_far = RemovableHandle.next_id
        if self._found is None:
            return forward
        kind, message = self._found
        if strength > 0:
            raise kind(message.format(so=_REFUSED[kind]))
        if not self._told:
            self._told = True
            warn_user(message.format(so=_LEFT_OUT))
        return replace(forward, ran=[], outputs=[], features=[])

    def call_ends(self) -> None:
        """Leave out the hooks that were set and taken off in this call."""
        self._hooks_so_far = RemovableHandle.next_id

    def _look(self, forward: CapturedForward, tasks: Sequence[str]) -> None:
        if forward.heads_alone and all(map(is_plain_linear, forward.modules)):  # nothing is differentiated
            self._found = None
            return
        where = next(_hooked_parts(forward, tasks), None)
        edges = [edge for feature in forward.features for edge in feature.edges]
        names = {node.name() for node in nodes_between(forward.outputs, edges)}
        if where is None and "BackwardHookFunctionBackward" in names:
            where = "a module between the feature map and the outputs"
        if any("CompiledFunction" in name for name in names):
            self._found = SecondDerivativeError, _COMPILED
        elif any("SyncBatchNorm" in name for name in names):
            self._found = SecondDerivativeError, _SYNCHRONISED
        else:
            self._found = None if where is None else (ReaderError, _WATCHED.replace("{where}", where))


def _hooked_parts(forward: CapturedForward, tasks: Sequence[str]) -> Iterator[str]:
    for index in forward.ran if forward.modules else ():
        for name, part in forward.modules[index].named_modules():
            if part._backward_hooks or part._backward_pre_hooks:
                whose = "" if forward.columns else f" of task {tasks[index]!r}"
                yield f"{name or 'the head'} ({type(part).__name__}){' in the head' if name else ''}{whose}"
