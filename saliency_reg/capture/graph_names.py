"""Modules by their names, found in the graph of a forward and by what they return in the first: once, or for an error."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ..torch_tools import ModuleHooks, in_backward, leaves_behind_each, nodes_between, warn_user
from .heads import Heads, is_compiled, is_container
from .lookup import listed
from .nested import first_tensor, tensors_in, unfolded

NAME_IT = "Name the module whose output they share, e.g. feature='backbone'"
#: Forwards that are traced if none of them is read.
_MOST_TRACED = 8
#: A place in the graph: a node, and the number of its output.
_Output = tuple[Node, int]

_VIEW_OF_A_WEIGHT = re.compile("(T|Transpose|Permute|View|Unsqueeze|Expand|ToCopy|_ToCopy)Backward0")


class Trace:
    """What modules returned in one forward, and where that is in its graph."""

    def __init__(self) -> None:
        self.ran: list[str] = []  # in the order in which they returned
        self.returned: dict[str, dict[str, _Output]] = {}  # of those that ran: addresses for ``feature=``
        self.with_input: set[str] = set()  # those that were called with a tensor that can be a feature map

    def note(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.ran.append(name)
        if first_tensor(args, {})[1] is not None:
            self.with_input.add(name)
        self.returned[name] = {}
        for (_, *path), tensor in tensors_in((unfolded(output),), {}):
            if tensor.grad_fn is not None and not any("." in str(item) for item in path):
                address = f"{name}:output.{'.'.join(map(str, path))}" if path else name
                self.returned[name].setdefault(address, (tensor.grad_fn, tensor.output_nr))

    def addresses(self, name: str) -> dict[str, _Output]:
        """Return the addresses of what a module returned; none where it ran more than once, or not at all."""
        return self.returned[name] if self.ran.count(name) == 1 else {}

    def inside(self, name: str) -> list[str]:
        """Return the outermost modules inside of one that ran, in their order."""
        inside = [one for one in self.ran if one.startswith(name + ".")]
        return list(dict.fromkeys(one for one in inside if not any(one.startswith(outer + ".") for outer in inside)))


class Tracing:
    """Hooks for the first forwards of a model, until one was read, which make a :class:`Trace` of each."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._left = _MOST_TRACED
        self._hooks = ModuleHooks(self, tells=False)
        self._trace: Trace | None = None

    def begin(self, model: nn.Module) -> Trace | None:
        if not self.wanted or torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled():
            return None
        self._left -= 1
        self.wanted = self._left > 0  # nobody may read any
        self._hooks.remove()
        self._trace = Trace()
        # Hooks within compiled code would be compiled, too, and again without them.
        closed = {id(m) for part in model.modules() if _is_closed(part) for m in part.modules()}
        for name, module in model.named_modules():
            if name and id(module) not in closed and not is_container(module):
                self._hooks.after(module, self._note, name)
        return self._trace

    def end(self) -> None:
        self._hooks.remove()
        self._trace = None

    def _note(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._trace is not None and not in_backward():
            self._trace.note(name, module, args, output)


def _is_closed(module: nn.Module) -> bool:
    compiled = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable") or is_compiled(module)
    return compiled or isinstance(module, torch.jit.ScriptModule)


class Names:
    """What tensors of a forward can be called: by the parameters behind them, and its trace if there is one."""

    def __init__(self, model: nn.Module | None, trace: Trace | None) -> None:
        self._model = model
        self._trace = trace

    def inside(self, head: str) -> list[str]:
        """Return the modules inside of a head that ran."""
        return [] if self._trace is None else self._trace.inside(head)

    def of(self, tensors: Sequence[Tensor]) -> list[str]:
        """Return addresses of these tensors; nothing unless there is one for each."""
        if self._trace is None:
            return []
        known: dict[tuple[Node | None, int], str] = {}
        for name in sorted(
            self._trace.returned, key=lambda name: name.count(".")
        ):  # that of the outermost module counts
            for address, place in self._trace.addresses(name).items():
                known.setdefault(place, address)
        places = [(tensor.grad_fn, tensor.output_nr) for tensor in tensors]
        return list(dict.fromkeys(known[one] for one in places)) if all(one in known for one in places) else []

    def instead_of_a_tensor(
        self, head: str, given: Mapping[str, Mapping[Any, Tensor]], outputs: Mapping[str, Any]
    ) -> str:
        """Say what to name where a head is called with a list or mapping; ``given`` are the tensors in it, and of others."""
        common = {
            path: one
            for path, one in given[head].items()
            if all(any(one is its for its in own.values()) for own in given.values())
        }
        names = self.of(list(common.values())) or [
            f"{head}:input.{'.'.join(map(str, path))}" for path in common if not any("." in str(item) for item in path)
        ]
        if names:
            advice = (
                f"Pass the feature map: feature={names[0]!r}" if len(names) == 1 else f"Pass the maps: feature={names}"
            )
        else:
            advice = self.shared_by([one for own in given.values() for one in own.values()]) or NAME_IT
        other = next((name for name, one in outputs.items() if isinstance(one, Tensor) and one.ndim == 3), None)
        if names and other is not None and all(one.ndim != 3 for one in common.values()):
            advice += (
                f", and for the output {list(outputs[other].shape)} of {other!r}, which is no map like these, "
                "scalarize=lambda output: output.amax(-1) - output.mean(-1) (classes on its last axis) or output.sum(1) "
                "(one value per position)"
            )
        return (
            f"head {head!r} was called without a floating-point tensor. {advice}; or choose the module that reads it, or "
            "pass regularizer(outputs=..., features=...)."
        )

    def shared_by(self, tensors: Sequence[Tensor]) -> str:
        """Say which modules all ``tensors`` depend on, nearest first, and which to pass; nothing where none is known."""
        if self._model is None:
            return ""
        depth: dict[Node, int] = defaultdict(int)
        reach: dict[_Output, int] = defaultdict(int)
        masks: dict[Node, int] = defaultdict(int)
        starts: list[_Output] = [(one.grad_fn, one.output_nr) for one in tensors if one.grad_fn is not None]
        for number, start in enumerate(starts):
            reach[start] |= 1 << number
            masks[start[0]] |= 1 << number

        def visit(node: Node) -> None:  # in the order in which gradients come: the longest way counts
            for following, number in node.next_functions:
                if following is not None:
                    depth[following] = max(depth[following], depth[node] + 1)
                    masks[following] |= masks[node]
                    reach[following, number] |= masks[node]

        leaves = leaves_behind_each(dict(enumerate(tensors)), visit)
        every = (1 << len(tensors)) - 1
        distance = {id(getattr(node, "variable", None)): steps for node, steps in depth.items()}
        shared = {id(leaf): distance.get(id(leaf), 0) for leaf, mask in leaves.items() if mask == every}
        found: dict[str, int] = {}  # addresses
        places: dict[_Output, str] = {}
        parent: dict[str, str] = {}  # the container of each, whose members count as one
        names: list[str] = []
        for name, module in self._model.named_modules():
            ids = [id(parameter) for parameter in module.parameters() if parameter.requires_grad]
            whole = ids and shared.keys() >= set(ids) and not is_container(module)
            if not name or not whole or any(name.startswith(outer + ".") for outer in names):
                continue
            addresses = {name: min(shared[one] for one in ids)}
            container = name.rpartition(".")[0]
            if not container or not is_container(self._model.get_submodule(container)):
                container = name
            if self._trace is not None:
                returned = self._trace.addresses(name)
                addresses = {one: depth[place[0]] for one, place in returned.items() if reach[place] == every}
                places.update({place: one for one, place in returned.items() if one in addresses})
            if addresses:
                names.append(name)
                found.update(addresses)
                parent.update(dict.fromkeys(addresses, container))
        if not found:
            return ""
        order = sorted(found, key=lambda one: found[one])
        behind = {one: _reached([place], places) for place, one in places.items()}
        groups: list[list[str]] = []
        for one in order:
            for group in groups:
                if all(parent[one] == parent[other] and one not in behind.get(other, ()) for other in group):
                    group.append(one)
                    break
            else:
                groups.append([one])
        nearest = groups[:4]
        words = ", ".join(
            repr(group[0]) if len(group) == 1 else f"{min(group)!r} to {max(group)!r}" for group in nearest
        )
        chosen = next((group for group in nearest if len(group) == 1), sorted(nearest[0]))
        advice = f"pass feature={chosen[0]!r}" if len(chosen) == 1 else f"pass feature={chosen}"
        around = _reached(starts, places, stop=chosen)
        if any(not behind[one] & set(chosen) for one in around - set(chosen)):
            read = _reached(starts, places, stop=order)
            if len(read) <= 6:
                advice += f", or feature={[one for one in order if one in read]} for all of them that the heads read"
        of_input = chosen[0].partition(":")[0]
        if self._trace is not None and of_input in self._trace.with_input:
            advice += f", or '{of_input}:input' for what that module reads"
        return f"All depend on the outputs of {words} (the nearest first): {advice}"


def _reached(starts: Sequence[_Output], places: Mapping[_Output, str], stop: Sequence[str] = ()) -> set[str]:
    """Return whose places are at or behind ``starts``; not by way of those of ``stop``."""
    found: set[str] = set()
    seen: set[_Output] = set()
    waiting = list(starts)
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        if (one := places.get(at)) is not None:
            found.add(one)
        if one is None or one not in stop:
            waiting += [(node, number) for node, number in at[0].next_functions if node is not None]
    return found


def tell_of_readers(model: nn.Module | None, heads: Heads, outputs: Mapping[int, Tensor], returned: object) -> None:
    """Warn if other modules of the model go on to read the outputs of heads, for what it returned."""
    if model is None:
        return
    own = {id(part) for head in heads.modules for part in head.modules()}
    found = {
        name: index
        for name, index in _readers_of(model, outputs, [tensor for _, tensor in tensors_in((returned,), {})]).items()
        if id(model.get_submodule(name)) not in own
    }
    if not found:
        return
    name, index = next(iter(found.items()))
    first = heads.names[index].partition(" to ")[0]
    warn_user(
        f"{listed(map(repr, found), 4)} read the outputs of heads, {name!r} that of {heads.names[index]!r}: these are then "
        "hidden layers, and their saliency is not that of what the model returns. If the branches of the tasks go on, pass "
        f"a list for each, from where it begins to its output: heads={{{heads.tasks[index]!r}: [{first!r}, {name!r}], "
        f"...}}; if others are the heads, pass their names. If {heads.names[index]!r} is a task's output, all is well."
    )


def _readers_of(model: nn.Module, outputs: Mapping[int, Tensor], returned: Iterable[Tensor]) -> dict[str, int]:
    """Return the modules with weights between the outputs of heads and what the model returned: ``{name: head}``."""
    ends = {output.grad_fn: head for head, output in outputs.items() if output.grad_fn is not None}
    before: dict[Node, list[Node]] = defaultdict(list)
    for node in nodes_between(list(returned), [output for output in outputs.values() if output.grad_fn is not None]):
        for following, _ in node.next_functions:
            if following is not None:
                before[following].append(node)
    reached, waiting = dict(ends), list(ends)
    while waiting:
        node = waiting.pop()
        for reader in before[node]:
            if reader not in reached:
                reached[reader] = reached[node]
                waiting.append(reader)
    owner = {id(weight): name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.ndim > 1}
    found: dict[str, int] = {}
    for node, head in reached.items():
        for side, _ in () if node in ends else node.next_functions:
            while side is not None and _VIEW_OF_A_WEIGHT.fullmatch(side.name()):
                side = side.next_functions[0][0]
            name = None if side is None else owner.get(id(getattr(side, "variable", None)))
            if name:
                found[name] = head
    return found
