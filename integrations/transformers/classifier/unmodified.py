"""The regularizer on the classifier of an unmodified model of transformers, one task per label."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .... import SaliencyRegularizer
from ....errors import ConfigurationError, TaskError
from ....tasks import check_task_names
from ..errors import ClassifierNotFoundError
from ..model.encoder import mask_of_positions
from ..model.masked import MaskedRegularizer
from .classifier import Classifier, look_at
from .classifier_watch import ClassifierWatch


def saliency_regularizer(
    model: nn.Module,
    tasks: Sequence[str] | None = None,
    *,
    strength: float | str = "auto",
    feature: str | nn.Module | Sequence[str | nn.Module] | None = None,
    classifier: str | None = None,
    **options: Any,
) -> SaliencyRegularizer:
    """Attach a :class:`SaliencyRegularizer` to a classifier of transformers, each label as a task.

    Meant for labels that do not exclude each other (``problem_type="multi_label_classification"``). The columns of a
    classifier with exclusive classes can be related in the same way; what is penalised then is the difference between the
    weights of classes that are alike, which works against telling them apart.

    Args:
        model: ``AutoModelForSequenceClassification``, ``...TokenClassification``, ``...ImageClassification`` or
            ``...AudioClassification``; also with LoRA (peft), or inside of ``DistributedDataParallel``.
        tasks: a name for each label, in the order of the columns; by default those of ``config.id2label``.
        strength: factor of the penalty, or ``"auto"``, as in :class:`SaliencyRegularizer`.
        feature: by default what the last ``Linear`` reads. There the saliency is its weight row, in closed form, and the
            penalty trains the classifier alone. Or the name of a module whose output is taken instead, such as
            ``"bert.encoder:output.last_hidden_state"`` or ``"bert.encoder.layer.11:output"``: what lies between it and the
            logits is differentiated twice, so that the penalty reaches the encoder; attention that lies there runs without
            fused kernels, and padding does not enter.
        classifier: name of the layer that ends in the logits, where it cannot be found.
        options: of :class:`SaliencyRegularizer`. By default ``pool`` is ``"mean"`` where the classifier has logits for each
            token, because a sum would grow with the length of the texts, and ``"sum"`` elsewhere.

    Returns:
        The regularizer. Its ``remove()`` leaves the model as it was.

    Raises:
        ClassifierNotFoundError: the model has no classifier, or several; in a call: its output is not the logits.
        TaskError: another number of names than labels, or doubled ones.
        ConfigurationError: a single label, or an argument that is known here.
        AlreadyAttachedError: a regularizer is attached already.
        WrongTypeError: no model of transformers.
        SaliencyRegError: those of :class:`SaliencyRegularizer`.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from saliency_reg.integrations.transformers import saliency_regularizer
        >>> tiny = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
        >>> model = BertForSequenceClassification(tiny)
        >>> regularizer = saliency_regularizer(model, tasks=["joy", "anger", "fear"], strength=0.1)
        >>> output = model(input_ids=torch.randint(100, (2, 7)), labels=torch.zeros(2, 3))
        >>> bool(regularizer(losses=output.loss) > 0)
        True
    """
    if clash := sorted({"heads", "output"} & set(options)):
        raise ConfigurationError(
            f"{clash} are found here. Leave them out, or use SaliencyRegularizer(model, heads=...)."
        )
    found = look_at(model, classifier)
    if tasks is None:
        told: Any = getattr(found.holder.config, "id2label", None) or {}
        tasks = [str(told.get(column, column)) for column in range(found.columns)]
    names = check_task_names(tasks)
    if len(names) != found.columns:
        raise TaskError(
            f"tasks has {len(names)} names, but {type(found.holder).__name__} has {found.columns} labels. Name each label "
            f"once, or load the model with num_labels={len(names)}."
        )
    return _ClassifierRegularizer(model, found, feature=feature, tasks=names, strength=strength, **options)


class _ClassifierRegularizer(MaskedRegularizer):
    """A regularizer that knows the padding of the model's inputs, and whether its classifier returns the logits."""

    in_a_copy: ClassVar[dict[str, Any]] = {"_watch": None}

    def __init__(self, model: nn.Module, found: Classifier, *, feature: Any, **options: Any) -> None:
        chosen: dict[str, Any] = {} if feature is None else {"feature": feature}
        self._finds_pool = "pool" not in options
        holder: Any = found.holder
        encoder = getattr(holder, "base_model", holder)
        # A wrapper may call the forward of the model and not the model, which hooks on the latter do not see.
        around = (model, holder)
        super().__init__(
            model,
            mask_from=(around, "attention_mask"),
            as_positions=lambda mask, hidden: mask_of_positions(encoder, mask, hidden),
            heads=found.module,
            **chosen,
            **options,
        )
        owner = weakref.ref(self)

        def acts() -> bool:
            regularizer = owner()
            return regularizer is not None and regularizer.enabled and regularizer.current_strength > 0

        self._watch: ClassifierWatch | None = ClassifierWatch(found, around, acts, named_feature=feature is not None)

    def forward(self, **given: Any) -> Tensor:
        """Refuse logits that are not what the classifier returned; then as :meth:`SaliencyRegularizer.forward`."""
        if self._watch is not None and given.get("outputs") is None:
            if self._watch.problem is not None:
                raise ClassifierNotFoundError(self._watch.problem)
            if self._finds_pool:
                # The loss of a text whose logits are picked from those of its tokens has its gradient at few of them.
                means = self._watch.token_wise and not (self.target == "loss" and self._watch.picked)
                self.pool = "mean" if means else "sum"
        penalty: Tensor = super().forward(**given)
        return penalty

    def remove(self) -> None:
        """Take everything off the model, also what watches its classifier."""
        super().remove()
        if self._watch is not None:
            self._watch.remove()

    def _is_on_tokens(self, head: int, output: Tensor) -> bool:
        return output.ndim == 3
