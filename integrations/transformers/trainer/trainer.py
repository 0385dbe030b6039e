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
from .task_losses import TaskLosses, label_counts, over_the_step

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
        self._labels_of_step: Tensor | None = None
        self._train_losses: TaskLosses | None = None
        self._eval_losses: TaskLosses | None = None
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
        if isinstance(inner := unwrapped_model(trainer.model), MultiTaskModel):
            self._train_losses, self._eval_losses = TaskLosses(inner.tasks), TaskLosses(inner.tasks)

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
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        if not torch.is_grad_enabled():
            loss, outputs = base.compute_loss(model, inputs, True, num_items_in_batch, **kwargs)
            self._note(self._eval_losses, outputs, labels)
            return (loss, outputs) if return_outputs else loss
        divided = _is_divided(trainer, num_items_in_batch)
        means = divided and self._takes_means(model, inputs, num_items_in_batch, kwargs)
        loss, outputs = base.compute_loss(model, inputs, True, None if means else num_items_in_batch, **kwargs)
        steps = _micro_batches(trainer) if divided else 1
        self._note(self._train_losses, outputs, labels)
        if loss is not None and loss is getattr(outputs, "loss", None):
            loss = self._over_the_step(loss, outputs, labels)
        if means:
            loss = loss / steps
        penalty = self._penalty(model, loss.detach() * steps, outputs, labels)
        # Added behind what Trainer may have multiplied its loss by: the penalty is that of all processes as it is.
        total = loss + (penalty / steps).to(loss.dtype)
        return (total, outputs) if return_outputs else total

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of the step that begins, and count the labels of each task in them."""
        trainer: Any = self
        base: Any = super()
        batches, items = base.get_batch_samples(*args, **kwargs)
        inner = unwrapped_model(trainer.model)
        if isinstance(inner, MultiTaskModel):
            device = trainer.accelerator.device
            counts = torch.zeros(len(inner.tasks), device=device)
            for batch in batches:
                if isinstance(batch, Mapping):
                    counts = counts + label_counts(batch.get("labels"), inner.tasks, device)
            if self._gather is not None:
                counts = self._gather(counts).view(-1, len(counts)).mean(0)
            self._labels_of_step = counts
        return batches, items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Write the mean loss of each task beside that of all."""
        if self._train_losses is not None and {"loss", "learning_rate"} <= logs.keys():  # all processes write these
            losses = self._train_losses.take(self._gather)
            logs.update({f"{task}/loss": loss for task, loss in losses.items()})
        base: Any = super()
        base.log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Return the Trainer's figures, and the mean loss of each task as ``eval_joy_loss``."""
        base: Any = super()
        if self._eval_losses is not None:
            self._eval_losses.take(None)
        output = base.evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_losses is not None and output.metrics is not None:
            losses = self._eval_losses.take(self._gather)
            output.metrics.update({f"{metric_key_prefix}_{task}_loss": loss for task, loss in losses.items()})
        return output

    @property
    def _gather(self) -> Any:
        accelerator = getattr(self, "accelerator")  # noqa: B009
        if accelerator.num_processes == 1:
            return None
        return lambda own: accelerator.gather(own.to(accelerator.device))

    def _note(self, sums: TaskLosses | None, outputs: Any, labels: Any) -> None:
        losses = getattr(outputs, "losses", None)
        if sums is not None and losses:
            device = next(iter(losses.values())).device
            sums.add(losses, label_counts(labels, sums.tasks, device))

    def _over_the_step(self, loss: Any, outputs: Any, labels: Any) -> Any:
        """Let each label of a task count alike, whichever micro-batch (of whichever process) of the step it is in."""
        trainer: Any = self
        steps, losses = _micro_batches(trainer), getattr(outputs, "losses", None)
        inner, in_step = unwrapped_model(trainer.model), self._labels_of_step
        alone = steps == 1 and trainer.accelerator.num_processes == 1
        if alone or in_step is None or not losses or not isinstance(inner, MultiTaskModel):
            return loss
        shares = label_counts(labels, inner.tasks, loss.device) * steps / in_step.to(loss.device).clamp(min=1)
        weights = {task: own.weight for task, own in inner.head_configs.items()}
        return over_the_step(loss, losses, weights, dict(zip(inner.tasks, shares)))

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

    Under gradient accumulation the penalty is the mean over the micro-batches, and so is a loss that is a mean itself. With
    a :class:`MultiTaskModel` the loss of each task is the mean over its labels in the whole optimizer step, of all
    processes, and is in the logs: ``joy/loss``, and ``eval_joy_loss`` in evaluations. Many
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
