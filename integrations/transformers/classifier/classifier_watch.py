"""Hooks on a classifier and its model: what was found has to be what the logits are made of."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ....errors import ConfigurationError
from ....torch_tools import ModuleHooks, in_backward
from .classifier import Classifier


class ClassifierWatch:
    """Looks at the first forward with gradients, and keeps fused attention out of those that are differentiated twice.

    ``around`` is the model of transformers and what wraps it; ``acts`` tells whether there is a penalty. Attention may lie
    behind a ``named_feature``, one of the user's choice, and then runs by operations that have a second derivative.
    """

    def __init__(
        self, found: Classifier, around: Sequence[nn.Module], acts: Callable[[], bool], *, named_feature: bool
    ) -> None:
        self._name = found.name
        self._kind = type(found.holder).__name__
        self._acts = acts
        self._named_feature = named_feature
        self._output: Tensor | None = None
        self._looked = False
        self._without_fused_attention = contextlib.ExitStack()
        #: Whether the classifier has logits for each token.
        self.token_wise = False
        #: Whether the model's logits are picked from those of all tokens, or their mean.
        self.picked = False
        #: What was seen to be wrong, for a person.
        self.problem: str | None = None
        self._hooks = ModuleHooks(self)
        for module in dict.fromkeys(around):
            if named_feature:
                self._hooks.before(module, self._enter, first=True)
            self._hooks.after(module, self._after_model, always=True)
        self._hooks.after(found.module, self._after_classifier)
        # An interrupted forward would leave the whole process without fused attention.
        weakref.finalize(self, self._without_fused_attention.close).atexit = False

    def remove(self) -> None:
        """Take the hooks off, and give fused attention back."""
        self._hooks.remove()
        self._without_fused_attention.close()
        self._output = None

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._without_fused_attention.close()
        if not _records() or not self._acts():
            return
        config: Any = getattr(module, "config", None)
        if (
            module.training
            and getattr(config, "_attn_implementation", None) == "sdpa"
            and any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
        ):
            raise ConfigurationError(
                "with gradient checkpointing, attention behind a feature of your choice runs again with fused kernels, "
                "which have no second derivative. Call model.set_attn_implementation('eager'), or leave feature= out."
            )
        self._without_fused_attention.enter_context(sdpa_kernel(SDPBackend.MATH))

    def _after_classifier(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and _records():
            self.token_wise = output.ndim == 3
            self._output = None if self._looked else output.detach()

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._without_fused_attention.close()
        seen, self._output = self._output, None
        if seen is None or output is None or not torch.isfinite(seen).all():  # the forward raised, or has diverged
            return
        self._looked = True
        several = output if isinstance(output, (tuple, list)) else [getattr(output, "logits", None)]
        logits = next((one for one in several if isinstance(one, Tensor) and one.shape[-1:] == seen.shape[-1:]), None)
        if logits is None:
            shapes = [list(one.shape) for one in several if isinstance(one, Tensor)]
            self.problem = (
                f"{self._kind} returned {f'logits of shape {shapes[0]}' if shapes else 'no logits'}, and {self._name!r} "
                f"{list(seen.shape)}: that is not the classifier. Pass classifier= with the name of the Linear that ends in "
                "the logits, or load a model that classifies texts, tokens, images or recordings."
            )
        elif logits.shape == seen.shape:
            if not torch.equal(logits.detach().to(seen), seen):  # accelerate returns float32, on the inputs' device
                self.problem = (
                    f"what {self._name!r} returned is not what {self._kind} returns as its logits: something is computed "
                    "behind it. Use SaliencyRegularizer(model, heads=..., tasks=[...]) with the module that ends in the "
                    "logits."
                )
        else:
            self.picked = True
            if self._named_feature:
                self.problem = (
                    f"{self._kind} makes its logits {list(logits.shape)} of {list(seen.shape)} that {self._name!r} "
                    "returned for all tokens, and a saliency at a feature of your choice would be that of all of them. "
                    "Leave feature= out."
                )


def _records() -> bool:
    """Whether this is neither an evaluation nor a part of the model that a checkpoint runs again."""
    return torch.is_grad_enabled() and not in_backward()
