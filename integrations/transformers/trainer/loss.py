"""The penalty within a Trainer: how it is weighed against the loss under gradient accumulation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .... import SaliencyRegularizer
from ....errors import WrongTypeError
from ...shared.libraries import need
from ..errors import LabelError, UnsupportedTrainerError
from ..model.losses import known_labels, precise
from .callback import SaliencyCallback
from .measurement import takes_means

logger = logging.getLogger("saliency_reg")

#: What ``compute_loss_func=`` of a Trainer is: from the model's outputs, the labels and the number of labels in all
#: micro-batches of the step to a loss.
LossFunction = Callable[..., Tensor]


class SaliencyLoss(SaliencyCallback):
    """The regularizer for a Trainer of your own: a ``compute_loss_func`` and a callback in one object.

    Pass it twice: ``MyTrainer(..., compute_loss_func=saliency, callbacks=[saliency])``. As a callback it lets the relations
    follow the Trainer's optimizer, keeps them in its checkpoints, and writes its figures into ``trainer.state.log_history``
    (trackers have been called by then; those see them with :class:`SaliencyTrainer`). Not for a Trainer that overrides
    ``compute_loss``, which calls no ``compute_loss_func``: take :class:`SaliencyTrainerMixin` there.

    A Trainer with a ``compute_loss_func`` takes the labels away from the model, and divides nothing by the accumulation
    steps: the loss has to be a sum over ``num_items_in_batch``. The default is one: binary cross entropy for floating-point
    labels of the shape of the logits, cross entropy for classes; ``-100`` and NaN are missing labels. The penalty is divided
    by the number of micro-batches of the step, the last, shorter one of an epoch included.

    Args:
        regularizer: attached to the model.
        loss_func: ``(outputs, labels, num_items_in_batch=...) -> loss`` in place of the default; what you would otherwise
            pass as ``compute_loss_func``.
        log_pairs: as in :class:`SaliencyTrainer`.

    Raises:
        WrongTypeError: no regularizer, or no function.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from saliency_reg.integrations.transformers import SaliencyLoss, saliency_regularizer
        >>> tiny = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
        >>> saliency = SaliencyLoss(saliency_regularizer(BertForSequenceClassification(tiny)))
        >>> saliency  # Trainer(..., compute_loss_func=saliency, callbacks=[saliency])
        SaliencyLoss(3 tasks)
    """

    def __init__(
        self, regularizer: SaliencyRegularizer, loss_func: LossFunction | None = None, *, log_pairs: int = 0
    ) -> None:
        super().__init__(regularizer, log_pairs=log_pairs)
        if loss_func is not None and not callable(loss_func):
            raise WrongTypeError(f"loss_func must be a function, found {type(loss_func).__name__}.")
        self._loss_func = mean_loss if loss_func is None else loss_func
        self._means: bool | None = None
        self._called = False

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """The loss of a micro-batch as Trainer wants it: divided already.

        Raises:
            UnsupportedTrainerError: it was not passed as a callback, too.
            LabelError: labels that the default loss cannot take.
        """
        self._called = True
        if not torch.is_grad_enabled():  # an evaluation
            return self._loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        if not self.is_callback:
            raise UnsupportedTrainerError(
                "this SaliencyLoss is no callback of the Trainer, so that its relations would not move and not be saved. "
                "Use Trainer(..., compute_loss_func=saliency, callbacks=[saliency])."
            )
        steps = self.micro_batches
        items = num_items_in_batch
        # What Trainer does to all of the loss when it counts the labels of all processes.
        times = self.processes if items is not None and self.averages_over_devices else 1
        if items is None or self._takes_means(outputs, labels, items):  # without a count it can only be a mean
            loss = self._loss_func(outputs, labels, num_items_in_batch=None) / (steps * times)
        else:
            loss = self._loss_func(outputs, labels, num_items_in_batch=items)
        penalty: Tensor = self.regularizer(losses=loss.detach() * steps * times)
        return loss + (penalty / (steps * times)).to(loss.dtype)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say if the Trainer never called this function.

        Raises:
            UnsupportedTrainerError: it did not.
        """
        if not self._called:
            raise UnsupportedTrainerError(
                "this Trainer took a step and never called SaliencyLoss: it overrides compute_loss, or has another "
                "compute_loss_func. Use class Mine(SaliencyTrainerMixin, MyTrainer) and pass regularizer=, or "
                "compute_loss_func=saliency."
            )

    def _takes_means(self, outputs: Any, labels: Any, items: Any) -> bool:
        """Whether ``loss_func`` takes the mean of a micro-batch, which Trainer would add up. Measured once."""
        if self._means is None and self.micro_batches == 1 and self.processes == 1:
            return False
        if self._means is None:
            gather = need("transformers").trainer_pt_utils.distributed_concat if self.processes > 1 else None
            self._means = takes_means(
                lambda own: self._loss_func(outputs, labels, num_items_in_batch=own), items, gather
            )
            if self._means:
                logger.warning(
                    "loss_func takes the mean of each micro-batch and ignores num_items_in_batch: Trainer would add up the "
                    "%d of a step. Here their mean is taken.",
                    self.micro_batches,
                )
        return bool(self._means)


def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    """Return the sum of the losses of all known labels, over ``num_items_in_batch``, or else over their number."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        what = "a dictionary" if isinstance(labels, Mapping) else "no" if labels is None else type(labels).__name__
        raise LabelError(
            f"found {what} labels and logits of type {type(logits).__name__}, expected tensors. Use "
            "SaliencyLoss(regularizer, loss_func=...) with a loss of your own; a MultiTaskModel has losses: use "
            "SaliencyTrainer for it."
        )
    known = known_labels(labels)
    safe = torch.where(known, labels, 0)
    logits = precise(logits)
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise LabelError(
                f"floating-point labels {list(labels.shape)} are yes or no for each of the logits {list(logits.shape)}, and "
                "must have their shape. For classes pass whole numbers, for anything else loss_func=."
            )
        losses = functional.binary_cross_entropy_with_logits(logits, safe.to(logits), reduction="none")
    else:
        if labels.numel() * logits.shape[-1] != logits.numel():
            raise LabelError(
                f"classes {list(labels.shape)} do not fit logits {list(logits.shape)}. For labels that are yes or no pass "
                "floating-point numbers of the shape of the logits."
            )
        flat = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), safe.reshape(-1), reduction="none")
        losses = flat.reshape(labels.shape)
    total = losses.masked_fill(~known, 0.0).sum()
    # Trainer counts what is not -100; NaN is missing, too, and is counted there.
    number = known.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss: Tensor = total / number
    return loss
