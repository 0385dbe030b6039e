"""Whether a state, in a state dict or in use, belongs to a regularizer and counts what it should."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...errors import StateMismatchError
from ...torch_tools import names_from_bytes, state_dtype, warn_user
from ..strength import AutomaticStrength

if TYPE_CHECKING:
    from ..penalty import Penalty

_TWIN = "steps_as_float"


def check_state(own: Penalty, state: Mapping[str, Any], prefix: str) -> None:
    """Check the tasks and the surgery; put into ``state`` what it cannot have: of an earlier version, or of new surgery."""
    given = cast("dict[str, Any]", state)
    steps = state.get(prefix + "steps")
    if _TWIN not in own._buffers:  # from an older pickle
        for name in (_TWIN, "saliency_seen"):
            given.pop(prefix + name, None)
    elif isinstance(steps, Tensor) and (prefix + _TWIN not in state or _rounds_to(steps, state[prefix + _TWIN])):
        given[prefix + _TWIN] = steps.double()
    if isinstance(steps, Tensor) and "saliency_seen" in own._buffers:
        given.setdefault(prefix + "saliency_seen", torch.zeros_like(own.saliency_seen))
    saved, average = state.get(prefix + "task_names"), _is_average(state, prefix)
    if isinstance(saved, Tensor) and not _same_names(saved, own._names_as_bytes(), rounded=average):
        raise StateMismatchError(
            f"the state dict was saved for the tasks {_names(saved)}, but this regularizer has {list(own.tasks)}. Build it "
            "with the same tasks in the same order; or load what both have: load_state_dict(state, tasks='common')."
        )
    with_surgery = any(key.startswith(prefix + "surgery.") for key in state)
    if with_surgery and own.surgery is None:
        raise StateMismatchError(
            "the state dict was saved with gradient surgery, but this regularizer has none. Build it with surgery=..., "
            "or leave out the keys that begin with 'surgery.'."
        )
    if own.surgery is not None and not with_surgery and any(key.startswith(prefix) for key in state):
        given.update({f"{prefix}surgery.{key}": value for key, value in own.surgery.state_dict().items()})
    _check_strength(own, given, prefix)
    if average:
        steps = torch.tensor(_steps_of_average(own, float(state[prefix + _TWIN])))
        given.update({prefix + name: steps for name in ("steps", _TWIN, "relations.updates")})
        given[prefix + "task_names"] = own._names_as_bytes()
        if own.automatic_strength is not None:
            given.update(_of_new_strength(prefix))


def _check_strength(own: Penalty, state: dict[str, Any], prefix: str) -> None:
    found = state.get(f"{prefix}automatic_strength.strength")
    if found is not None and own.automatic_strength is None:
        raise StateMismatchError(
            f"the state dict was saved with strength='auto', which found {float(found):g}, but this regularizer has "
            f"strength={own.strength:g}. Build it with strength='auto', or leave out the keys that begin with "
            "'automatic_strength.'."
        )
    if found is None and own.automatic_strength is not None and any(key.startswith(prefix) for key in state):
        state.update(_of_new_strength(prefix))
        warn_user(
            "the state dict was saved with a number as strength (earlier 0.1 by default, with metric='l1'), and this "
            "regularizer has strength='auto', measured from here on. To go on as before, pass that number."
        )


def _of_new_strength(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}automatic_strength.{key}": value for key, value in AutomaticStrength().state_dict().items()}


def check_state_in_use(own: Penalty) -> None:
    """Mend the counts of an averaged state, and refuse buffers that are not the state of these tasks.

    Tools that load models may replace buffers without a word, also by memory as it lies.
    """
    average = _TWIN in own._buffers and own._value(_TWIN) != own._value("steps")
    if average and _rounds_to(own.steps, own.steps_as_float):
        own.steps_as_float = own.steps.to(state_dtype(own.steps.device))
        average = False
    if own._checked_names is not own.task_names:
        if not _same_names(own.task_names, own._names_as_bytes(), rounded=average):
            raise StateMismatchError(
                f"the state of this regularizer is not that of its tasks {list(own.tasks)}: it was replaced by one of other "
                "tasks, or by values that nobody has set, as loading code does for weights that a file lacks. Build the "
                "regularizer after the model was loaded, or load a state that was saved with one."
            )
        own._checked_names = own.task_names
    if average:
        steps = _steps_of_average(own, own._value(_TWIN))
        own._set_steps(steps)
        own.relations.updates.fill_(steps)
        own.task_names.copy_(own._names_as_bytes())
        if own.automatic_strength is not None:
            own.automatic_strength.restart()


def _steps_of_average(own: Penalty, seen: float) -> int:
    """Return the optimizer steps to go on from, which an average does not tell, and say so."""
    end = own._options.start_step + own._options.warmup_steps
    again = "" if own.automatic_strength is None else ", and measures its strength again"
    steps = max(end, math.ceil(seen) if math.isfinite(seen) else 0)
    warn_user(
        f"the state of this regularizer is an average (EMA or SWA of buffers), in which counts mean nothing: it goes on "
        f"in optimizer step {steps}, behind start_step and warmup_steps{again}. To keep the "
        "position, average parameters alone (use_buffers=False), or load regularizer.state_dict() of the model that was "
        "trained."
    )
    return steps


def _is_average(state: Mapping[str, Any], prefix: str) -> bool:
    steps, twin = state.get(prefix + "steps"), state.get(prefix + _TWIN)
    if not isinstance(steps, Tensor) or not isinstance(twin, Tensor) or steps.is_meta or twin.is_meta:
        return False
    return bool((twin.isfinite() & (twin >= 0) & (steps >= 0)).all()) and not _rounds_to(steps, twin)


def _rounds_to(steps: Tensor, twin: object) -> bool:
    """Whether both are one number, of which the other holds fewer digits."""
    return (
        isinstance(twin, Tensor) and not steps.is_meta and bool((twin.to(steps.device) == steps.to(twin.dtype)).all())
    )


def _same_names(found: Tensor, own: Tensor, *, rounded: bool) -> bool:
    """Whether the bytes are the same; those of an average are ``rounded`` down by one now and then."""
    if found.is_meta:
        return True
    if found.shape != own.shape:
        return False
    return bool(((found.cpu().int() - own.cpu().int()).abs() <= int(rounded)).all())


def _names(saved: Tensor) -> list[str]:
    return names_from_bytes(saved) if saved.ndim == 1 else [f"(a tensor {list(saved.shape)})"]
