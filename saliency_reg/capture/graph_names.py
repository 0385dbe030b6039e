"""Modules by their names, found in the graph of a forward: once, or for an error."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.autograd.graph import Node

from ..torch_tools import leaves_behind_each, nodes_between, warn_user
from .heads import Heads, is_container
from .lookup import listed
from .nested import tensors_in

_VIEW_OF_A_WEIGHT = re.compile("(T|Transpose|Permute|View|Unsqueeze|Expand|ToCopy|_ToCopy)Backward0")


def shared_by(model: nn.Module | None, tensors: Sequence[Tensor]) -> str:
    """Say which modules all ``tensors`` depend on, nearest first, and which of them to pass; nothing where none is known."""
    if model is None:
        return ""
    depth: dict[Node, int] = defaultdict(int)

    def visit(node: Node) -> None:  # in the order in which gradients come: the longest way counts
        for following, _ in node.next_functions:
            if following is not None:
                depth[following] = max(depth[following], depth[node] + 1)

    leaves = leaves_behind_each(dict(enumerate(tensors)), visit)
    distance = {id(getattr(node, "variable", None)): steps for node, steps in depth.items()}
    every = (1 << len(tensors)) - 1
    shared = {id(leaf): distance.get(id(leaf), 0) for leaf, mask in leaves.items() if mask == every}
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        ids = [id(parameter) for parameter in module.parameters() if parameter.requires_grad]
        whole = ids and shared.keys() >= set(ids) and not is_container(module)
        if name and whole and not any(name.startswith(outer + ".") for outer in found):
            found[name] = min(shared[one] for one in ids)
    groups: dict[str, list[str]] = {}  # the members of a container count as one
    for name in sorted(found, key=lambda name: found[name]):
        parent = name.rpartition(".")[0]
        in_container = bool(parent) and is_container(model.get_submodule(parent))
        groups.setdefault(parent + "." if in_container else name, []).append(name)
    if not groups:
        return ""
    nearest = list(groups.values())[:4]
    words = ", ".join(repr(names[0]) if len(names) == 1 else f"{min(names)!r} to {max(names)!r}" for names in nearest)
    advice = next((repr(names[0]) for names in nearest if len(names) == 1), repr(sorted(nearest[0])))
    return f"All depend on the outputs of {words} (the nearest first): pass feature={advice}"


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
