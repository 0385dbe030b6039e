"""``forward_head`` of a timm model as a module to which a regularizer can be attached."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ....errors import AlreadyAttachedError, ConfigurationError


class ClassifierPart(nn.Module):
    """All of a timm model that is behind its feature map; it does not keep the model alive.

    The classifiers are its modules that end in logits, so that their parameters and modes are found here. Attention pooling
    runs without a fused kernel, since those have no second derivative.
    """

    def __init__(self, model: nn.Module, classifiers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self.classifiers = nn.ModuleList(classifiers)

    def forward(self, features: Any, **keywords: Any) -> Tensor:
        """Return the logits ``[B, T]`` of what ``forward_features`` returned."""
        model = self._model()
        if model is None:
            raise ReferenceError("the timm model of this part is gone")
        with sdpa_kernel(SDPBackend.MATH):
            logits: Tensor = type(model).forward_head(model, features, **keywords)  # type: ignore[attr-defined]
        return logits


class _Installed:
    """Stands in for ``model.forward_head``. A copy or a pickle of the model has its own method again."""

    def __init__(self, model: nn.Module, part: ClassifierPart, maps: Sequence[nn.Module]) -> None:
        self._model = weakref.ref(model)
        self._part = part
        self._maps = list(maps)

    def __call__(self, features: Any, *args: Any, **keywords: Any) -> Any:
        if args or keywords.get("pre_logits"):
            model: Any = self._model()
            return type(model).forward_head(model, features, *args, **keywords)
        if self._maps:
            features = [own(each) for own, each in zip(self._maps, features)]
        return self._part(features, **keywords)

    def __reduce__(self) -> Any:
        return getattr, (self._model(), "forward_head")  # before the copy has attributes: the method of its class


def install(model: nn.Module, part: ClassifierPart, maps: int) -> list[nn.Module]:
    """Let the model call ``part``, which is not registered in it, in place of its own ``forward_head``.

    Returns a module for each of several feature maps, through which it passes, to be named as features.
    """
    if _is_installed(model):
        raise AlreadyAttachedError(
            f"a regularizer is attached to the classifier of this {type(model).__name__} already. Call .remove() on it "
            "first, or use it."
        )
    own = vars(model).get("forward_head")
    # Copies of a model with a part have the method of their class as an attribute.
    if own is not None and getattr(own, "__func__", None) is not type(model).forward_head:  # type: ignore[attr-defined]
        raise ConfigurationError(
            f"forward_head of this {type(model).__name__} was replaced by hand, and would be passed by here. Use "
            "saliency_regularizer(model, ..., feature='auto'), or replace it in a class derived from the model's."
        )
    # One class each: a regularizer tells modules outside of the model by their class.
    sources: list[nn.Module] = [type(f"map_{index}", (nn.Identity,), {})() for index in range(maps if maps > 1 else 0)]
    vars(model)["forward_head"] = _Installed(model, part, sources)
    return sources


def _is_installed(model: nn.Module) -> bool:
    return isinstance(vars(model).get("forward_head"), _Installed)


def uninstall(reference: weakref.ref[nn.Module]) -> None:
    """Give the model its own method back."""
    model = reference()
    if model is not None and _is_installed(model):
        del vars(model)["forward_head"]
