"""Finding heads that the user did not name: by what modules are called, how wide they are, and where they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import nn

from ...errors import AmbiguousHeadsError, HeadNotFoundError
from ..lookup import listed

# Names of a container of heads, and of heads that are siblings (decoder_embed and decoder_norm are parts of one decoder).
_CONTAINER_WORD = re.compile(r"(?i)(?:^|_)(head|classifier|decoder|tower|predictor|readout|task)s?\d*(?:_|$)")
_SIBLING_WORD = re.compile(r"(?i)(?:^|_)(head|classifier|tower|predictor|readout|task)s?\d*(?:_|$)")
#: What no head ends in.
_HIDDEN = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.Embedding),
)


def is_container(module: nn.Module) -> bool:
    """Tell whether a module only holds others, and is not called itself."""
    return isinstance(module, (nn.ModuleDict, nn.ModuleList)) and type(module).forward is nn.Module.forward


def widths(module: nn.Module) -> tuple[int | None, int | None]:
    """Return the inputs of the first layer inside and the outputs of the last one, where they are known."""
    found: list[tuple[int, int]] = []
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            found.append((layer.in_features, layer.out_features))
        elif isinstance(layer, nn.modules.conv._ConvNd):
            found.append((layer.in_channels, layer.out_channels))
        elif isinstance(layer, nn.RNNBase):
            found.append((layer.input_size, layer.hidden_size * (1 + layer.bidirectional)))
    return (found[0][0] or None, found[-1][1]) if found else (None, None)


def last_layer(module: nn.Module) -> nn.Module:
    """Return what a chain of modules ends in."""
    while isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module):
        module = module[-1]
    return module


def find_heads(model: nn.Module, tasks: Sequence[str] | None) -> str | list[str]:
    """Return the names of the heads, or of one with a column per task, if they are unambiguous."""
    groups = _candidate_groups(model)
    if len(groups) > 1 and tasks is not None:
        groups = {label: names for label, names in groups.items() if len(names) == len(tasks)} or groups
    if len(groups) == 1:
        return next(iter(groups.values()))
    if groups:
        raise AmbiguousHeadsError(_ambiguous(model, groups))
    if tasks is not None:
        fitting = [
            str(name)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == len(tasks)
        ]
        if len(fitting) == 1:
            return fitting[0]
    children = listed(f"{name!r}{_outputs(module)}" for name, module in [*model.named_children()][::-1]) or "none"
    raise HeadNotFoundError(
        f"no heads were found in {type(model).__name__} (its children, the last first: {children}). Pass heads= with "
        f"their names, e.g. {_examples(model)}."
    )


def _examples(model: nn.Module) -> str:
    """Say what heads may be called: with names of this model, where it has modules that may be some."""
    containers = [(name, module) for name, module in model.named_modules() if _may_be_list_of_heads(model, module)]
    children = [(name, module) for name, module in model.named_children() if widths(module)[0] is not None]
    side_by_side: list[str] = []  # the last ones, as long as they read the same and not each other
    single = True
    for name, module in reversed(children):
        inputs, outputs = widths(module)
        single = single and not is_container(module)
        if not single or inputs != widths(children[-1][1])[0] or (side_by_side and outputs == inputs):
            break
        side_by_side.insert(0, name)
    if containers and (len(side_by_side) < 2 or _ends(model, containers[-1][1])):
        return f"heads={containers[-1][0]!r}"
    if len(side_by_side) >= 2:
        return f"heads={side_by_side}"
    joint = side_by_side[0] if side_by_side else "fc"
    return f"heads=['smiling', 'young'], or heads={joint!r}, tasks=[...] for one layer with a column per task"


def _may_be_list_of_heads(model: nn.Module, module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleDict, nn.ModuleList)) or len(module) < 2:
        return False
    known = any(widths(member)[1] is not None for member in module.children())
    return known and not _is_stack(list(module.children())) and (not _is_chain(module) or _ends(model, module))


def _ends(model: nn.Module, container: nn.Module) -> bool:
    """Whether no module with parameters comes behind it."""
    with_parameters = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    return not with_parameters or with_parameters[-1] in set(container.modules())


def _outputs(module: nn.Module) -> str:
    if is_container(module):
        return f", a {type(module).__name__} of {listed((repr(name) for name, _ in module.named_children()), 4)}"
    width = widths(module)[1]
    return "" if width is None else f" with {width} output{'s' * (width > 1)}"


def _ambiguous(model: nn.Module, groups: Mapping[str, Sequence[str]]) -> str:
    sizes = {label: widths(model.get_submodule(names[0])) for label, names in groups.items()}
    described = []
    chain: list[str] | None = None
    for label, names in groups.items():
        inputs, outputs = sizes[label]
        text = f"{label!r} ({len(names)} modules: {listed(map(repr, names), 4)}"
        if outputs is not None:
            text += f"; {inputs or '?'} inputs and {outputs} output{'s' * (outputs > 1)} each"
        # Heads read one tensor: what another group can read, of as many members, comes before it.
        for other, its_names in groups.items():
            could_read = sizes[other][0] == outputs is not None and outputs != inputs and sizes[other][1] != inputs
            if could_read and other != label and len(its_names) == len(names):
                text += f"; hidden layers that run before {other!r}, if that reads their outputs, as the sizes say"
                chain = chain or [names[0], its_names[0]]
        described.append(text + ")")
    advice = "."
    if chain is not None:
        task = chain[0].rpartition(".")[2]
        advice = (
            f"; for branches of modules a list for each, from its beginning to its output: {{{task!r}: {chain}, ...}}."
        )
    return (
        f"{type(model).__name__} has several groups of modules that could be the heads: {'; '.join(described)}. Pass heads= "
        f"with one of these names, a pattern, or a list of modules{advice}"
    )


def _candidate_groups(model: nn.Module) -> dict[str, list[str]]:
    """Find groups of modules that are named like heads: a container, or siblings such as head_a and head_b."""
    groups: dict[str, list[str]] = {}
    dictionaries: dict[str, list[str]] = {}
    siblings: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(container + ".") for container in groups):
            continue
        parent, _, last = name.rpartition(".")
        if isinstance(module, (nn.ModuleDict, nn.ModuleList)) and len(module) >= 2:
            children = [f"{name}.{child}" for child, _ in module.named_children()]
            if _is_stack(list(module.children())) or (not is_container(module) and _is_chain(module)):
                continue
            if _CONTAINER_WORD.search(last):
                groups[name] = children
            elif isinstance(module, nn.ModuleDict):
                dictionaries[name] = children
        elif word := _SIBLING_WORD.search(last):
            siblings.setdefault((parent, word.group(1).lower()), []).append(name)
    for (parent, word_found), names in siblings.items():
        if len(names) >= 2:
            groups[f"{parent}.*{word_found}*" if parent else f"*{word_found}*"] = names
    return groups or {name: names for name, names in dictionaries.items() if _may_be_heads(model, name, dictionaries)}


def _is_stack(members: Sequence[nn.Module]) -> bool:
    """Whether each can only read the output of the one before, as the stages of a decoder do."""
    sizes = [widths(member) for member in members]
    fit = all(sizes[i][1] == sizes[i + 1][0] is not None for i in range(len(sizes) - 1))
    return fit and len({inputs for inputs, _ in sizes}) > 1


def _is_chain(container: nn.Module) -> bool:
    """Whether each member may read the output of the one before, or members read something else."""
    sizes = [widths(member) for member in container.children()]
    inputs = {size for size, _ in sizes if size is not None}
    fits = all(None in (before[1], after[0]) or before[1] == after[0] for before, after in pairwise(sizes))
    return fits or len(inputs) > 1


def _may_be_heads(model: nn.Module, name: str, dictionaries: Mapping[str, Sequence[str]]) -> bool:
    """Whether a dictionary with any name may hold the heads: nothing comes behind it, and its members end like heads."""
    keys = {label: {child.rpartition(".")[2] for child in children} for label, children in dictionaries.items()}
    if any(keys[other] == keys[name] for other in dictionaries if other != name):
        return False  # the parts of each task, or what its heads are made of
    container = model.get_submodule(name)
    members = list(container.children())
    if any(isinstance(last_layer(member), _HIDDEN) or widths(member)[1] is None for member in members):
        return False
    if len({inputs for member in members if (inputs := widths(member)[0]) is not None}) > 1:
        return False
    return _ends(model, container)
