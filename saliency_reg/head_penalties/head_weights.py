"""Which weights of the model are those of its heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..capture import Heads
from ..errors import ConfigurationError, HeadNotFoundError, ShapeError, TaskError
from ..tasks import first_few
from ..torch_tools import at_least_float32, derives_from

_Conv = nn.modules.conv._ConvNd
_Transposed = nn.modules.conv._ConvTransposeNd
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Weight:
    """A weight of the model, which is looked up in each step: loading and wrapping replace parameters."""

    name: str  # in the model
    module: nn.Module
    attribute: str
    shape: torch.Size
    rows: tuple[tuple[int, ...], ...] | None = None  # of each task, in the one layer that all of them share

    def parameter(self) -> nn.Parameter:
        found = self.module._parameters.get(self.attribute)
        if found is None or derives_from(found, "DTensor") or found.shape != self.shape:
            what = "no parameter" if found is None else f"a {type(found).__name__} of shape {list(found.shape)}"
            raise ConfigurationError(
                f"{self.name!r} is {what}, expected a parameter of shape {list(self.shape)}. Weights that FSDP or tensor "
                "parallelism have sharded, and those of a parametrisation, cannot be penalised: keep the heads whole "
                "(fully_shard the backbone alone), and take parametrisations off."
            )
        return found

    @property
    def input_axis(self) -> int:
        return 0 if isinstance(self.module, _Transposed) else 1

    def inputs_first(self) -> Tensor:
        """Return the weights of all tasks as ``[D, n]``, in float32 at least."""
        own = self.parameter()
        weight = own.to(at_least_float32(own.dtype))
        if (rows := self._all_rows()) is not None:
            weight = weight[rows]
        return weight.movedim(self.input_axis, 0).flatten(1)

    def write(self, inputs_first: Tensor) -> None:
        """Write what :meth:`inputs_first` has read."""
        own, rows = self.parameter(), self._all_rows()
        shape = list(self.shape)
        if rows is not None:
            shape[0] = len(rows)
        width = shape.pop(self.input_axis)
        value = inputs_first.reshape(width, *shape).movedim(0, self.input_axis)
        if rows is None:
            own.copy_(value)
        else:
            own[rows] = value.to(own.dtype)

    def _all_rows(self) -> list[int] | None:
        """The rows of any task; ``None`` for all of them."""
        if self.rows is None:
            return None
        rows = [row for of_task in self.rows for row in of_task]
        return None if len(rows) == self.shape[0] else rows


class HeadWeights:
    """The weights of all heads: of their first layers, and of deeper ones where those are alike in all heads."""

    def __init__(self, model: nn.Module, heads: Heads, *, deep: bool) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        self.tasks = heads.tasks
        self.joint = heads.columns
        _refuse_lazy(names, heads)
        if heads.columns:
            layers = [_joint_layer(names, heads)]
        else:
            layers = [_first_layer(name, head) for name, head in zip(heads.names, heads.modules)]
        _refuse_fsdp1(model, layers)
        rows = _rows(heads, layers[0]) if heads.columns else None
        self.first = [_weight(names, layer, "weight", rows) for layer in layers]
        #: For each place in the heads, the weight of every task (or the one of all).
        self.places = [self.first]
        if deep and not heads.columns:
            self.places += _alike([_later_weights(names, head, own) for head, own in zip(heads.modules, self.first)])
        every = [id(weight.parameter()) for place in self.places for weight in place]
        if len(set(every)) < len(every):
            raise TaskError(
                f"the heads {first_few(heads.names)} share a weight, which would be penalised more than once. Name "
                "the parts of them that are each task's own."
            )

    def all(self) -> list[Weight]:
        return [weight for place in self.places for weight in place]

    def names(self) -> list[str]:
        return [weight.name for weight in self.all()]

    def check_groups(self) -> None:
        """Check that the first layers read the same inputs, which L21 makes groups of."""
        for weight in self.first:
            if isinstance(weight.module, _Conv) and weight.module.groups > 1:
                raise ConfigurationError(
                    f"{weight.name!r} is a convolution with groups={weight.module.groups}, whose outputs read different "
                    "input channels, so that there is no group of all tasks for each. Use kind='lasso'."
                )
        widths = {weight.name: weight.shape[weight.input_axis] for weight in self.first}
        if len(set(widths.values())) > 1:
            raise ShapeError(
                f"the first layers of the heads have different numbers of inputs, {_listed(widths)}, but a group of L21 is "
                "an input of all heads. Let the heads read one feature map, or use kind='lasso'."
            )

    def check_alike(self, kind: str) -> None:
        """Check that every task has as many weights in the first layer, in the same places."""
        first = self.first[0]
        if first.rows is not None:
            shapes: dict[str, object] = {f"the rows of {task!r}": len(own) for task, own in zip(self.tasks, first.rows)}
        else:
            shapes = {weight.name: list(weight.shape) for weight in self.first}
        if any(shape != next(iter(shapes.values())) for shape in shapes.values()):
            raise ShapeError(
                f"kind={kind!r} compares the first layers of the heads, which have different shapes: {_listed(shapes)}. "
                "Give all heads one width, leave the others out of heads=, or use kind='lasso' or 'l21'."
            )

    def stacked(self) -> list[Tensor]:
        """Return ``[T, M]`` for each place in the heads, in float32 at least."""
        found = []
        for place in self.places:
            own = [weight.parameter() for weight in place]
            if (rows := place[0].rows) is not None:
                stack = own[0].flatten(1)[torch.tensor(rows, device=own[0].device)].flatten(1)
            else:
                stack = torch.stack([weight.flatten().to(own[0].device) for weight in own])
            found.append(stack.to(at_least_float32(stack.dtype)))
        return found


def _matrices(module: nn.Module) -> list[str]:
    """Names of the module's own weights: not biases, not those of normalisations."""
    if isinstance(module, _NORMS):
        return []
    own = module._parameters.items()
    return [name for name, one in own if one is not None and one.ndim > 1 and not name.startswith("bias")]


def _first_layer(name: str, head: nn.Module) -> nn.Module:
    for module in head.modules():
        if isinstance(module, (nn.Linear, _Conv)):
            return module
        if _matrices(module):
            raise ConfigurationError(
                f"head {name!r} begins with a {type(module).__name__}, expected a Linear or convolution whose weight is "
                "penalised. Pass in heads= the part of it that begins with one."
            )
    raise HeadNotFoundError(
        f"head {name!r} has no Linear or convolution whose weight could be penalised. Pass heads= that have one."
    )


def _joint_layer(names: dict[int, str], heads: Heads) -> nn.Module:
    """Return the only layer of the one head of all tasks."""
    own = [module for module in heads.modules[0].modules() if _matrices(module)]
    layer = _first_layer(heads.names[0], heads.modules[0])
    if len(own) > 1 or isinstance(layer, _Transposed):
        found = first_few([f"{names[id(module)]!r} ({type(module).__name__})" for module in own])
        raise ConfigurationError(
            f"{heads.names[0]!r} is one head of all tasks and has the layers {found}; expected one Linear or convolution, "
            "whose rows are those of the tasks. Pass the name of that one in heads=."
        )
    return layer


def _rows(heads: Heads, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
    weight = layer._parameters.get("weight")
    width = 0 if weight is None else len(weight)
    if heads.groups is not None:
        return tuple(tuple(own) for own in heads.groups.of(width))
    if width not in (0, len(heads.tasks)):
        raise TaskError(
            f"{heads.names[0]!r} has {width} outputs for {len(heads.tasks)} tasks. Say which are those of each: "
            f"columns={{{heads.tasks[0]!r}: slice(0, {max(width // len(heads.tasks), 1)}), ...}}."
        )
    return tuple((row,) for row in range(width))


def _later_weights(names: dict[int, str], head: nn.Module, first: Weight) -> list[Weight]:
    found = {id(module): module for module in head.modules()}.values()
    every = [_weight(names, module, name) for module in found for name in _matrices(module)]
    return [weight for weight in every if (weight.module, weight.attribute) != (first.module, first.attribute)]


def _alike(by_head: Sequence[Sequence[Weight]]) -> list[list[Weight]]:
    """Return the places up to the first one that is not the same in all heads."""
    found = []
    for place in zip(*by_head):
        if len({(weight.attribute, weight.shape) for weight in place}) > 1:
            break
        found.append(list(place))
    return found


def _weight(
    names: dict[int, str], module: nn.Module, attribute: str, rows: tuple[tuple[int, ...], ...] | None = None
) -> Weight:
    name = f"{names.get(id(module), type(module).__name__)}.{attribute}"
    own = module._parameters.get(attribute)
    weight = Weight(name, module, attribute, torch.Size() if own is None else own.shape, rows)
    weight.parameter()
    return weight


def _refuse_lazy(names: dict[int, str], heads: Heads) -> None:
    lazy = (
        part for head in heads.modules for part in head.modules() if isinstance(part, nn.modules.lazy.LazyModuleMixin)
    )
    if (found := next(lazy, None)) is not None:
        raise ConfigurationError(
            f"{names.get(id(found))!r} is a {type(found).__name__}, whose weight has no shape before a forward. Run the "
            "model once on a batch, then build the penalty."
        )


def _refuse_fsdp1(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    sharded = [module for module in model.modules() if derives_from(module, "FullyShardedDataParallel")]
    if any(part in layers for module in sharded for part in module.modules()):
        raise ConfigurationError(
            "the heads are in a FullyShardedDataParallel, of whose weights each process has a part only. Keep the heads "
            "whole: wrap the backbone alone, or use DistributedDataParallel."
        )


def _listed(values: Mapping[str, object]) -> str:
    return first_few([f"{name} {value}" for name, value in values.items()])
