"""Freezing a part of a model for good: also its BatchNorms, and also after ``model.train()``."""

from __future__ import annotations

import difflib
from typing import TypeVar

from torch import nn

from ....errors import ModuleNotFoundInModelError, WrongTypeError
from .layer_groups import layer_of_parameters

_Self = TypeVar("_Self", bound="Freezing")


class Freezing(nn.Module):
    """A module around ``model``, which can be frozen from its first layer to a given one."""

    model: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self._idle: frozenset[str] = frozenset()
        self._frozen: frozenset[str] = frozenset()

    @property
    def idle(self) -> frozenset[str]:
        """Names of parameters that get no gradient here, and stay frozen."""
        return self._idle

    def freeze(self, up_to: str | None = None) -> None:
        """Freeze all layers, or those up to and including a module of the timm model."""
        layers = layer_of_parameters(self.model)
        last = max(layers[name] for name in (layers if up_to is None else self._parameters_of(up_to)))
        self._frozen = frozenset(name for name, layer in layers.items() if layer <= last)
        self._apply_freezing()

    def unfreeze(self) -> None:
        """Let all layers be trained, but those that the forward does not use."""
        self._frozen = frozenset()
        self._apply_freezing()

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set the mode, but leave BatchNorms of frozen layers in eval mode: their statistics are frozen too."""
        super().train(mode)
        if mode and self._frozen:
            for module in self._frozen_batch_norms():
                module.eval()
        return self

    def _apply_freezing(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in self._frozen and name not in self._idle)
        self.train(self.training)

    def _frozen_batch_norms(self) -> list[nn.Module]:
        found: list[nn.Module] = []
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
            if not own:  # without weights: as the rest of what it is in
                own = self._names_within(name.rpartition(".")[0])
            if own and own <= self._frozen:
                found.append(module)
        return found

    def _names_within(self, name: str) -> set[str]:
        prefix = f"{name}." if name else ""
        return {parameter for parameter, _ in self.model.named_parameters() if parameter.startswith(prefix)}

    def _parameters_of(self, name: str) -> set[str]:
        if not isinstance(name, str):
            raise WrongTypeError(
                f"up_to must be the name of a module, found {type(name).__name__}. Pass up_to='layer2'."
            )
        found = self._names_within(name)
        if name and found:
            return found
        names = [module for module, _ in self.model.named_modules() if module]
        children = [child for child, module in self.model.named_children() if any(True for _ in module.parameters())]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = (
            f"Did you mean {', '.join(map(repr, near))}?" if near else f"Use one of {', '.join(map(repr, children))}."
        )
        raise ModuleNotFoundInModelError(
            f"{type(self.model).__name__} has no module {name!r} with parameters, to freeze up to. {hint} Names are those "
            "of model.backbone.model.named_modules()."
        )
