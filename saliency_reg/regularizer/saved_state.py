"""Whether a state dict belongs to a regularizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import StateMismatchError
from ..surgery.feature import GradientCombiner
from ..torch_tools import names_from_bytes


def check_state(
    state: Mapping[str, Any], prefix: str, tasks: Sequence[str], task_names: Tensor, surgery: GradientCombiner | None
) -> None:
    """Check the tasks and the surgery; put surgery that is new in a resumed run into ``state`` as it is."""
    saved = state.get(prefix + "task_names")
    if saved is not None and not torch.equal(saved.cpu(), task_names.cpu()):
        raise StateMismatchError(
            f"the state dict was saved for the tasks {names_from_bytes(saved)}, but this regularizer has {list(tasks)}. "
            "Build it with the same tasks in the same order."
        )
    with_surgery = any(key.startswith(prefix + "surgery.") for key in state)
    if with_surgery and surgery is None:
        raise StateMismatchError(
            "the state dict was saved with gradient surgery, but this regularizer has none. Build it with surgery=..., "
            "or leave out the keys that begin with 'surgery.'."
        )
    if surgery is not None and not with_surgery:
        own = {f"{prefix}surgery.{key}": value for key, value in surgery.state_dict().items()}
        cast("dict[str, Any]", state).update(own)
