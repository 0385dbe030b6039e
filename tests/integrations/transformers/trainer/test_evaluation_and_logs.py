"""What a Trainer evaluates, logs and measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer

from saliency_reg import PCGrad
from saliency_reg.integrations.transformers import (
    MultiTaskCollator,
    SaliencyLoss,
    SaliencyTrainer,
    saliency_regularizer,
)

from .support import TASKS, OrderedTrainer, arguments, classifier, difference, multi_task, rows

#: Of names that older scripts use.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


@pytest.mark.parametrize("way", ["trainer", "loss function"])
def test_evaluation_prediction_and_saving_are_those_of_trainer(way: str, tmp_path: Path) -> None:
    plain, model = classifier(), classifier()
    regularizer = saliency_regularizer(model, TASKS, strength=0.5, metric="l1")
    saliency = SaliencyLoss(regularizer)
    theirs = Trainer(plain, arguments(tmp_path / "a"), eval_dataset=rows())
    ours: Any = (
        SaliencyTrainer(model, arguments(tmp_path / "b"), eval_dataset=rows(), regularizer=regularizer)
        if way == "trainer"
        else Trainer(
            model,
            arguments(tmp_path / "b"),
            eval_dataset=rows(),
            compute_loss_func=saliency,
            callbacks=[saliency],
        )
    )
    expected, found = theirs.evaluate(), ours.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-12)
    assert set(found) == set(expected)
    assert (ours.predict(rows()).predictions == theirs.predict(rows()).predictions).all()
    assert regularizer.report is None
    ours.save_model(str(tmp_path / "saved"))
    theirs.save_model(str(tmp_path / "theirs"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {path.name for path in (tmp_path / "theirs").iterdir()}
    again = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "saved"))
    assert difference(again, plain) == 0


@pytest.mark.parametrize("way", ["trainer", "loss function"])
def test_logs(way: str, tmp_path: Path) -> None:
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS, strength=0.5, surgery=PCGrad(), metric="l1")
    seen: list[dict[str, float]] = []

    class Tracker(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    options = arguments(tmp_path, logging_strategy="steps", logging_steps=2)
    if way == "trainer":
        trainer: Any = SaliencyTrainer(
            model, options, train_dataset=rows(), callbacks=[Tracker], regularizer=regularizer, log_pairs=1
        )
    else:
        saliency = SaliencyLoss(regularizer, log_pairs=1)
        trainer = Trainer(
            model, options, train_dataset=rows(), compute_loss_func=saliency, callbacks=[saliency, Tracker]
        )
    trainer.train()
    figures = {"saliency/penalty", "saliency/share", "saliency/distance_mean", "saliency/surgery/conflicts"}
    assert figures <= set(seen[0])
    assert figures <= set(trainer.state.log_history[0])
    assert sum(name.startswith("saliency/relation/") for name in seen[0]) == 1
    assert not any(name.startswith("saliency/") for name in seen[-1])  # the summary of the whole run
    json.dumps(trainer.state.log_history)


def test_with_the_best_weights_come_their_relations(tmp_path: Path) -> None:
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS, strength=0.5, metric="l1")
    options = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst is the best here: an early step
    )
    trainer = SaliencyTrainer(model, options, train_dataset=rows(), eval_dataset=rows(), regularizer=regularizer)
    trainer.train()
    best = int(str(trainer.state.best_model_checkpoint).rpartition("-")[2])
    assert best < 6
    assert int(regularizer.steps) == best


def test_measuring_draws_nothing(tmp_path: Path) -> None:
    """With dropout a training with one micro-batch more in its first step draws as it would without the measurement."""
    states = []
    for told in (None, False):
        model = classifier(hidden_dropout_prob=0.3)
        regularizer = saliency_regularizer(model, TASKS, strength=0.0, metric="l1")
        trainer: Any = OrderedTrainer(
            model, arguments(tmp_path, max_steps=1), train_dataset=rows(), regularizer=regularizer
        )
        trainer.loss_is_scaled_for_ga = told  # False: Trainer divides, and nothing is measured
        trainer.train()
        states.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*states))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_losses_of_tasks_are_in_the_logs(size: int, tmp_path: Path) -> None:
    model = multi_task()
    collate = MultiTaskCollator(model)
    options = arguments(
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=16 // size,
        per_device_eval_batch_size=5,
        max_steps=1,
        logging_strategy="steps",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.0,
    )
    data = rows("tasks")[:16]
    trainer = OrderedTrainer(
        model,
        options,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        regularizer=model.regularizer(strength=0.0, metric="l1"),
    )
    trainer.train()
    history = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    with torch.no_grad():
        output = model(**collate(data))
    for task, loss in output.losses.items():
        assert history[f"{task}/loss"] == pytest.approx(float(loss))
        assert history[f"eval_{task}_loss"] == pytest.approx(float(loss))
    assert history["loss"] == pytest.approx(float(output.loss), abs=1e-3)
