"""Steps of a Trainer against a loop by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.integrations.transformers import (
    MultiTaskCollator,
    SaliencyLoss,
    SaliencyTrainer,
    SaliencyTrainerMixin,
    UnsupportedTrainerError,
    saliency_regularizer,
)
from saliency_reg.integrations.transformers.trainer.task_losses import label_counts

from .support import (
    RATE,
    TASKS,
    OrderedTrainer,
    Padding,
    PlainTrainer,
    arguments,
    classifier,
    config,
    difference,
    loop_by_hand,
    loss_of_step,
    multi_task,
    rows,
    stacked,
)

#: Of names that older scripts use.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def same_relations(one: SaliencyRegularizer, other: SaliencyRegularizer, tolerance: float = 1e-9) -> bool:
    return torch.allclose(one.relations.matrix(), other.relations.matrix(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("surgery", [None, PCGrad])
@pytest.mark.parametrize("way", ["trainer", "loss function", "mixin"])
def test_accumulation_is_that_of_a_loop_by_hand(way: str, surgery: Any, tmp_path: Path) -> None:
    def attached(model: nn.Module) -> SaliencyRegularizer:
        return saliency_regularizer(model, TASKS, strength=0.5, surgery=surgery and surgery(), metric="l1")

    expected = classifier()
    by_hand = attached(expected)
    loop_by_hand(expected, by_hand, rows(), stacked)
    model = classifier()
    regularizer = attached(model)
    common: dict[str, Any] = {"model": model, "args": arguments(tmp_path), "train_dataset": rows()}
    trainer: Any
    if way == "trainer":
        trainer = OrderedTrainer(regularizer=regularizer, **common)
    elif way == "loss function":
        saliency = SaliencyLoss(regularizer)
        trainer = PlainTrainer(compute_loss_func=saliency, callbacks=[saliency], **common)
    else:

        class Mine(SaliencyTrainerMixin, PlainTrainer):
            pass

        made: Any = Mine
        trainer = made(regularizer=regularizer, **common)
    trainer.train()
    assert difference(model, expected) < 1e-12
    assert difference(model, classifier()) > 1e-3
    assert same_relations(regularizer, by_hand)
    assert int(regularizer.relations.updates) == 6


@pytest.mark.parametrize("target", ["output", "loss"])
def test_a_multi_task_model_with_missing_labels(target: str, tmp_path: Path) -> None:
    expected = multi_task()
    by_hand = expected.regularizer(strength=0.5, target=target, metric="l1")
    collate = MultiTaskCollator(expected, Padding())

    def loss_aware(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(batch)

    if target == "output":
        loop_by_hand(expected, by_hand, rows("tasks"), loss_aware)
    else:
        loop_with_sample_losses(expected, by_hand, rows("tasks"), loss_aware)
    model = multi_task()
    regularizer = model.regularizer(strength=0.5, target=target, metric="l1")
    trainer = OrderedTrainer(
        model,
        arguments(tmp_path),
        train_dataset=rows("tasks"),
        data_collator=collate,
        regularizer=regularizer,
    )
    trainer.train()
    assert difference(model, expected) < 1e-12
    assert same_relations(regularizer, by_hand)


def loop_with_sample_losses(model: Any, regularizer: SaliencyRegularizer, data: Any, collate: Any) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    regularizer.attach_optimizer(optimizer)
    batches = [collate(data[first : first + 4]) for first in range(0, len(data), 4)]
    for _ in range(2):
        for step in [batches[first : first + 4] for first in range(0, len(batches), 4)]:
            optimizer.zero_grad()
            for batch in step:
                output = model(**batch)
                losses = model.sample_losses(output.logits, batch["labels"])
                ((loss_of_step(model, output, batch, step) + regularizer(losses=losses)) / len(step)).backward()
            optimizer.step()


class Counting(transformers.BertForTokenClassification):
    """A loss that is a sum over ``num_items_in_batch``, as those of language models are."""

    def forward(self, labels: Tensor | None = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        if labels is not None:
            output.loss = nn.functional.cross_entropy(
                output.logits.flatten(0, 1), labels.flatten(), reduction="sum" if num_items_in_batch else "mean"
            ) / (num_items_in_batch or 1)
        return output

    accepts_loss_kwargs = True


def test_a_loss_that_counts_its_labels_is_left_as_it_is(tmp_path: Path) -> None:
    """With strength 0 all is as in a plain Trainer."""

    def built() -> Any:
        torch.manual_seed(0)
        return Counting(config(problem_type=None)).double()

    data = rows()
    generator = torch.Generator().manual_seed(4)
    for row in data:
        row["labels"] = torch.randint(3, (7,), generator=generator)
        row["labels"][: int(torch.randint(1, 6, (), generator=generator))] = -100
    plain, model = built(), built()
    named = {"remove_unused_columns": False, "label_names": ["labels"]}
    PlainTrainer(plain, arguments(tmp_path / "a", **named), train_dataset=data).train()
    regularizer = saliency_regularizer(model, TASKS, strength=0.0, metric="l1")
    trainer = OrderedTrainer(model, arguments(tmp_path / "b", **named), train_dataset=data, regularizer=regularizer)
    trainer.train()
    assert trainer._means is False  # measured: it is a sum over all labels of the step
    assert difference(plain, model) == 0


def test_with_one_micro_batch_and_strength_0_it_is_trainer(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 1, "max_grad_norm": 1.0}
    plain, model = (classifier(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1) for _ in range(2))
    Trainer(plain, arguments(tmp_path / "a", **options), train_dataset=rows()).train()
    regularizer = saliency_regularizer(model, TASKS, strength=0.0, metric="l1")
    SaliencyTrainer(model, arguments(tmp_path / "b", **options), train_dataset=rows(), regularizer=regularizer).train()
    assert difference(plain, model) == 0


def test_means_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    trainer = SaliencyTrainer(model, arguments(tmp_path), train_dataset=rows(), regularizer=regularizer)
    with caplog.at_level(logging.WARNING, "saliency_reg"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "accepts num_items_in_batch" in record.getMessage()]
    assert len(said) == 1
    assert "adds up the 4 of a step" in said[0]


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_with_other_options_of_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    model = classifier().float()
    regularizer = saliency_regularizer(model, TASKS, strength=0.5, surgery=PCGrad(), metric="l1")
    data = [{**row, "labels": row["labels"].float()} for row in rows()]
    trainer = SaliencyTrainer(model, arguments(tmp_path, **options), train_dataset=data, regularizer=regularizer)
    trainer.train()
    plain = classifier().float()
    expected = saliency_regularizer(plain, TASKS, strength=0.5, surgery=PCGrad(), metric="l1")
    SaliencyTrainer(plain, arguments(tmp_path), train_dataset=data, regularizer=expected).train()
    assert same_relations(regularizer, expected, 2e-2)
    assert difference(model, plain) < (5e-2 if "bf16" in options else 1e-6)


def test_classes(tmp_path: Path) -> None:
    model = classifier(problem_type="single_label_classification")
    regularizer = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    saliency = SaliencyLoss(regularizer)
    data = rows("classes")
    trainer = PlainTrainer(
        model, arguments(tmp_path / "a"), train_dataset=data, compute_loss_func=saliency, callbacks=[saliency]
    )
    trainer.train()
    other = classifier(problem_type="single_label_classification")
    again = saliency_regularizer(other, TASKS, strength=0.1, metric="l1")
    OrderedTrainer(other, arguments(tmp_path / "b"), train_dataset=data, regularizer=again).train()
    assert difference(model, other) < 1e-12


def test_micro_batches_of_a_run_that_skips_no_data(tmp_path: Path) -> None:
    """Resumed in the middle of an epoch with ``ignore_data_skip``, a Trainer begins a whole epoch."""

    def built() -> tuple[Any, SaliencyLoss]:
        model = classifier()
        return model, SaliencyLoss(saliency_regularizer(model, TASKS, strength=0.1, metric="l1"))

    model, saliency = built()
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    PlainTrainer(
        model, arguments(tmp_path, **options), train_dataset=rows(), compute_loss_func=saliency, callbacks=[saliency]
    ).train()
    model, saliency = built()
    seen: list[tuple[int, int]] = []

    class Look(transformers.TrainerCallback):
        trainer: Any = None

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append((saliency.micro_batches, self.trainer.current_gradient_accumulation_steps))

    look = Look()
    trainer = PlainTrainer(
        model,
        arguments(tmp_path, ignore_data_skip=True, num_train_epochs=2),
        train_dataset=rows(),
        compute_loss_func=saliency,
        callbacks=[saliency, look],
    )
    look.trainer = trainer
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len({real for _, real in seen}) == 2
    assert all(ours == real for ours, real in seen)


def test_on_another_model(tmp_path: Path) -> None:
    other = classifier()
    saliency = SaliencyLoss(saliency_regularizer(other, TASKS, strength=0.1, metric="l1"))
    trainer = Trainer(
        classifier(), arguments(tmp_path), train_dataset=rows(), compute_loss_func=saliency, callbacks=[saliency]
    )
    with pytest.raises(UnsupportedTrainerError, match="attached to another model"):
        trainer.train()


@pytest.mark.parametrize("way", ["mixin", "loss function"])
def test_without_a_count_of_labels_a_loss_is_a_mean(way: str, tmp_path: Path) -> None:
    """Trainer cannot count labels in a dictionary, and divides nothing where there is a ``compute_loss_func``."""
    found = []
    for accumulation in (1, 4):
        model = multi_task()
        regularizer = model.regularizer(strength=0.5, metric="l1")

        def own(outputs: Any, labels: Any, num_items_in_batch: Any = None, model: Any = model) -> Tensor:
            assert num_items_in_batch is None
            return torch.stack([losses.mean() for losses in model.sample_losses(outputs.logits, labels).values()]).sum()

        options: dict[str, Any] = {
            "model": model,
            "args": arguments(
                tmp_path / f"{accumulation}",
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
            ),
            # All labels are there, so that the mean over 8 is that of the means over 2.
            "train_dataset": [{**row, "labels": {"joy": 1.0, "topic": 2, "age": 0.3}} for row in rows()[:40]],
            "data_collator": MultiTaskCollator(model, Padding()),
        }
        if way == "mixin":
            OrderedTrainer(regularizer=regularizer, compute_loss_func=own, **options).train()
        else:
            saliency = SaliencyLoss(regularizer, own)
            PlainTrainer(compute_loss_func=saliency, callbacks=[saliency], **options).train()
        found.append(model)
    assert difference(*found) < 1e-9


META = torch.device("meta")


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_labels_are_counted_where_the_model_is(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some batches lack a task, or all labels; the meta device stands in for that of a GPU, labels come from either."""
    model = multi_task()
    trainer = SaliencyTrainer(
        model,
        arguments(tmp_path),
        regularizer=model.regularizer(strength=0.1, metric="l1"),
        train_dataset=rows("tasks"),
    )
    device = type(trainer.accelerator).device
    monkeypatch.setattr(type(trainer.accelerator), "device", property(lambda _: META))
    labels = {"joy": torch.ones(4), "topic": torch.tensor([0, 1, -100, 2])}
    on = {task: own.to(where) for task, own in labels.items()}
    batches = [{"labels": on}, {"labels": {"joy": on["joy"]}}, {"labels": {}}, {}]
    trainer.get_batch_samples(iter(batches), 4, META)
    assert trainer._labels_of_step.device == META
    assert label_counts(on, ["joy", "topic", "age"], META).device == META
    monkeypatch.setattr(type(trainer.accelerator), "device", device)
    if where == "cpu":
        trainer.get_batch_samples(iter(batches), 4, torch.device("cpu"))
        assert trainer._labels_of_step.tolist() == [8, 3, 0]
