"""The forward of a backbone as a line of operations, and where along it one tensor alone is handed on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.fx import Node

from ...errors import BackboneCutError

_BACKBONE = "backbone"


@contextmanager
def in_eval(*modules: nn.Module) -> Iterator[None]:
    """Put modules into eval mode, and each part of them back into its own afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class Trace:
    """Operations of a backbone in their order; modules are whole, but for those ``inside`` which they are looked at.

    A *place* is the number of an operation: a cut there lies right before it.
    """

    def __init__(self, backbone: nn.Module, inside: Collection[str] = ()) -> None:
        self.backbone = backbone
        self.inside = frozenset(inside)
        self._root = _OneInput(backbone)
        self.nodes: list[Node] = list(_graph_of(self._root, backbone, self.inside).nodes)
        number = {node: index for index, node in enumerate(self.nodes)}
        self._last_use = [max((number[user] for user in node.users), default=-1) for node in self.nodes]
        self._weights = [self._weights_of(node) for node in self.nodes]

    def called(self, place: int) -> str | None:
        """Return the name of the module that is called there."""
        node = self.nodes[place]
        return _plain(str(node.target)) if node.op == "call_module" else None

    def places_of_layers(self) -> list[int]:
        """Return where modules with a weight of two axes or more are called: not norms, activations, pooling."""
        return [
            place
            for place, node in enumerate(self.nodes)
            if node.op == "call_module" and count_layers(self._value_of(node)) > 0
        ]

    def after(self, name: str) -> int | None:
        """Return the place behind the last call of a module, or of one within it."""
        calls = [place for place in range(len(self.nodes)) if f"{self.called(place) or ''}.".startswith(f"{name}.")]
        return calls[-1] + 1 if calls else None

    def why_not(self, place: int) -> str | None:
        """Return why the backbone cannot be cut at a place; ``None`` if it can, as far as the trace tells."""
        alive = self._alive(place)
        if len(alive) != 1:
            return f"{len(alive)} tensors are handed on there, as around a residual connection"
        before = set[int]().union(*self._weights[:place])
        behind = set[int]().union(*self._weights[place:])
        if not before or not behind:
            return f"there are no weights {'before' if not before else 'behind'} it"
        if before & behind:
            return "layers before and behind it share weights, which copies would not"
        return None

    def names_of_cuts(self) -> list[str]:
        """Return the modules after which the backbone can be cut, as far as the trace tells."""
        names = [(self.called(place - 1), place) for place in range(1, len(self.nodes))]
        return list(dict.fromkeys(name for name, place in names if name and self.why_not(place) is None))

    def part(self, start: int, stop: int) -> nn.Module:
        """Return the operations from one place to another as a module, which has the modules of the backbone in it."""
        graph = torch.fx.Graph()
        values = {node: graph.placeholder("feature") for node in self._alive(start)}
        held: dict[str, Any] = {}
        for node in self.nodes[start:stop]:
            if node.op == "output":
                graph.output(torch.fx.map_arg(node.args[0], values.__getitem__))
                continue
            values[node] = copied = graph.node_copy(node, values.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copied.target = _plain(str(node.target))
                held[copied.target] = self._value_of(node)
        if stop < len(self.nodes):
            graph.output(values[self._alive(stop)[0]])
        # Once more from the module, as copies and pickles are made: so their parameters have the same order.
        return torch.fx.GraphModule(torch.fx.GraphModule(held, graph), graph, class_name="Stage")

    def _alive(self, place: int) -> list[Node]:
        return [node for node, last in zip(self.nodes[:place], self._last_use) if last >= place]

    def _value_of(self, node: Node) -> Any:
        value: Any = self._root
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return value

    def _weights_of(self, node: Node) -> set[int]:
        """Return what must not be on both sides of a cut: parameters."""
        if node.op not in ("call_module", "get_attr"):
            return set()
        value = self._value_of(node)
        if isinstance(value, nn.Module):
            return {id(parameter) for parameter in value.parameters()}
        return {id(value)} if isinstance(value, nn.Parameter) else set()


def count_layers(module: nn.Module) -> int:
    """Count the parts of a module that have a weight of two axes or more of their own."""
    return sum(any(weight.ndim > 1 for weight in part.parameters(recurse=False)) for part in module.modules())


class _OneInput(nn.Module):
    """Calls a backbone with one input, whatever else its forward may take."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Any:
        return self.backbone(x)


class _Tracer(torch.fx.Tracer):
    def __init__(self, inside: Collection[str]) -> None:
        super().__init__()
        self._inside = {_BACKBONE, *(f"{_BACKBONE}.{name}" for name in inside)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002  # as torch calls it
        return module_qualified_name not in self._inside


def _graph_of(root: nn.Module, backbone: nn.Module, inside: Collection[str]) -> torch.fx.Graph:
    for name in ("", *inside):
        _check_looked_into(backbone.get_submodule(name), name or type(backbone).__name__)
    graphs = []
    with in_eval(backbone):
        # Tensors that the forward makes of nothing are noted on the root, so each trace has its own.
        for training, each in ((False, root), (True, _OneInput(backbone))):
            for part in backbone.modules():
                part.training = training
            try:
                graphs.append(_Tracer(inside).trace(each))
            except Exception as error:  # whatever the code of a model raises when it is given no tensors
                parts = ", ".join(name for name, _ in backbone.named_children()) or "none"
                raise BackboneCutError(
                    f"{type(backbone).__name__} cannot be cut: the order of its operations depends on more than its "
                    f"modules ({type(error).__name__}: {_first_line(error)}). Pass an nn.Sequential of its parts, in the "
                    f"order in which its forward runs them; they are {parts}."
                ) from error
    if str(graphs[0]) != str(graphs[1]):
        raise BackboneCutError(
            f"{type(backbone).__name__} cannot be cut: between its modules, it does other things in train mode than in eval "
            "mode, as with a functional dropout. Build it without (drop_rate=0), and put nn.Dropout into the heads."
        )
    return graphs[0]


def _check_looked_into(module: nn.Module, name: str) -> None:
    if getattr(module, "grad_checkpointing", False):
        raise BackboneCutError(
            f"{name} recomputes its forward in the backward pass (grad_checkpointing), which would be lost between the "
            "stages. Switch it off: set_grad_checkpointing(False)."
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise BackboneCutError(
            f"there are hooks on {name}, which would not be called, as its stages take its place. Remove them, and attach "
            "what has put them there to the model that branches."
        )


def _plain(target: str) -> str:
    return target.removeprefix(f"{_BACKBONE}.")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]
