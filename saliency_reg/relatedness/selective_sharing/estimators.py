"""The estimators of a model: what each head has in front of its output layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Union

from torch import nn

from ...capture import HeadsChoice, find_module, resolve_heads
from ...distributed import is_sharded
from ...errors import ConfigurationError, HeadNotFoundError, ShapeError, TaskError, WrongTypeError
from ...tasks import check_task_names, first_few, per_task
from ...torch_tools import derives_from

#: What the public ``estimators=`` accepts: a name within each head, or a module of the model for each task.
EstimatorsChoice = Union[str, Mapping[str, Union[str, nn.Module]], None]


@dataclass(frozen=True, eq=False)
class Estimator:
    """The estimator of one task, or of several that share it: modules that are called one after another."""

    name: str  # of it in the model, for people
    parts: tuple[nn.Module, ...]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for number, part in enumerate(self.parts):
            for name, parameter in part.named_parameters():
                yield f"{number}.{name}", parameter

    def tensors(self) -> Iterator[tuple[str, object]]:
        """All that is copied to make another one equal: parameters and buffers."""
        yield from self.named_parameters()
        for number, part in enumerate(self.parts):
            for name, buffer in part.named_buffers():
                yield f"{number}.{name}", buffer

    @property
    def weight(self) -> nn.Parameter:
        """The weight of its first layer, whose gradients tell of relations."""
        return next(parameter for _, parameter in self.named_parameters() if parameter.ndim > 1)


def find_estimators(
    model: nn.Module, heads: HeadsChoice, tasks: Sequence[str] | None, estimators: EstimatorsChoice
) -> dict[str, Estimator]:
    """Return ``{task: estimator}`` in the order of the tasks, all built alike.

    Raises:
        WrongTypeError, ConfigurationError, HeadNotFoundError, TaskError, ShapeError: as :class:`SelectiveSharing` says.
    """
    _check_model(model)
    names = {id(module): name for name, module in model.named_modules()}
    if isinstance(estimators, Mapping):
        chosen = _given(model, heads, tasks, estimators)
    elif estimators is None or isinstance(estimators, str):
        found = resolve_heads(model, heads, tasks)
        if found.columns:
            raise ConfigurationError(
                f"{found.names[0]!r} is one head of all tasks, which has no estimators of single tasks. Give each task a "
                "head of its own, such as nn.Sequential(nn.Linear(D, E), nn.ReLU(), nn.Linear(E, outputs))."
            )
        parts_of = _first_parts if estimators is None else partial(_named_part, estimators)
        chosen = {task: parts_of(name, head) for task, name, head in zip(found.tasks, found.names, found.modules)}
    else:
        raise WrongTypeError(
            "estimators must be a name inside of each head, or a mapping {task: name or module}; found "
            f"{type(estimators).__name__}."
        )
    by_parts: dict[tuple[int, ...], Estimator] = {}
    for parts in chosen.values():
        own_names = [names.get(id(part), type(part).__name__) for part in parts]
        name = own_names[0] if len(parts) == 1 else f"{own_names[0]} to {own_names[-1]}"
        by_parts.setdefault(tuple(map(id, parts)), Estimator(name, parts))
    result = {task: by_parts[tuple(map(id, parts))] for task, parts in chosen.items()}
    _check_alike(list(by_parts.values()))
    return result


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise WrongTypeError(f"model must be a torch.nn.Module, found {type(model).__name__}.")
    for module in model.modules():
        if derives_from(module, "DistributedDataParallel"):
            raise ConfigurationError(
                "the model is wrapped in DistributedDataParallel, which waits for the gradients of all parameters that it "
                "was built with, also of those that sharing discards. Pass the model inside, model.module, and wrap it anew "
                "whenever share() has changed it."
            )
        if derives_from(module, "FullyShardedDataParallel") or is_sharded(module):
            raise ConfigurationError(
                "the model is sharded (FSDP), so that each process has a part of every estimator only. Use "
                "DistributedDataParallel, and pass the model inside."
            )


def _given(
    model: nn.Module,
    heads: HeadsChoice,
    tasks: Sequence[str] | None,
    estimators: Mapping[str, str | nn.Module],
) -> dict[str, tuple[nn.Module, ...]]:
    if heads is not None:
        raise ConfigurationError("estimators= names a module for each task, so that heads= has no use. Leave it out.")
    names = check_task_names(list(estimators) if tasks is None else tasks)
    given = per_task(estimators, names, "estimators=")
    if missing := [task for index, task in enumerate(names) if index not in given]:
        raise TaskError(f"estimators= lacks {missing} of the tasks {names}. Name the estimator of each task.")
    found: dict[str, tuple[nn.Module, ...]] = {}
    for index, task in enumerate(names):
        name, module = _find(model, given[index])
        if all(module is not part for part in model.modules()):
            raise HeadNotFoundError(
                f"the estimator of {task!r}, a {type(module).__name__}, is not in the model. Pass its name, or the module."
            )
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or module is model:
            raise HeadNotFoundError(
                f"the estimator {name!r} of {task!r} is a {type(module).__name__} around several. Name one in it."
            )
        found[task] = (module,)
    return found


def _find(model: nn.Module, wanted: str | nn.Module) -> tuple[str, nn.Module]:
    """Find a module also by names that are not those of ``named_modules()``: it has only one for what is shared already."""
    if isinstance(wanted, str):
        with suppress(AttributeError):
            return wanted, model.get_submodule(wanted)
    return find_module(model, wanted, "estimator")


def _named_part(inside: str, name: str, head: nn.Module) -> tuple[nn.Module, ...]:
    """Return the estimator that has this name within each head."""
    try:
        return (head.get_submodule(inside),)
    except AttributeError:
        children = [child for child, _ in head.named_children()]
        raise HeadNotFoundError(
            f"head {name!r} has no {inside!r}, which estimators= names; it has {children}. Pass a mapping {{task: name}} "
            "where heads are built differently."
        ) from None


def _first_parts(name: str, head: nn.Module) -> tuple[nn.Module, ...]:
    """Return what a head of modules in a row has in front of its output layer: the last one with parameters."""
    # A Branch is a ModuleList; a class derived from Sequential may do anything in a forward of its own.
    in_a_row = isinstance(head, nn.ModuleList) or type(head).forward is nn.Sequential.forward
    if not in_a_row:
        if next(head.children(), None) is None:
            raise ConfigurationError(_without_estimator(name, head))
        raise ConfigurationError(
            f"head {name!r} is a {type(head).__name__}, in which nobody sees where the estimator ends and the output layer "
            f"begins. Say which part it is: estimators={next(head.named_children())[0]!r}, a name inside of each head."
        )
    parts = list(head.children())
    trained = [number for number, part in enumerate(parts) if next(part.parameters(), None) is not None]
    if len(trained) < 2:
        raise ConfigurationError(_without_estimator(name, head))
    return tuple(parts[: trained[-1]])


def _without_estimator(name: str, head: nn.Module) -> str:
    return (
        f"head {name!r} is a {type(head).__name__} without an estimator in front of its output layer, so that there is "
        "nothing to share. Build each head as nn.Sequential(nn.Linear(D, E), nn.ReLU(), nn.Linear(E, outputs))."
    )


def _check_alike(estimators: Sequence[Estimator]) -> None:
    first = estimators[0]
    seen: dict[int, str] = {}
    for one in estimators:
        parameters = dict(one.named_parameters())
        if any(isinstance(each, nn.parameter.UninitializedParameter) for each in parameters.values()):
            raise ConfigurationError(
                f"the estimator {one.name!r} has no shape before a forward. Run the model once on a batch first."
            )
        if all(each.ndim < 2 for each in parameters.values()):
            raise ConfigurationError(
                f"the estimator {one.name!r} has no weight matrix whose gradients could be compared."
            )
        if shared := [name for name, each in parameters.items() if seen.setdefault(id(each), one.name) != one.name]:
            raise TaskError(
                f"the estimators {seen[id(parameters[shared[0]])]!r} and {one.name!r} share a weight, but are not the same "
                "module. Name estimators that have nothing in common."
            )
        if not one.weight.requires_grad:
            raise ConfigurationError(
                f"the weight of the estimator {one.name!r} is frozen, so that it has no gradients. Unfreeze it first."
            )
        own, expected = _shapes(one), _shapes(first)
        if different := [name for name in {**expected, **own} if own.get(name) != expected.get(name)]:
            found = first_few([f"{name} {own.get(name)} beside {expected.get(name)}" for name in different], 3)
            raise ShapeError(
                f"the estimator {one.name!r} is not built like {first.name!r}: {found}. Tasks can only share estimators of "
                "one shape: build them alike, or leave the task out."
            )
        if (kinds := _kinds(one)) != _kinds(first):
            raise ShapeError(
                f"the estimator {one.name!r} consists of {kinds}, but {first.name!r} of {_kinds(first)}. Build them alike."
            )


def _shapes(estimator: Estimator) -> dict[str, list[int]]:
    return {name: list(getattr(tensor, "shape", ())) for name, tensor in estimator.tensors()}


def _kinds(estimator: Estimator) -> list[str]:
    return [type(module).__name__ for part in estimator.parts for module in part.modules()]
