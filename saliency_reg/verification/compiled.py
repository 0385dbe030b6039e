"""Row ``compiled``: whether something that has to be differentiated twice, or whose hooks have to run, is compiled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..capture import is_compiled
from ..torch_tools import nodes_between
from .report import Check
from .subject import Subject

_ADVICE = (
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
                     _ADVICE)  # fmt: skip
    named = f"compiled, and not to be differentiated twice: {', '.join(parts)}" if parts else "no part is compiled"
    return Check("compiled", True, named)


def not_captured(parts: Sequence[str], error: Exception) -> Check:
    """Return the row for a regularizer that could not be built, or a forward that could not be captured, because of it."""
    return Check(
        "compiled", False, f"compiled: {', '.join(parts) or 'code between feature map and outputs'}. {error}", _ADVICE
    )
