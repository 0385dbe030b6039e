"""Which layer it is: modules are run alone on what they read in the forward. And the row ``compiled``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import is_compiled, tensors_in
from ..saliency import Derivatives, derivatives_of, is_torchs_own
from ..torch_tools import leaves_behind, nodes_behind, nodes_between
from .report import Check
from .subject import Run, Subject


@dataclass
class Part:
    """A module of the model, and its latest run."""

    name: str
    module: nn.Module
    read: list[Tensor] = field(default_factory=list)
    alone: bool = False  # whether one tensor is all that it read
    before: set[Any] = field(default_factory=set)  # where in the graph it read
    node: Any = None  # that made what it returned
    with_gradients: bool = True  # whether it ran with gradients enabled

    def __str__(self) -> str:
        return f"{self.name!r} ({type(self.module).__name__})"


def watched_run(subject: Subject, **how: Any) -> tuple[Run, list[Part]]:
    """Run the model, and return the parts that ran, innermost first."""
    parts: dict[nn.Module, Part] = {}
    with _hooks(subject.model, parts):
        run = subject.run(**how)
    return run, sorted(parts.values(), key=lambda part: -part.name.count("."))


@contextmanager
def _hooks(model: nn.Module, parts: dict[nn.Module, Part]) -> Iterator[None]:
    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        part = parts.setdefault(module, Part(names[module], module))
        part.read = [tensor for _, tensor in tensors_in(args, kwargs)]
        part.with_gradients = torch.is_grad_enabled()
        part.alone = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        part.before = {(tensor.grad_fn, tensor.output_nr) for tensor in part.read}
        new = isinstance(output, Tensor) and (output.grad_fn, output.output_nr) not in part.before
        part.node = output.grad_fn if new else None

    names = {module: name for name, module in model.named_modules() if name}
    handles = [module.register_forward_hook(after, with_kwargs=True) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def innermost(parts: list[Part], guilty: Callable[[Part], bool]) -> list[Part]:
    """Return the parts that are guilty and have no guilty part inside."""
    found: list[Part] = []
    for part in parts:
        if not any(one.module in part.module.modules() for one in found) and guilty(part):
            found.append(part)
    return found


def behind_the_feature(subject: Subject, parts: list[Part]) -> list[Part]:
    """Return the parts of heads, or, where the feature map was named, all that may lie behind it."""
    if subject.capture.feature_names:
        return parts
    return [part for part in parts if part.module in subject.in_heads]


def mixing_parts(subject: Subject, parts: list[Part], size: int) -> list[Part]:
    """Return the parts that mix samples: of which one sample's input changes the output at others."""

    def mixes(part: Part) -> bool:
        x = part.read[0].detach() if part.alone and part.read else None
        if x is None or x.ndim == 0 or len(x) != size:
            return False
        with torch.no_grad():
            before, after = (_alone(subject, part, values) for values in (x, first_moved(x)))
        return before is not None and after is not None and changed_elsewhere(before, after)

    with _not_captured(subject):
        return innermost(behind_the_feature(subject, parts), mixes)


def first_moved(values: Tensor, axis: int = 0) -> Tensor:
    """Return a copy in which the first sample has other values."""
    moved = values.clone()
    moved.select(axis, 0).mul_(1.5).add_(values.float().std().to(values.dtype))
    return moved


@contextmanager
def _not_captured(subject: Subject) -> Iterator[None]:
    enabled, subject.capture.enabled = subject.capture.enabled, False
    try:
        yield
    finally:
        subject.capture.enabled = enabled


def _alone(subject: Subject, part: Part, x: Tensor) -> Tensor | None:
    subject.begin()
    try:
        output = part.module(x.clone())
    except Exception:  # whatever a part does that is not made for this
        return None
    return output if isinstance(output, Tensor) and output.ndim > 0 and len(output) == len(x) else None


def changed_elsewhere(before: Tensor, after: Tensor) -> bool:
    """Whether outputs ``[B, ...]`` differ at other samples than the first, by more than rounding."""
    size = before[1:].abs().max() if before[1:].numel() else torch.zeros(())
    return bool((before[1:] - after[1:]).abs().gt(100 * torch.finfo(before.dtype).eps * size).any())


def parts_without_derivative(subject: Subject, parts: list[Part]) -> dict[str, list[Part]]:
    """Return the parts whose backward is not their derivative, or cannot be differentiated, by what is wrong."""
    found: dict[str, list[Part]] = {}

    def wrong(part: Part) -> bool:
        if not part.alone or not part.read or is_torchs_own(part.module) or not part.read[0].is_floating_point():
            return False
        said = derivatives_of(part.module, part.read[0])
        if said in (Derivatives.NOT_FIRST, Derivatives.NOT_SECOND):
            found.setdefault(said.value, []).append(part)
            return True
        return False

    with _not_captured(subject):
        innermost(behind_the_feature(subject, parts), wrong)
    return found


def patched(parts: list[Part]) -> list[Part]:
    """Return the parts of which an instance has a forward of its own."""
    return [part for part in parts if "forward" in vars(part.module)]


def detached_parts(run: Run, parts: list[Part]) -> list[Part]:
    """Return the parts that ran, can be trained, and of which no output of the model depends."""
    ends = [tensor for _, tensor in tensors_in((run.returned, run.forward.outputs), {})]
    behind = {id(leaf) for leaf in leaves_behind([end for end in ends if end.requires_grad])}
    found = []
    for part in parts:
        own = [one for one in part.module.parameters(recurse=False) if one.requires_grad]
        if own and not any(id(one) in behind for one in own):
            found.append(part)
    return found


def heads_without_backbone(run: Run, backbone: Sequence[Tensor]) -> list[int]:
    """Return the heads whose output depends on no parameter in front of them, where that of others does."""
    ids = {id(one) for one in backbone}
    outputs = dict(zip(run.forward.ran, run.forward.outputs))
    reached = {index: any(id(leaf) in ids for leaf in leaves_behind([output])) for index, output in outputs.items()}
    return [index for index, reaches in reached.items() if not reaches] if any(reached.values()) else []


def changed_in_place(parts: list[Part]) -> list[Part]:
    """Return the parts whose derivative needs a tensor that was changed in place."""

    def lost(part: Part) -> bool:
        try:
            for node in nodes_behind([part.node], part.before):
                for name in dir(node):
                    if name.startswith("_saved_") or name == "saved_tensors":
                        getattr(node, name)
        except RuntimeError:
            return True
        return False

    return innermost(parts, lost)


_COMPILE_ALONE = (
    "Compile the backbone alone, model.backbone.compile(), in place of the heads, the model or a function around them."
)


def compiled_parts(model: nn.Module) -> list[str]:
    """Return the names of compiled modules."""
    return [name or "the model" for name, module in model.named_modules() if is_compiled(module)]


def compiled(subject: Subject) -> Check:
    """Look for compiled modules, and for compiled code in the graph between the feature map and the outputs."""
    parts = compiled_parts(subject.model)
    forward = subject.run().forward
    edges = [edge for feature in forward.features for edge in feature.edges]
    guilty = []
    for index, output in zip(forward.ran, forward.outputs):
        if any("CompiledFunction" in node.name() for node in nodes_between([output], edges)):
            guilty.append(subject.heads.names[index])
    if guilty:
        return Check("compiled", False, f"the outputs of {guilty} come out of compiled code, which has no second derivative",
                     _COMPILE_ALONE)  # fmt: skip
    named = f"compiled, and not to be differentiated twice: {', '.join(parts)}" if parts else "no part is compiled"
    return Check("compiled", True, named)


def not_captured(parts: Sequence[str], error: Exception) -> Check:
    """Return the row for a regularizer that could not be built, or a forward that could not be captured, because of it."""
    return Check(
        "compiled",
        False,
        f"compiled: {', '.join(parts) or 'code between feature map and outputs'}. {error}",
        _COMPILE_ALONE,
    )
