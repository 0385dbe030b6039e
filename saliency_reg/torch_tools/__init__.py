"""Tools that torch does not have. Nothing here knows of tasks, heads or penalties.

Read ``hooks`` (hooks on modules) and ``autograd`` (gradients and walks through the graph) first; look up the rest when you
meet it: ``readers`` (for whom hooks step aside), ``optimizers`` (hooks on steps), ``state`` (buffers as state, counts,
seeded draws), ``attachment`` (objects that are detached again, and not copied), ``precision`` (number formats), ``checks``
(of arguments; warnings at the user's line).
"""

from .attachment import PartlyCopied, Removable
from .autograd import (
    DDP_SINK,
    Edge,
    Gradient,
    added,
    edge_of,
    gradients_of,
    in_backward,
    leaves_behind,
    leaves_behind_each,
    nodes_behind,
    nodes_between,
    recomputing,
    same_tensor,
    this_pass,
    version_of,
)
from .checks import (
    check_choice,
    derives_from,
    non_negative_number,
    positive_number,
    share_below_one,
    users_place,
    warn_user,
    whole_number,
)
from .hooks import Hook, ModuleHooks, has_only_our_hooks, is_hooked, owners_of_hooks, without_hooks
from .optimizers import StepGuard, StepHook, check_not_closure_only, unwrap_optimizer
from .precision import at_least_float32, matmul_is_reduced, without_autocast
from .readers import are_batched, reader, refuse_reader
from .state import SeededModule, StateModule, names_from_bytes, names_to_bytes, real_device, state_dtype

__all__ = [
    "DDP_SINK",
    "Edge",
    "Gradient",
    "Hook",
    "ModuleHooks",
    "PartlyCopied",
    "Removable",
    "SeededModule",
    "StateModule",
    "StepGuard",
    "StepHook",
    "added",
    "are_batched",
    "at_least_float32",
    "check_choice",
    "check_not_closure_only",
    "derives_from",
    "edge_of",
    "gradients_of",
    "has_only_our_hooks",
    "in_backward",
    "is_hooked",
    "leaves_behind",
    "leaves_behind_each",
    "matmul_is_reduced",
    "names_from_bytes",
    "names_to_bytes",
    "nodes_behind",
    "nodes_between",
    "recomputing",
    "non_negative_number",
    "owners_of_hooks",
    "positive_number",
    "reader",
    "real_device",
    "refuse_reader",
    "same_tensor",
    "share_below_one",
    "state_dtype",
    "this_pass",
    "unwrap_optimizer",
    "users_place",
    "version_of",
    "warn_user",
    "whole_number",
    "without_autocast",
    "without_hooks",
]
