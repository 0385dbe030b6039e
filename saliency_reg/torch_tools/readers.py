"""Others that run a module to read it: exporters, tracers and transforms of functions. Hooks step aside for them.

What they make out of a hooked module is then what they would make out of the plain one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ReaderError

# Before torch had a flag of its own for it, exporting without dynamo set that of the compiler.
_EXPORTING = "_is_exporting_flag" if hasattr(torch.compiler, "_is_exporting_flag") else "_is_compiling_flag"
_PROXY = torch._C._TorchDispatchModeKey.PROXY
# Every hook asks them in every forward: without the way through the attributes.
_is_traced_by_dynamo = torch.compiler.is_dynamo_compiling
_tracing_state = torch._C._get_tracing_state
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_compiler = vars(torch.compiler)


def reader() -> str | None:
    """Return who reads the modules that run now, for a person; ``None`` in an ordinary forward."""
    if _is_traced_by_dynamo():  # traced itself: it may only call what the compiler knows
        exporting = hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
        return "torch.export" if exporting else None
    if _tracing_state() is not None:
        return "torch.jit.trace"
    if _innermost_transform() is not None:
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if _compiler.get(_EXPORTING):
        return "torch.export"
    if _dispatch_modes() and torch._C._get_dispatch_mode(_PROXY) is not None:
        return "make_fx"
    return None


def refuse_reader() -> None:
    """Raise in a call that makes no sense there."""
    if (name := reader()) is not None:
        raise ReaderError(
            f"the regularizer was called within {name}, where its hooks step aside and record no forward. Call it in an "
            "ordinary training step, outside of the function that is transformed, traced or exported."
        )


def are_batched(gradients: Iterable[Tensor | None]) -> bool:
    """Tell whether a backward pass with ``is_grads_batched=True`` brings these."""
    return any(one is not None and torch._C._functorch.is_legacy_batchedtensor(one) for one in gradients)
