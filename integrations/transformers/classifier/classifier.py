"""Finding the classifier of an unmodified model of transformers by its structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ....capture import find_module
from ....errors import ConfigurationError, WrongTypeError
from ...shared.libraries import need
from ..errors import ClassifierNotFoundError
from ..model.configuration import MODEL_TYPE
from ..unwrapping import unwrapped_model


@dataclass(frozen=True)
class Classifier:
    """What the structure of a model tells."""

    #: Of the layer that ends in the logits, within ``holder``.
    name: str
    module: nn.Module
    #: The model of transformers, inside of whatever wraps it.
    holder: nn.Module
    columns: int


def find_classifier(model: nn.Module) -> str:
    """Return the name of the layer that ends in the logits of a classifier of transformers.

    Args:
        model: ``AutoModelForSequenceClassification``, ``...TokenClassification``, ``...ImageClassification`` or
            ``...AudioClassification``; also with LoRA, or inside of ``DistributedDataParallel``.

    Raises:
        ClassifierNotFoundError: none, or several.
        ConfigurationError: a single label.
        WrongTypeError: no model of transformers.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from saliency_reg.integrations.transformers import find_classifier
        >>> tiny = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
        >>> find_classifier(BertForSequenceClassification(tiny))
        'classifier'
    """
    return look_at(model).name


def look_at(model: object, classifier: str | None = None) -> Classifier:
    """Find the classifier by the number of its outputs, or by the name that is given."""
    holder = unwrapped_model(model) if isinstance(model, nn.Module) else None
    if not isinstance(holder, need("transformers").PreTrainedModel):
        raise WrongTypeError(
            f"model must be a classifier of transformers, found {type(model).__name__}. For any other model use "
            "SaliencyRegularizer(model, heads=...)."
        )
    kind = type(holder).__name__
    if holder.config.model_type == MODEL_TYPE:
        raise WrongTypeError(f"{kind} has a head for each task. Call model.regularizer(strength=...).")
    if classifier is not None:
        name, module = find_module(holder, classifier, "classifier")
        if (columns := _outputs_of(module)) is None:
            raise ClassifierNotFoundError(
                f"{name!r} is a {type(module).__name__}, which does not say how many outputs it has. Name the Linear that "
                "ends in the logits."
            )
        return Classifier(name, module, holder, columns)
    # Some read the number of labels from a configuration of their own part.
    number = getattr(holder, "num_labels", None) or holder.config.num_labels
    layers = _layers_with(holder, number)
    found = {name: module for name, module in layers.items() if not _is_inside(holder, name)}
    if "For" in kind:  # a classifier, also if it has no base model of its own
        found = found or layers
    if not found or (holder is holder.base_model and "For" not in kind):
        raise ClassifierNotFoundError(_no_classifier(holder))
    if number == 1:
        raise ConfigurationError(
            f"{kind} has a single label (num_labels=1); relations between tasks need at least 2. Load it with "
            "num_labels=len(tasks), or give each task a head of its own: MultiTaskModel.from_encoder(name, heads)."
        )
    if len(found) > 1:
        raise ClassifierNotFoundError(
            f"{kind} has {len(found)} layers with {number} outputs: {', '.join(found)}. Pass classifier= with the name of "
            "the one whose output is the logits; where the logits are a mean of several, call regularizer(outputs=..., "
            "features=...) of SaliencyRegularizer yourself."
        )
    ((name, module),) = found.items()
    return Classifier(name, module, holder, number)


def _layers_with(model: nn.Module, number: int) -> dict[str, nn.Module]:
    """Return the linear layers with this many outputs that run; of LoRA layers, the layer around the original one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if _outputs_of(module) == number and not inside_another and not _is_idle_copy(model, name):
            found[name] = module
    return found


def _is_idle_copy(model: nn.Module, name: str) -> bool:
    """Whether peft keeps a layer beside the one that runs: the original, or that of an adapter that is not active."""
    if "original_module" in name.split("."):
        return True
    before, found, rest = name.partition("modules_to_save.")
    if not found:
        return False
    wrapper = model.get_submodule(before.rstrip("."))
    active: Any = getattr(wrapper, "active_adapters", None) or [getattr(wrapper, "active_adapter", None)]
    return rest.partition(".")[0] not in active


def _outputs_of(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    base = getattr(module, "base_layer", None)  # a LoRA layer
    return base.out_features if isinstance(base, nn.Linear) else None


def _is_inside(model: Any, name: str) -> bool:
    prefix = model.base_model_prefix
    return bool(prefix) and model.base_model is not model and name.startswith(f"{prefix}.")


def _no_classifier(model: nn.Module) -> str:
    name = type(model).__name__
    number = model.config.num_labels  # type: ignore[union-attr]
    advice = (
        "Load it with a classifier, AutoModelForSequenceClassification.from_pretrained(name, num_labels=...), or give it "
        "heads: MultiTaskModel.from_encoder(name, {'joy': 1, 'anger': 1})."
    )
    if any(word in name for word in ("ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM")):
        return f"{name} predicts tokens, and has no classifier with {number} labels. {advice}"
    return (
        f"{name} has no layer with {number} outputs behind its encoder. If its classifier has another number of outputs, "
        f"pass classifier= with its name. {advice}"
    )
