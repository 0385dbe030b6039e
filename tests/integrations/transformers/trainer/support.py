"""A tiny classifier, its rows, and the loop by hand that a Trainer has to equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from saliency_reg import SaliencyRegularizer
from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel, SaliencyTrainer

TASKS = ["joy", "anger", "fear"]

RATE = 1e-2


#: 11 micro-batches of 4: the last step of an epoch has 3 of them.
ROWS = 44


def config(**options: Any) -> Any:
    return transformers.BertConfig(
        **{
            "vocab_size": 60,
            "hidden_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "num_labels": 3,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "problem_type": "multi_label_classification",
            **options,
        }
    )


def classifier(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config(**options)).double()


def multi_task() -> Any:
    torch.manual_seed(0)
    heads = {"joy": 1, "topic": 4, "age": HeadConfig(problem="regression")}
    head = HeadConfig(hidden=(6,), dropout=0.0)
    return MultiTaskModel.from_encoder(config(), heads, head=head).double()


def rows(kind: str = "columns") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(ROWS):
        ids = torch.randint(1, 60, (7,), generator=generator)
        values = torch.rand(3, generator=generator, dtype=torch.float64)
        labels: Any = (values > 0.5).double()
        if kind == "classes":
            labels = int(values[0] * 3)
        elif kind == "tasks":
            labels = {"joy": float(values[0] > 0.5), "topic": int(values[1] * 4), "age": float(values[2])}
            labels.pop(["joy", "topic", "age"][number % 3])  # each row lacks one
        found.append({"input_ids": ids, "attention_mask": torch.ones(7, dtype=torch.long), "labels": labels})
    return found


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "num_train_epochs": 2,
            "learning_rate": RATE,
            "weight_decay": 0.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "optim": "adamw_torch",
            "report_to": [],
            "disable_tqdm": True,
            "logging_strategy": "no",
            "save_strategy": "no",
            "use_cpu": True,
            "seed": 3,
            **options,
        },
    )


class InOrder:
    """Batches in the order of the rows."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class PlainTrainer(InOrder, Trainer):
    pass


class OrderedTrainer(InOrder, SaliencyTrainer):
    pass


def loss_of_step(model: Any, output: Any, batch: Any, step: Any) -> Tensor:
    """The part of this micro-batch in the loss of a step, times their number: all labels of a task count alike."""
    if not isinstance(model, MultiTaskModel):
        return output.loss
    total = output.loss * 0
    for task, loss in output.losses.items():
        here, of_all = (sum(int((one["labels"][task] != -100).sum()) for one in own) for own in ([batch], step))
        total = total + model.head_configs[task].weight * loss * here * len(step) / of_all
    return total


def loop_by_hand(
    model: nn.Module, regularizer: SaliencyRegularizer, data: list[dict[str, Any]], collate: Any, epochs: int = 2
) -> None:
    """Micro-batches of 4, steps of at most 4 of them, the mean of each step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    regularizer.attach_optimizer(optimizer)
    batches = [data[first : first + 4] for first in range(0, len(data), 4)]
    for _ in range(epochs):
        for step in [batches[first : first + 4] for first in range(0, len(batches), 4)]:
            optimizer.zero_grad()
            for batch in step:
                output = model(**collate(batch))
                loss = loss_of_step(model, output, collate(batch), [collate(other) for other in step])
                ((loss + regularizer(losses=loss.detach())) / len(step)).backward()
            optimizer.step()


def stacked(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in batch[0]}


def difference(one: nn.Module, other: nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters()))


class Padding:
    """A tokenizer's ``pad``: the rows are equally long."""

    def pad(self, inputs: list[dict[str, Tensor]], return_tensors: str) -> dict[str, Tensor]:
        return stacked(inputs)
