"""A state that was saved for other tasks, as one of the tasks of now: by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...errors import StateMismatchError
from ...relations import taken
from ...torch_tools import check_choice, names_from_bytes

if TYPE_CHECKING:
    from ..penalty import Penalty

#: ``tasks=`` of ``load_state_dict``.
TasksLoaded = Literal["all", "common"]


@torch.no_grad()
def of_common_tasks(own: Penalty, state: Mapping[str, Any], tasks: TasksLoaded) -> Mapping[str, Any]:
    """Return ``state`` itself, or for ``"common"`` one of the tasks of now; nothing is changed."""
    check_choice("tasks", tasks, ("all", "common"))
    saved = state.get("task_names")
    if tasks == "all":
        return state
    if not isinstance(saved, Tensor) or saved.ndim != 1:
        raise StateMismatchError("the state dict has no task_names, by which tasks='common' takes what it holds.")
    names = names_from_bytes(saved)
    if names == list(own.tasks):
        return state
    order = [names.index(task) if task in names else None for task in own.tasks]
    if not any(task is not None for task in order):
        raise StateMismatchError(
            f"the state dict was saved for the tasks {names}, of which this regularizer has none: {list(own.tasks)}. "
            "Nothing was loaded."
        )
    found = dict(state)
    relations = {name: state.get(f"relations.{name}") for name, buffer in own.relations.named_buffers() if buffer.ndim}
    pairs = len(names) * (len(names) - 1) // 2
    # Of another rule: refused, in its words, where it is loaded.
    if all(isinstance(value, Tensor) for value in relations.values()):
        _check_shapes({f"relations.{name}": value for name, value in relations.items()}, (pairs,), names)
        carried = own.relations.carried(relations, order)  # type: ignore[arg-type]
        found.update({f"relations.{name}": value for name, value in carried.items()})
    for name, axes in {"pending.distances": 2, "pending.samples": 2, "saliency_seen": 1}.items():
        if isinstance(state.get(name), Tensor):
            _check_shapes({name: state[name]}, (len(names),) * axes, names)
            found[name] = taken(state[name], order)
    found["task_names"] = own._names_as_bytes()
    return found


def _check_shapes(values: Mapping[str, Any], shape: tuple[int, ...], names: list[str]) -> None:
    for name, value in values.items():
        if value.shape != shape:
            raise StateMismatchError(
                f"{name!r} in the state dict has shape {list(value.shape)}, expected {list(shape)} for its tasks {names}. "
                "Nothing was loaded."
            )
