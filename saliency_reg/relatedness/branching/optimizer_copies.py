"""What an optimizer knows of parameters, for their copies."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import ConfigurationError
from ...torch_tools import derives_from, unwrap_optimizer

Named = Sequence[tuple[str, nn.Parameter]]


def checked_optimizer(optimizer: Any, parameters: Named) -> torch.optim.Optimizer:
    """Return the optimizer inside of wrappers, if it can take on copies of these parameters."""
    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, torch.optim.LBFGS) or derives_from(inner, "ZeroRedundancyOptimizer"):
        raise ConfigurationError(
            f"{type(inner).__name__} does not keep its state by parameter, so that copies of parameters cannot get theirs. "
            "Split with optimizer=None, and build a new one afterwards."
        )
    known = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    if not any(id(parameter) in known for _, parameter in parameters):
        raise ConfigurationError(
            "optimizer has no parameter of this model. Pass the one that trains it, built after the last split without it, "
            "or optimizer=None."
        )
    return inner


def add_copies(
    optimizer: torch.optim.Optimizer, copies: Mapping[nn.Parameter, Sequence[nn.Parameter]], before: Named, after: Named
) -> None:
    """Put the copies of parameters into the groups in which these are, each with a copy of the state.

    A group that had the parameters of the model in their order (``before``) has them in their order again (``after``): so
    its state dict fits an optimizer that is built in the same way on the model as it is then. In others each copy follows
    its original.
    """
    old = {parameter: (place, name) for place, (name, parameter) in enumerate(before)}
    new = {parameter: (place, name) for place, (name, parameter) in enumerate(after)}
    for group in optimizer.param_groups:
        params: list[nn.Parameter] = group["params"]
        prefixes = _prefixes(group, old)
        places = [place for place, parameter in enumerate(params) if parameter in old]
        merged = [one for parameter in params for one in (parameter, *copies.get(parameter, ()))]
        ranks = [old[params[place]][0] for place in places]
        if places and places == [*range(places[0], places[-1] + 1)] and ranks == sorted(ranks):
            first, stop = places[0], places[-1] + 1 + len(merged) - len(params)
            merged[first:stop] = sorted(merged[first:stop], key=lambda parameter: new[parameter][0])
        for parameter in params:
            for one in copies.get(parameter, ()):
                if parameter in optimizer.state:
                    optimizer.state[one] = copy.deepcopy(optimizer.state[parameter])
        if prefixes is not None:  # names that the optimizer was given, as the model has them now
            foreign = dict(zip(params, group["param_names"]))
            prefix = next(iter(prefixes), "")
            group["param_names"] = [prefix + new[one][1] if one in new else foreign[one] for one in merged]
        params[:] = merged


def _prefixes(group: Mapping[str, Any], old: Mapping[nn.Parameter, tuple[int, str]]) -> set[str] | None:
    """Return what the optimizer was given before the names of the model; ``None`` if it was given no names."""
    if "param_names" not in group:
        return None
    named = zip(group["params"], group["param_names"])
    return {name.removesuffix(old[parameter][1]) for parameter, name in named if parameter in old}
