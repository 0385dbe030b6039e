"""The Trainer against loops by hand, and its checkpoints, logs and evaluation."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.errors import MissingArgumentError, SaliencyRegError, StateMismatchError, WrongTypeError
from saliency_reg.integrations.transformers import (
    HeadConfig,
    LabelError,
    MultiTaskCollator,
    MultiTaskModel,
    SaliencyLoss,
    SaliencyTrainer,
    SaliencyTrainerMixin,
    UnsupportedTrainerError,
    saliency_regularizer,
)
from saliency_reg.integrations.transformers.trainer.task_losses import label_counts
from tests.support.paths import ROOT

TASKS = ["joy", "anger", "fear"]
RATE = 1e-2
#: 11 micro-batches of 4: the last step of an epoch has 3 of them.
ROWS = 44

#: Of names that older scripts use.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


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


def same_relations(one: SaliencyRegularizer, other: SaliencyRegularizer, tolerance: float = 1e-9) -> bool:
    return torch.allclose(one.relations.matrix(), other.relations.matrix(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("surgery", [None, PCGrad])
@pytest.mark.parametrize("way", ["trainer", "loss function", "mixin"])
def test_accumulation_is_that_of_a_loop_by_hand(way: str, surgery: Any, tmp_path: Path) -> None:
    def attached(model: nn.Module) -> SaliencyRegularizer:
        return saliency_regularizer(model, TASKS, strength=0.5, surgery=surgery and surgery())

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
    by_hand = expected.regularizer(strength=0.5, target=target)
    collate = MultiTaskCollator(expected, Padding())

    def loss_aware(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(batch)

    if target == "output":
        loop_by_hand(expected, by_hand, rows("tasks"), loss_aware)
    else:
        loop_with_sample_losses(expected, by_hand, rows("tasks"), loss_aware)
    model = multi_task()
    regularizer = model.regularizer(strength=0.5, target=target)
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


class Padding:
    """A tokenizer's ``pad``: the rows are equally long."""

    def pad(self, inputs: list[dict[str, Tensor]], return_tensors: str) -> dict[str, Tensor]:
        return stacked(inputs)


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
    regularizer = saliency_regularizer(model, TASKS, strength=0.0)
    trainer = OrderedTrainer(model, arguments(tmp_path / "b", **named), train_dataset=data, regularizer=regularizer)
    trainer.train()
    assert trainer._means is False  # measured: it is a sum over all labels of the step
    assert difference(plain, model) == 0


def test_with_one_micro_batch_and_strength_0_it_is_trainer(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 1, "max_grad_norm": 1.0}
    plain, model = (classifier(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1) for _ in range(2))
    Trainer(plain, arguments(tmp_path / "a", **options), train_dataset=rows()).train()
    regularizer = saliency_regularizer(model, TASKS, strength=0.0)
    SaliencyTrainer(model, arguments(tmp_path / "b", **options), train_dataset=rows(), regularizer=regularizer).train()
    assert difference(plain, model) == 0


def test_means_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS)
    trainer = SaliencyTrainer(model, arguments(tmp_path), train_dataset=rows(), regularizer=regularizer)
    with caplog.at_level(logging.WARNING, "saliency_reg"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "accepts num_items_in_batch" in record.getMessage()]
    assert len(said) == 1
    assert "adds up the 4 of a step" in said[0]


@pytest.mark.parametrize("way", ["trainer", "loss function"])
def test_evaluation_prediction_and_saving_are_those_of_trainer(way: str, tmp_path: Path) -> None:
    plain, model = classifier(), classifier()
    regularizer = saliency_regularizer(model, TASKS, strength=0.5)
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
    regularizer = saliency_regularizer(model, TASKS, strength=0.5, surgery=PCGrad())
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


def test_resumed_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def run(folder: Path, **options: Any) -> tuple[nn.Module, SaliencyRegularizer]:
        model = classifier(hidden_dropout_prob=0.1)
        regularizer = saliency_regularizer(model, TASKS, strength=0.5, surgery=PCGrad())
        settings = arguments(folder, save_strategy="steps", save_steps=2, **options.pop("settings", {}))
        trainer = SaliencyTrainer(model, settings, train_dataset=rows(), regularizer=regularizer)
        trainer.train(**options)
        return model, regularizer

    whole, expected = run(tmp_path / "whole")
    model, regularizer = run(tmp_path / "whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert difference(model, whole) == 0
    assert all(torch.equal(one, other) for one, other in zip(regularizer.buffers(), expected.buffers()))
    assert int(regularizer.steps) == 6


#: A training in a process of its own, which is killed in the middle of its fourth step.
SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch, transformers
from tests.integrations.transformers.trainer.test_trainer import TASKS, arguments, classifier, rows
from saliency_reg.integrations.transformers import SaliencyLoss, saliency_regularizer

class Kill(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

folder, what = Path(sys.argv[1]), sys.argv[2]
model = classifier(hidden_dropout_prob=0.1)
regularizer = saliency_regularizer(model, TASKS, strength=0.5)
saliency = SaliencyLoss(regularizer)
callbacks = [saliency, Kill()] if what == "kill" else [saliency]
options = arguments(folder, save_strategy="steps", save_steps=1)
trainer = transformers.Trainer(model, options, train_dataset=rows(), compute_loss_func=saliency, callbacks=callbacks)
trainer.train(resume_from_checkpoint=what == "resume" or None)
torch.save([model.state_dict(), regularizer.state_dict()], folder / "end.pt")
"""


def test_killed_and_resumed(tmp_path: Path) -> None:

    def start(folder: str, what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / folder), what, str(ROOT)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert start("killed", "kill").returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "end.pt").exists()
    for folder, what in (("killed", "resume"), ("whole", "run")):
        done = start(folder, what)
        assert done.returncode == 0, done.stderr
    killed, whole = (torch.load(tmp_path / folder / "end.pt") for folder in ("killed", "whole"))
    for one, other in zip(killed, whole):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_the_other_way_is_taken(tmp_path: Path) -> None:
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS)
    options = arguments(tmp_path, save_strategy="steps", save_steps=3, max_steps=3)
    SaliencyTrainer(model, options, train_dataset=rows(), regularizer=regularizer).train()
    other = classifier()
    again = saliency_regularizer(other, TASKS)
    saliency = SaliencyLoss(again)
    more = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    trainer = Trainer(other, more, train_dataset=rows(), compute_loss_func=saliency, callbacks=[saliency])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert int(again.steps) == 4
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [name for name in state["stateful_callbacks"] if "Saliency" in name] == ["SaliencyLoss"]


def test_a_checkpoint_without_our_state_is_refused(tmp_path: Path) -> None:
    plain = classifier()
    Trainer(plain, arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=rows()).train()
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS)
    trainer = SaliencyTrainer(model, arguments(tmp_path), train_dataset=rows(), regularizer=regularizer)
    with pytest.raises(UnsupportedTrainerError, match="no state of a SaliencyRegularizer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_state_of_other_tasks_is_refused(tmp_path: Path) -> None:
    model = classifier()
    options = arguments(tmp_path, save_strategy="steps", save_steps=2)
    SaliencyTrainer(model, options, train_dataset=rows(), regularizer=saliency_regularizer(model, TASKS)).train()
    other = classifier()
    regularizer = saliency_regularizer(other, ["x", "y", "z"])
    trainer = SaliencyTrainer(other, options, train_dataset=rows(), regularizer=regularizer)
    with pytest.raises(StateMismatchError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_rebuilt_callbacks_are_refused(tmp_path: Path) -> None:
    model = classifier()
    options = arguments(tmp_path, save_strategy="steps", save_steps=2, restore_callback_states_from_checkpoint=True)
    SaliencyTrainer(model, options, train_dataset=rows(), regularizer=saliency_regularizer(model, TASKS)).train()
    other = classifier()
    trainer = SaliencyTrainer(other, options, train_dataset=rows(), regularizer=saliency_regularizer(other, TASKS))
    with pytest.raises(UnsupportedTrainerError, match="restore_callback_states_from_checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_with_other_options_of_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    model = classifier().float()
    regularizer = saliency_regularizer(model, TASKS, strength=0.5, surgery=PCGrad())
    data = [{**row, "labels": row["labels"].float()} for row in rows()]
    trainer = SaliencyTrainer(model, arguments(tmp_path, **options), train_dataset=data, regularizer=regularizer)
    trainer.train()
    plain = classifier().float()
    expected = saliency_regularizer(plain, TASKS, strength=0.5, surgery=PCGrad())
    SaliencyTrainer(plain, arguments(tmp_path), train_dataset=data, regularizer=expected).train()
    assert same_relations(regularizer, expected, 2e-2)
    assert difference(model, plain) < (5e-2 if "bf16" in options else 1e-6)


def test_classes(tmp_path: Path) -> None:
    model = classifier(problem_type="single_label_classification")
    regularizer = saliency_regularizer(model, TASKS)
    saliency = SaliencyLoss(regularizer)
    data = rows("classes")
    trainer = PlainTrainer(
        model, arguments(tmp_path / "a"), train_dataset=data, compute_loss_func=saliency, callbacks=[saliency]
    )
    trainer.train()
    other = classifier(problem_type="single_label_classification")
    again = saliency_regularizer(other, TASKS)
    OrderedTrainer(other, arguments(tmp_path / "b"), train_dataset=data, regularizer=again).train()
    assert difference(model, other) < 1e-12


def _removed() -> dict[str, Any]:
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS)
    other = classifier()
    return {"model": other, "regularizer": regularizer}


def _by_hand() -> dict[str, Any]:
    return {"model": classifier(), "regularizer": SaliencyRegularizer(None, tasks=TASKS)}


def _from_function() -> dict[str, Any]:
    model = classifier()
    return {"model_init": classifier, "regularizer": saliency_regularizer(model, TASKS)}


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
    saliency = SaliencyLoss(saliency_regularizer(model, TASKS))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), compute_loss_func=saliency)
    with pytest.raises(UnsupportedTrainerError, match=r"callbacks=\[saliency\]"):
        trainer.train()


def test_a_trainer_with_a_loss_function_of_its_own(tmp_path: Path) -> None:
    """Both ways call it, and with the same result."""

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total = (outputs.logits - labels).square().sum()
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    models = [classifier(), classifier()]
    first, second = (saliency_regularizer(model, TASKS, strength=0.5) for model in models)
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
    saliency = SaliencyLoss(saliency_regularizer(model, TASKS))
    saliency.is_callback = True
    output = model(**{name: value for name, value in stacked(rows()[:2]).items() if name != "labels"})
    with pytest.raises(LabelError, match=text):
        saliency(output, labels)


def test_engines_that_cannot_be_followed(tmp_path: Path) -> None:
    """Without DeepSpeed here, its mark in the arguments has to do."""
    model = classifier()
    saliency = SaliencyLoss(saliency_regularizer(model, TASKS))
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
    by_hand, regularizer = (saliency_regularizer(each, TASKS, strength=0.5) for each in (expected, model))
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
    by_hand, regularizer = (saliency_regularizer(each, TASKS, strength=0.5) for each in (expected, model))
    loop_by_hand(expected, by_hand, rows(), stacked)
    made: Any = Mine
    made(model, arguments(tmp_path / "a"), train_dataset=rows(), regularizer=regularizer).train()
    assert difference(model, expected) < 1e-12
    other = classifier()
    saliency = SaliencyLoss(saliency_regularizer(other, TASKS))
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
    regularizer = saliency_regularizer(model, TASKS, strength=0.0)
    trainer = OrderedTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=data, regularizer=regularizer)
    trainer.train()
    assert trainer._means is True


def test_with_the_best_weights_come_their_relations(tmp_path: Path) -> None:
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS, strength=0.5)
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


def test_micro_batches_of_a_run_that_skips_no_data(tmp_path: Path) -> None:
    """Resumed in the middle of an epoch with ``ignore_data_skip``, a Trainer begins a whole epoch."""

    def built() -> tuple[Any, SaliencyLoss]:
        model = classifier()
        return model, SaliencyLoss(saliency_regularizer(model, TASKS))

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
    saliency = SaliencyLoss(saliency_regularizer(other, TASKS))
    trainer = Trainer(
        classifier(), arguments(tmp_path), train_dataset=rows(), compute_loss_func=saliency, callbacks=[saliency]
    )
    with pytest.raises(UnsupportedTrainerError, match="attached to another model"):
        trainer.train()


def test_label_smoothing_of_a_multi_task_model_is_refused(tmp_path: Path) -> None:
    model = multi_task()
    with pytest.raises(UnsupportedTrainerError, match="label_smoothing_factor=0.1"):
        SaliencyTrainer(
            model,
            arguments(tmp_path, label_smoothing_factor=0.1),
            train_dataset=rows("tasks"),
            regularizer=model.regularizer(),
        )


def test_measuring_draws_nothing(tmp_path: Path) -> None:
    """With dropout a training with one micro-batch more in its first step draws as it would without the measurement."""
    states = []
    for told in (None, False):
        model = classifier(hidden_dropout_prob=0.3)
        regularizer = saliency_regularizer(model, TASKS, strength=0.0)
        trainer: Any = OrderedTrainer(
            model, arguments(tmp_path, max_steps=1), train_dataset=rows(), regularizer=regularizer
        )
        trainer.loss_is_scaled_for_ga = told  # False: Trainer divides, and nothing is measured
        trainer.train()
        states.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*states))


@pytest.mark.parametrize("way", ["mixin", "loss function"])
def test_without_a_count_of_labels_a_loss_is_a_mean(way: str, tmp_path: Path) -> None:
    """Trainer cannot count labels in a dictionary, and divides nothing where there is a ``compute_loss_func``."""
    found = []
    for accumulation in (1, 4):
        model = multi_task()
        regularizer = model.regularizer(strength=0.5)

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
        regularizer=model.regularizer(strength=0.0),
    )
    trainer.train()
    history = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    with torch.no_grad():
        output = model(**collate(data))
    for task, loss in output.losses.items():
        assert history[f"{task}/loss"] == pytest.approx(float(loss))
        assert history[f"eval_{task}_loss"] == pytest.approx(float(loss))
    assert history["loss"] == pytest.approx(float(output.loss), abs=1e-3)


META = torch.device("meta")


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_labels_are_counted_where_the_model_is(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some batches lack a task, or all labels; the meta device stands in for that of a GPU, labels come from either."""
    model = multi_task()
    trainer = SaliencyTrainer(
        model, arguments(tmp_path), regularizer=model.regularizer(strength=0.1), train_dataset=rows("tasks")
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
