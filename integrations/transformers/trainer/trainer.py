"""A Trainer that adds the penalty to the loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .... import SaliencyRegularizer
from ....errors import MissingArgumentError
from ...shared.libraries import need
from ...shared.looking import undisturbed
from ..errors import UnsupportedTrainerError
from ..model.losses import known_labels
from ..model.model import MultiTaskModel
from ..unwrapping import unwrapped_model
from .callback import SaliencyCallback, check_attached
from .measurement import takes_means

logger = logging.getLogger("saliency_reg")
_transformers = need("transformers")


class SaliencyTrainerMixin:
    """What :class:`SaliencyTrainer` adds to a Trainer, for one of your own: ``class Mine(SaliencyTrainerMixin, MyTrainer)``.

    Args:
        regularizer: attached to the model.
        log_pairs: pairs of tasks whose distances and relations go into the logs.
        args, kwargs: of the Trainer.

    Raises:
        WrongTypeError: no regularizer.
        MissingArgumentError: no ``regularizer=``.
        UnsupportedTrainerError: the regularizer is attached to another model, or the Trainer builds its model anew.
    """

    def __init__(
        self, *args: Any, regularizer: SaliencyRegularizer | None = None, log_pairs: int = 0, **kwargs: Any
    ) -> None:
        if regularizer is None:
            raise MissingArgumentError(
                "a SaliencyTrainer needs regularizer=. Use saliency_regularizer(model, tasks=...), or "
                "model.regularizer() of a MultiTaskModel; without one, use Trainer."
            )
        self._saliency = SaliencyCallback(regularizer, log_pairs=log_pairs)
        self._means: bool | None = None
        if kwargs.get("model_init") is not None:
            raise UnsupportedTrainerError(
                "model_init builds a new model, to which no regularizer is attached. Pass model=, with the regularizer on "
                "it."
            )
        super().__init__(*args, **kwargs)
        trainer: Any = self
        # Before those that send logs to trackers, so that these see the figures.
        trainer.callback_handler.callbacks.insert(0, self._saliency)
        trainer.state.stateful_callbacks[type(self._saliency).__name__] = self._saliency.state()
        self._saliency.is_callback = True
        if trainer.label_smoother is not None and isinstance(unwrapped_model(trainer.model), MultiTaskModel):
            raise UnsupportedTrainerError(
                f"label_smoothing_factor={trainer.args.label_smoothing_factor:g} is for one tensor of logits, and a "
                "MultiTaskModel has a dictionary of them. Leave it out."
            )
        check_attached(regularizer, trainer.model)

    @property
    def regularizer(self) -> SaliencyRegularizer:
        """The regularizer whose penalty is added."""
        return self._saliency.regularizer

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the Trainer's loss, and in training the penalty; divided as the Trainer expects it."""
        trainer: Any = self
        base: Any = super()
        if not torch.is_grad_enabled():
            return base.compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        divided = _is_divided(trainer, num_items_in_batch)
        means = divided and self._takes_means(model, inputs, num_items_in_batch, kwargs)
        loss, outputs = base.compute_loss(model, inputs, True, None if means else num_items_in_batch, **kwargs)
        steps = _micro_batches(trainer) if divided else 1
        if means:
            loss = loss / steps
        penalty = self._penalty(model, loss.detach() * steps, outputs, labels)
        # Added behind what Trainer may have multiplied its loss by: the penalty is that of all processes as it is.
        total = loss + (penalty / steps).to(loss.dtype)
        return (total, outputs) if return_outputs else total

    def _penalty(self, model: Any, loss: Tensor, outputs: Any, labels: Any) -> Tensor:
        regularizer = self.regularizer
        losses: Any = loss
        if regularizer.target == "loss":
            inner = unwrapped_model(model)
            logits = getattr(outputs, "logits", None)
            if isinstance(inner, MultiTaskModel) and isinstance(labels, Mapping) and logits is not None:
                losses = inner.sample_losses(logits, labels)
            else:
                losses = _column_losses(regularizer, outputs, labels)
        penalty: Tensor = regularizer(losses=losses)
        return penalty

    def _takes_means(self, model: Any, inputs: Any, items: Any, options: Mapping[str, Any]) -> bool:
        """Whether the loss is the mean of a micro-batch, although Trainer takes it for a sum over ``num_items_in_batch``.

        With one micro-batch in one process it makes no difference. Otherwise measured once: it is not, if twice as many
        items change the loss.
        """
        trainer: Any = self
        if getattr(trainer, "loss_is_scaled_for_ga", None) is not None:
            return False
        if items is None:  # without a count it can only be a mean
            return trainer.compute_loss_func is not None
        if not isinstance(inputs, Mapping) or (
            self._means is None and _micro_batches(trainer) == 1 and trainer.accelerator.num_processes == 1
        ):
            return False
        if self._means is None:
            base: Any = super()
            with undisturbed(model):
                self._means = takes_means(
                    lambda own: base.compute_loss(model, {**inputs}, False, own, **options),
                    items,
                    trainer.accelerator.gather,
                )
            if self._means:
                logger.warning(
                    "The loss of this %s with %s is the mean of each micro-batch, although it accepts num_items_in_batch: a "
                    "plain Trainer adds up the %d of a step. Here their mean is taken; with "
                    "trainer.loss_is_scaled_for_ga = True the loss is left as it is.",
                    type(self).__name__,
                    type(unwrapped_model(model)).__name__,
                    _micro_batches(trainer),
                )
        return bool(self._means)


class SaliencyTrainer(SaliencyTrainerMixin, _transformers.Trainer):  # type: ignore[misc,name-defined]
    """``transformers.Trainer`` with the penalty in its loss; evaluation, prediction and saving are those of Trainer.

    The relations follow the optimizer that the Trainer makes, are kept in its checkpoints (``trainer_state.json``), and are
    there again with ``resume_from_checkpoint``. ``saliency/penalty``, ``saliency/share``, mean distances, relations, those
    of the closest pairs if you ask for them, and conflicts under ``surgery=`` are beside the loss in every log.

    Under gradient accumulation the penalty is the mean over the micro-batches, and so is a loss that is a mean itself. Many
    classifiers of transformers say that they accept ``num_items_in_batch`` and ignore it, so that a plain Trainer adds up
    the micro-batches' means; this is measured, said once in the log, and put right here. Losses that do use it are left as
    they are.

    Args:
        regularizer: attached to the model, without ``optimizer=``.
        log_pairs: pairs of tasks whose distances and relations go into the logs.
        args, kwargs: of the Trainer.

    Raises:
        WrongTypeError: no regularizer.
        MissingArgumentError: no ``regularizer=``.
        UnsupportedTrainerError: the regularizer is attached to another model, the Trainer builds its model anew; in
            ``train()``: DeepSpeed, ``DataParallel``, or a checkpoint without our state.

    Example:
        >>> import tempfile, torch
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from saliency_reg.integrations.transformers import SaliencyTrainer, saliency_regularizer
        >>> tiny = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
        >>> model = BertForSequenceClassification(tiny)
        >>> rows = [{"input_ids": torch.randint(100, (7,)), "labels": torch.zeros(3)} for _ in range(8)]
        >>> folder = tempfile.mkdtemp()
        >>> arguments = TrainingArguments(folder, max_steps=2, report_to=[], logging_strategy="no")
        >>> regularizer = saliency_regularizer(model, strength=0.1)
        >>> trainer = SaliencyTrainer(model, arguments, train_dataset=rows, regularizer=regularizer)
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        2
        >>> int(regularizer.relations.updates)
        2
    """


def _is_divided(trainer: Any, items: Any) -> bool:
    """Whether the Trainer takes a loss as divided by the accumulation steps already."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)
    if told is not None:
        return bool(told)
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


def _micro_batches(trainer: Any) -> int:
    own = getattr(trainer, "current_gradient_accumulation_steps", None)
    return int(trainer.args.gradient_accumulation_steps if own is None else own)


def _column_losses(regularizer: SaliencyRegularizer, outputs: Any, labels: Any) -> dict[str, Tensor]:
    """Return the binary cross entropy of each label and sample, for ``target="loss"``."""
    logits = getattr(outputs, "logits", None)
    if (
        not isinstance(logits, Tensor)
        or not isinstance(labels, Tensor)
        or labels.shape != logits.shape
        or not labels.is_floating_point()
    ):
        raise UnsupportedTrainerError(
            "target='loss' needs the loss of each task and sample, which a Trainer knows for labels that are yes or no, "
            "floating-point numbers of the shape of the logits, or for a MultiTaskModel. Use target='output', or override "
            "compute_loss and call regularizer(losses=...) yourself."
        )
    known = known_labels(labels)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits.float(), torch.where(known, labels, 0).float(), reduction="none"
    )
    return dict(zip(regularizer.tasks, losses.masked_fill(~known, 0.0).unbind(1)))
