"""The model that is verified, run again and again from the same state, and a regularizer that forgets each run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..capture import CapturedForward, FeatureCapture, HeadAliases, Heads, put_argument, tensors_in
from ..distributed import Ranks
from ..errors import CaptureError, SaliencyRegError
from ..regularizer import SaliencyRegularizer
from ..saliency import Given, Saliencies, batch_first
from ..tasks import losses_per_task
from ..torch_tools import (
    at_least_float32,
    derives_from,
    gradients_of,
    leaves_behind,
    same_tensor,
    users_place,
    without_autocast,
)
from .unchanged import Buffers, Randomness

_Found = TypeVar("_Found")
#: The strength with which a penalty is made whose own is 0.
SOME_STRENGTH = 0.1


@dataclass
class Run:
    """One forward of the model."""

    returned: Any
    forward: CapturedForward
    twin: SaliencyRegularizer  # of this run alone


class UserError(SaliencyRegError, RuntimeError):
    """A function of the user's raised something."""


def called(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the user's, so that an error says that it is of that one, and where."""
    try:
        return function(*args)
    except SaliencyRegError:
        raise
    except Exception as error:
        raise UserError(f"your {name}= raised {type(error).__name__}: {error}{users_place(error)}") from error


class Handed(HeadAliases):
    """Hands each head, or every reader of a named feature map, a tensor of ours in place of the one that was computed."""

    def __init__(self, heads: Heads, named: bool, tensor_for: Callable[[int, Tensor], Tensor | None]) -> None:
        super().__init__(heads)
        self._named = named
        self._tensor_for = tensor_for

    def of_feature(self, index: int, feature: Tensor, *, recorded: bool) -> Tensor | None:
        ours = self._tensor_for(index, feature) if self._named else None
        return super().of_feature(index, feature, recorded=recorded) if ours is None else ours

    def hand_out(self, head: int, args: Any, kwargs: Any, features: Sequence[Tensor], *, recorded: bool) -> Any:
        found = list(tensors_in(args, kwargs))
        source = next((tensor for path, tensor in found if len(path) == 1), None)
        given = None if self._named or source is None else self._tensor_for(head, source)
        if given is None:
            return super().hand_out(head, args, kwargs, features, recorded=recorded)
        ours = given.view_as(given) if given.requires_grad else given  # each head reads an alias of its own
        for path, tensor in found:
            if tensor is source:
                args, kwargs = put_argument(args, kwargs, path, ours)
        return (args, kwargs), ours


class HeldStatistics(TorchFunctionMode):
    """Every BatchNorm with batch statistics uses, as constants, those of the run in which they were first seen."""

    def __init__(self) -> None:
        super().__init__()
        self._known: list[tuple[Tensor, Tensor]] = []
        self._place = 0

    def __enter__(self) -> Any:
        self._place = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = dict(zip(_ARGUMENTS.get(function, ()), args)) | (kwargs or {})
        if function not in _ARGUMENTS or not call.get("training"):
            return function(*args, **(kwargs or {}))
        x = call["input"]
        if self._place == len(self._known):
            values, axes = x.detach().to(at_least_float32(x.dtype)), [0, *range(2, x.ndim)]
            self._known.append((values.mean(axes), values.var(axes, correction=0)))
        mean, variance = self._known[self._place]
        self._place += 1
        weight, bias, epsilon = call.get("weight"), call.get("bias"), call.get("eps", 1e-5)
        return nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=epsilon)


#: What computes a BatchNorm, and the order of its arguments.
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    nn.functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


class Subject:
    """Runs the model on the batch; each run begins from the same buffers and random numbers."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        regularizer: SaliencyRegularizer,
        capture: FeatureCapture,
        losses: Callable[[Any], Any] | None,
        given: dict[str, Any],
    ) -> None:
        self.model, self.capture, self.losses, self.given = model, capture, losses, given
        self._args = batch if isinstance(batch, tuple) else () if isinstance(batch, dict) else (batch,)
        self._kwargs = batch if isinstance(batch, dict) else {}
        self.tasks = regularizer.tasks
        self.options = regularizer._options
        self.enabled = regularizer.enabled
        self.surgery = regularizer.surgery  # the original, of which a loop may know
        self._base = copy.deepcopy(regularizer)
        self.strength, self.share = regularizer.strength, regularizer.share
        strength = self.strength or SOME_STRENGTH
        self._base._options = replace(self.options, strength=strength, share=None, start_step=0, warmup_steps=0)
        self._base.automatic_strength = None
        self._base._joined_batch.ranks = Ranks("local")
        if self._base.surgery is not None:
            self._base.surgery.ranks = Ranks("local")
        devices = list({parameter.device for parameter in model.parameters()})
        self._randomness, self._buffers = Randomness(devices), Buffers(model)
        self._aliases = capture.aliases

    @property
    def heads(self) -> Heads:
        return self.capture.heads

    @cached_property
    def replaceable(self) -> bool:
        """Whether feature maps of ours can take the place of those of the forward, for whoever reads them."""
        if any(":input" in name for name in self.capture.feature_names):
            return False  # others may read it than the module that was named
        features = self.run().forward.features
        for one in features if len(features) > 1 else ():
            if any(same_tensor(one.tensor, other.tensor) for other in features if other is not one):
                return False
            others = [other.edges[0] for other in features if other is not one]
            if one.tensor.requires_grad and any(each is not None for each in gradients_of([one.tensor.sum()], others)):
                return False  # one is computed from another
        return True

    def settle(self) -> None:
        """Remember the channel axes, which a graph that begins at feature maps of ours does not tell."""
        run = self.run()
        with contextlib.suppress(SaliencyRegError):  # which a check will say
            self.saliencies(run)
        self._base._extractor._channel_axes = run.twin._extractor._channel_axes

    def run(
        self, handed: Handed | None = None, *, statistics: HeldStatistics | None = None, surgery: bool = False
    ) -> Run:
        """Run the model once, with gradients, in the mode it is in."""
        twin = copy.deepcopy(self._base)
        if surgery and self.surgery is not None:
            twin.surgery = self.surgery
        aliases = copy.copy(self._aliases) if handed is None else handed
        aliases.for_penalty = True
        if twin.surgery is not None:
            twin.surgery.enabled = surgery
            vars(aliases)["_combiner"] = twin.surgery
        vars(self.capture).update(aliases=aliases, _latest=None, _unread=type(self.capture._unread)(told=True))
        vars(self.capture._raw_inputs)["_aliases"] = aliases
        self.begin()
        model: Any = self.model
        alone = model.no_sync() if derives_from(model, "DistributedDataParallel") else contextlib.nullcontext()
        with torch.enable_grad(), alone, contextlib.nullcontext() if statistics is None else statistics:
            returned = model(*self._args, **self._kwargs)
        forward = self.capture.take()
        if forward is None:
            raise CaptureError(
                "the outputs of all heads carry no graph: they ran under no_grad, are detached, or nothing in the model "
                "can be trained. Run the heads with gradients."
            )
        return Run(returned, forward, twin)

    def begin(self) -> None:
        """Put buffers and random numbers back to where each run begins."""
        self._randomness.again()
        self._buffers.again()

    @cached_property
    def in_heads(self) -> set[nn.Module]:
        """The heads and the modules in them."""
        return {part for head in self.heads.modules for part in head.modules()}

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Return the trained parameters that are in the model now, with their names."""
        return [(name, one) for name, one in self.model.named_parameters() if one.requires_grad]

    def channel_axis(self, run: Run, index: int) -> int | None:
        """Return the channel axis that the saliency takes of one of the feature maps."""
        given = self.options.channel_axis
        one = given[index] if isinstance(given, Sequence) else given
        forward = replace(run.forward, features=[replace(feature) for feature in run.forward.features])
        batch_first(forward, self.options.batch_axis)  # of copies: outputs must not be moved twice
        return run.twin._extractor._channel_axis(index, one, forward)

    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the trained parameters of the heads, and the others."""
        in_heads = {id(one) for head in self.heads.modules for one in head.parameters()}
        named = [one for one in self.model.parameters() if one.requires_grad]
        return [one for one in named if id(one) in in_heads], [one for one in named if id(one) not in in_heads]

    def backbone(self, run: Run) -> list[nn.Parameter]:
        """Return the trained parameters outside of the heads on which the outputs depend."""
        behind = {id(leaf) for leaf in leaves_behind(run.forward.outputs)}
        return [one for one in self.trained()[1] if id(one) in behind]

    def given_for(self, run: Run) -> Given:
        """Return what the regularizer's call is given for this run."""
        mask = self.given.get("mask")
        prepared = run.twin.prepare(run.forward)
        losses = self.losses_of(run) if self.options.target == "loss" else None
        named = None if losses is None else {self.tasks[task]: loss for task, loss in losses.items()}
        return Given(named, self.given.get("targets"), prepared if mask is None else mask)

    def losses_of(self, run: Run) -> dict[int, Tensor]:
        """Return the losses, ``{task number: loss}``, as the user's function gives them."""
        assert self.losses is not None
        found = called("losses", self.losses, run.returned)
        if isinstance(found, Tensor) and found.ndim == 1 and len(found) == len(self.tasks):
            found = list(found.unbind())
        return losses_per_task(found, self.tasks)

    def total_loss(self, run: Run) -> Tensor:
        """Return the sum of the losses, each of them a mean over its samples."""
        with torch.enable_grad():
            zero = torch.zeros((), device=run.forward.device)
            return sum((loss.mean() for loss in self.losses_of(run).values()), start=zero)

    def without_loss(self, run: Run) -> str:
        """Say which heads ran and have no loss."""
        given = self.losses_of(run)
        missing = [self.tasks[task] for task in run.forward.tasks(len(self.tasks)) if task not in given]
        return f"; losses= has none for {', '.join(map(repr, missing))}" if missing else ""

    def penalty(self, run: Run) -> Tensor:
        """Return the penalty, as a call of the regularizer would."""
        given = self.given_for(run)
        with torch.enable_grad(), contextlib.nullcontext() if run.twin.surgery is None else run.twin.surgery.passing():
            return run.twin._penalty_of(run.forward, given)

    def saliencies(self, run: Run, *, create_graph: bool = False) -> Saliencies:
        """Return the saliencies that this penalty is made of; the forward's outputs have their samples first then."""
        given = self.given_for(run)
        batch_first(run.forward, self.options.batch_axis)
        with torch.enable_grad():
            return run.twin._extractor.extract(run.forward, given, create_graph=create_graph)

    def in_double(self, function: Callable[[], _Found]) -> _Found:
        """Call a function with copies of parameters and buffers in float64, if the model can work with them."""
        device = next((one.device.type for one in self.model.parameters()), "cpu")
        if device != "mps":
            with contextlib.suppress(Exception), self.swapped(torch.float64):  # tensors of its own keep their format
                return function()
        with self.swapped():
            return function()

    @contextlib.contextmanager
    def swapped(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Put copies, in another number format, in the place of all parameters and buffers; the originals rest."""
        args, kwargs, buffers = self._args, self._kwargs, self._buffers
        places = [
            (module, name, one)
            for module in self.model.modules()
            for name, one in module._parameters.items()
            if one is not None
        ]
        twins = {
            id(one): nn.Parameter(_as(one, dtype).detach().clone(), one.requires_grad and one.is_floating_point())
            for _, _, one in places
        }
        first = next((one for _, _, one in places), torch.empty(0))
        try:
            for module, name, one in places:
                setattr(module, name, twins[id(one)])
            if dtype is not None:
                buffers.again()
                for path, tensor in tensors_in(args, kwargs):
                    self._args, self._kwargs = put_argument(self._args, self._kwargs, path, tensor.detach().to(dtype))
                for module in self.model.modules():
                    module._buffers.update({n: b if b is None else _as(b, dtype) for n, b in module._buffers.items()})
                self._buffers = Buffers(self.model)
            with without_autocast(first) if dtype is not None else contextlib.nullcontext():
                yield
        finally:
            for module, name, one in places:
                setattr(module, name, one)
            self._args, self._kwargs, self._buffers = args, kwargs, buffers
            buffers.again()


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
