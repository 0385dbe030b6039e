"""Heads that are chains of modules: named so by the user, or going on in modules that were not named."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

from torch import Tensor, nn

from .head_search import is_container, widths

#: Nodes between a head's output and a module that reads it: an activation, a dropout, a change of shape.
_NEAR = 24


class Branch(nn.ModuleList):
    """Modules of a model that are one head together: it begins with the first, and its output is that of the last."""


def first_part(head: nn.Module) -> nn.Module:
    return head[0] if isinstance(head, Branch) else head


def last_part(head: nn.Module) -> nn.Module:
    return head[-1] if isinstance(head, Branch) else head


def continuations(
    model: nn.Module, names: Sequence[str], heads: Sequence[nn.Module]
) -> list[tuple[int, str, nn.Module]]:
    """Return modules that may read the output of a head, with its number: ``out.1`` fits ``tower.1`` by name and width.

    There is one for each head or none, and several in the order of the model for branches of more than two modules.
    """
    words = [_words(name) for name in names]
    common = set(words[0]).intersection(*words)
    own = [set(each) - common for each in words]
    outputs = [widths(head)[1] for head in heads]
    found: list[tuple[int, str, nn.Module]] = []
    if not all(own):
        return found
    parts = {id(part) for head in heads for part in head.modules()}
    after = False
    behind: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        after = after or id(module) in parts
        around = any(id(part) in parts for part in module.modules())
        if after and not around and not is_container(module) and not any(name.startswith(f"{b}.") for b, _ in behind):
            behind.append((name, module))
    while True:
        level = []
        for index, mine in enumerate(own):
            others = set().union(*own[:index], *own[index + 1 :]) - mine
            known = {id(module) for _, _, module in found}
            for name, module in behind:
                its_words, inputs = set(_words(name)), widths(module)[0]
                fits = inputs is not None and inputs == outputs[index] and inputs > 1
                if fits and mine <= its_words and not others & its_words and id(module) not in known:
                    level.append((index, name, module))
                    break
        if len(level) < len(names):
            return found
        found += level
        outputs = [widths(module)[1] for _, _, module in level]


def comes_from(tensor: Tensor | None, output: object) -> bool:
    """Whether a tensor is a head's output, or near behind it in the graph."""
    if tensor is None or not isinstance(output, Tensor) or output.grad_fn is None:
        return False
    waiting, seen = deque([] if tensor.grad_fn is None else [tensor.grad_fn]), 0
    while waiting and seen < _NEAR:
        node, seen = waiting.popleft(), seen + 1
        if node is output.grad_fn:
            return True
        waiting += [following for following, _ in node.next_functions if following is not None]
    return False


def goes_on_message(
    task: str, head: str, index: int, module: nn.Module, all_of_them: Sequence[tuple[int, str, nn.Module]]
) -> str:
    """Say that a head goes on in ``module``, and what to pass."""
    name = next(name for number, name, one in all_of_them if number == index and one is module)
    return (
        f"head {head!r} ends in a hidden layer: {name!r} reads its output. The saliency is that of the output of {name!r}, "
        f"as of a head of both modules. To say so, pass heads={{{task!r}: [{head!r}, {name!r}], ...}}; if the head ends in "
        f"{head!r}, pass heads={{{task!r}: [{head!r}], ...}}."
    )


def _words(name: str) -> list[str]:
    return re.findall(r"[A-Za-z]+|\d+", name)
