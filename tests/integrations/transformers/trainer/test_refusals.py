"""Trainers, losses and labels that cannot be followed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer

from saliency_reg import SaliencyRegularizer
from saliency_reg.errors import MissingArgumentError, SaliencyRegError, WrongTypeError
from saliency_reg.integrations.transformers import (
    LabelError,
    SaliencyLoss,
    SaliencyTrainer,
    SaliencyTrainerMixin,
    UnsupportedTrainerError,
    saliency_regularizer,
)

from .support import (
    TASKS,
    OrderedTrainer,
    PlainTrainer,
    arguments,
    classifier,
    config,
    difference,
    loop_by_hand,
    multi_task,
    rows,
    stacked,
)

#: Of names that older scripts use.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def _removed() -> dict[str, Any]:
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    other = classifier()
    return {"model": other, "regularizer": regularizer}


def _by_hand() -> dict[str, Any]:
    return {"model": classifier(), "regularizer": SaliencyRegularizer(None, tasks=TASKS, strength=0.1, metric="l1")}


def _from_function() -> dict[str, Any]:
    model = classifier()
    return {"model_init": classifier, "regularizer": saliency_regularizer(model, TASKS, strength=0.1, metric="l1")}


@pytest.mark.parametrize(
    ("build", "kind", "text"),
    [
        (lambda: {"model": classifier()}, MissingArgumentError, "needs regularizer="),
        (lambda: {"model": classifier(), "regularizer": 0.1}, WrongTypeError, "found float"),
        (_removed, UnsupportedTrainerError, "attached to another model"),
        (_by_hand, UnsupportedTrainerError, "attached to no model"),
        (_from_function, UnsupportedTrainerError, "model_init builds a new model"),
    ],
)
def test_bad_arguments(build: Any, kind: type[SaliencyRegError], text: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=text):
        SaliencyTrainer(args=arguments(tmp_path), train_dataset=rows(), **build())


def test_a_loss_function_that_is_no_callback(tmp_path: Path) -> None:
    model = classifier()
    saliency = SaliencyLoss(saliency_regularizer(model, TASKS, strength=0.1, metric="l1"))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), compute_loss_func=saliency)
    with pytest.raises(UnsupportedTrainerError, match=r"callbacks=\[saliency\]"):
        trainer.train()


def test_a_trainer_with_a_loss_function_of_its_own(tmp_path: Path) -> None:
    """Both ways call it, and with the same result."""

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total = (outputs.logits - labels).square().sum()
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    models = [classifier(), classifier()]
    first, second = (saliency_regularizer(model, TASKS, strength=0.5, metric="l1") for model in models)
    OrderedTrainer(
        models[0], arguments(tmp_path / "a"), train_dataset=rows(), compute_loss_func=own, regularizer=first
    ).train()
    saliency = SaliencyLoss(second, own)
    PlainTrainer(
        models[1], arguments(tmp_path / "b"), train_dataset=rows(), compute_loss_func=saliency, callbacks=[saliency]
    ).train()
    assert difference(*models) < 1e-12


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (None, "found no labels"),
        ({"joy": torch.ones(2)}, "found a dictionary labels"),
        (torch.ones(2), "must have their shape"),
        (torch.ones(3, dtype=torch.long), "do not fit logits"),
    ],
)
def test_labels_that_fit_no_loss(labels: Any, text: str) -> None:
    model = classifier()
    saliency = SaliencyLoss(saliency_regularizer(model, TASKS, strength=0.1, metric="l1"))
    saliency.is_callback = True
    output = model(**{name: value for name, value in stacked(rows()[:2]).items() if name != "labels"})
    with pytest.raises(LabelError, match=text):
        saliency(output, labels)


def test_engines_that_cannot_be_followed(tmp_path: Path) -> None:
    """Without DeepSpeed here, its mark in the arguments has to do."""
    model = classifier()
    saliency = SaliencyLoss(saliency_regularizer(model, TASKS, strength=0.1, metric="l1"))
    options = arguments(tmp_path)
    options.deepspeed = {"zero_optimization": {"stage": 1}}
    state = transformers.TrainerState()
    with pytest.raises(UnsupportedTrainerError, match="DeepSpeed"):
        saliency.on_train_begin(options, state, None, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    options.deepspeed = None
    with pytest.raises(UnsupportedTrainerError, match="no optimizer"):
        saliency.on_train_begin(options, state, None, optimizer=None)
    options.torch_compile = True
    with pytest.raises(UnsupportedTrainerError, match="torch_compile=True compiles the whole model"):
        saliency.on_train_begin(options, state, None, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    options.torch_compile = False
    options._n_gpu = 2
    with pytest.raises(UnsupportedTrainerError, match="torchrun --nproc_per_node 2"):
        saliency.on_train_begin(options, state, None, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))


def test_a_mean_loss_of_your_own_is_not_added_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels)

    expected, model = classifier(), classifier()
    by_hand, regularizer = (saliency_regularizer(each, TASKS, strength=0.5, metric="l1") for each in (expected, model))
    loop_by_hand(expected, by_hand, rows(), stacked)
    saliency = SaliencyLoss(regularizer, own)
    trainer = PlainTrainer(
        model, arguments(tmp_path), train_dataset=rows(), compute_loss_func=saliency, callbacks=[saliency]
    )
    with caplog.at_level(logging.WARNING, "saliency_reg"):
        trainer.train()
    assert difference(model, expected) < 1e-12
    assert sum("loss_func takes the mean" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("takes_items", [False, True])
def test_a_trainer_that_overrides_compute_loss(takes_items: bool, tmp_path: Path) -> None:
    """With the mixin it works, whether its loss counts or not; a loss function it never calls is told."""

    class Own(PlainTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs = dict(inputs)
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            losses = nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels, reduction="none")
            counted = takes_items and num_items_in_batch is not None
            loss = losses.sum() / num_items_in_batch if counted else losses.mean()
            return (loss, outputs) if return_outputs else loss

    class Mine(SaliencyTrainerMixin, Own):
        pass

    expected, model = classifier(), classifier()
    by_hand, regularizer = (saliency_regularizer(each, TASKS, strength=0.5, metric="l1") for each in (expected, model))
    loop_by_hand(expected, by_hand, rows(), stacked)
    made: Any = Mine
    made(model, arguments(tmp_path / "a"), train_dataset=rows(), regularizer=regularizer).train()
    assert difference(model, expected) < 1e-12
    other = classifier()
    saliency = SaliencyLoss(saliency_regularizer(other, TASKS, strength=0.1, metric="l1"))
    trainer = Own(
        other, arguments(tmp_path / "b"), train_dataset=rows(), compute_loss_func=saliency, callbacks=[saliency]
    )
    with pytest.raises(UnsupportedTrainerError, match="never called SaliencyLoss"):
        trainer.train()


def test_a_first_batch_that_says_nothing(tmp_path: Path) -> None:
    """Without a known label the loss is NaN, and does not tell whether it counts its labels."""

    def built() -> Any:
        torch.manual_seed(0)
        return transformers.BertForTokenClassification(config(problem_type=None)).double()

    data = rows()
    for row in data:
        row["labels"] = torch.randint(3, (7,), generator=torch.Generator().manual_seed(4))
    for row in data[:4]:
        row["labels"] = torch.full((7,), -100)
    model = built()
    regularizer = saliency_regularizer(model, TASKS, strength=0.0, metric="l1")
    trainer = OrderedTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=data, regularizer=regularizer)
    trainer.train()
    assert trainer._means is True


def test_label_smoothing_of_a_multi_task_model_is_refused(tmp_path: Path) -> None:
    model = multi_task()
    with pytest.raises(UnsupportedTrainerError, match="label_smoothing_factor=0.1"):
        SaliencyTrainer(
            model,
            arguments(tmp_path, label_smoothing_factor=0.1),
            train_dataset=rows("tasks"),
            regularizer=model.regularizer(),
        )
