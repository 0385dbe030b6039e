"""A training on emotions in two ways: by the Trainer of transformers, and in a loop with accelerate."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_reg import FeatureSurgery, PCGrad, SaliencyRegularizer
from saliency_reg.integrations.transformers import MultiTaskModel, SaliencyTrainer

from ..data.task_kinds import BINARY
from ..data.texts.emotions import EMOTIONS, EmotionSplits, LabelledTexts
from ..data.texts.tokens import TokenisedTexts
from ..methods.methods import METHODS
from ..models.text_encoders import EncoderTasks
from ..runtime.errors import OptionError, need
from ..training.metrics import selection_score, task_scores
from ..training.train import Data, Outcome, train
from .command_line import method_value, single_run_options

__all__ = ["LOOPS", "Training", "processes_started"]

CHECKPOINTS = "checkpoints"
KINDS = dict.fromkeys(EMOTIONS, BINARY)


@dataclass(frozen=True)
class Training:
    """What both loops need.

    Attributes:
        options: of the command line.
        splits: texts and labels.
        tokenizer: of the encoder.
        build: the model, with the same weights for the same seed.
    """

    options: argparse.Namespace
    splits: EmotionSplits
    tokenizer: Any
    build: Callable[[], EncoderTasks]

    def tokenised(self, own: LabelledTexts) -> TokenisedTexts:
        """Token ids of a split."""
        return TokenisedTexts(self.tokenizer, own.texts, own.labels, self.options.max_length)


def with_accelerate(training: Training, folder: Path, resume: str) -> tuple[Outcome, MultiTaskModel]:
    """The loop of :mod:`recipes.training.engine`, as for images."""
    options = training.options
    outcome = train(
        training.build,
        Data(
            KINDS,
            training.tokenised(training.splits.train),
            training.tokenised(training.splits.validation),
            training.tokenised(training.splits.test),
        ),
        METHODS[options.method],
        method_value(options),
        single_run_options(options),
        folder=folder,
        resume=resume,
        tracked=("go_emotions", {"method": options.method, "seed": options.seed}) if options.trackers else None,
    )
    model: Any = outcome.model
    return outcome, model.model


def with_trainer(training: Training, folder: Path, resume: str) -> tuple[Outcome, MultiTaskModel]:
    """``SaliencyTrainer``, or a plain ``Trainer`` for methods without a penalty; the best epoch by validation AUC is kept.

    Raises:
        OptionError: a method or an option that only the other loop has.
    """
    transformers = need("transformers")
    utilities: Any = need("transformers.trainer_utils")
    options = training.options
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.seed)
        model = training.build().model
    regularizer = _regularizer(options, model)
    surgery = FeatureSurgery(model, heads="heads", weighting=PCGrad()) if options.method == "pcgrad" else None
    validation, test = (_Rows(training.tokenised(own)) for own in (training.splits.validation, training.splits.test))
    common: dict[str, Any] = {
        "model": model,
        "args": _arguments(transformers, options, folder),
        "train_dataset": _Rows(training.tokenised(training.splits.train)),
        "eval_dataset": validation,
        "data_collator": _Collator(),
        "compute_metrics": _metrics,
    }
    trainer: Any = (
        transformers.Trainer(**common) if regularizer is None else SaliencyTrainer(regularizer=regularizer, **common)
    )
    latest = utilities.get_last_checkpoint(str(folder / CHECKPOINTS)) if (folder / CHECKPOINTS).is_dir() else None
    trainer.train(resume_from_checkpoint=latest if resume != "never" else None)
    history = trainer.state.log_history
    looks = [entry for entry in history if "eval_auc" in entry]
    best = max(looks, key=lambda entry: entry["eval_auc"])
    outputs, chosen = (_predicted(trainer, own) for own in (test, validation))
    for attached in (regularizer, surgery):
        if attached is not None:
            attached.remove()
    return (
        Outcome(
            model,
            dict.fromkeys(EMOTIONS, round(best["epoch"])),
            best["eval_auc"],
            math.nan,
            task_scores(outputs["outputs"], outputs["labels"], KINDS),
            _curves(history, looks),
            None if regularizer is None else regularizer.relations.matrix().tolist(),
            outputs,
            chosen,
        ),
        model,
    )


LOOPS: Mapping[str, Callable[[Training, Path, str], tuple[Outcome, MultiTaskModel]]] = {
    "trainer": with_trainer,
    "accelerate": with_accelerate,
}


def processes_started() -> int:
    """Of this training, as ``torchrun`` and ``accelerate launch`` tell."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _regularizer(options: argparse.Namespace, model: MultiTaskModel) -> SaliencyRegularizer | None:
    method = METHODS[options.method]
    if method.rule == "authors" or (method.surgery is not None and method.key not in ("pcgrad", "srdml+pcgrad")):
        raise OptionError(f"--loop trainer does not have the method {method.key}. Use --loop accelerate.")
    for name, value in (("pretraining-epochs", options.pretraining_epochs), ("temperature", options.temperature)):
        if value:
            raise OptionError(f"--loop trainer does not have --{name}. Leave it out, or use --loop accelerate.")
    if method.rule is None:
        return None
    regularizer: SaliencyRegularizer = model.regularizer(
        strength=method_value(options),
        metric=method.metric,
        relations=method.rule,
        surgery=PCGrad() if method.surgery is not None else None,
    )
    return regularizer


def _arguments(transformers: Any, options: argparse.Namespace, folder: Path) -> Any:
    processes = processes_started()
    return transformers.TrainingArguments(
        str(folder / CHECKPOINTS),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size // (options.accumulation * processes),
        per_device_eval_batch_size=4 * options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        lr_scheduler_type="constant_with_warmup" if options.decay == "constant" else options.decay,
        warmup_steps=options.warmup_steps,
        max_grad_norm=options.clip_norm or 0.0,
        bf16=options.mixed_precision == "bf16",
        fp16=options.mixed_precision == "fp16",
        seed=options.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="auc",
        logging_strategy="epoch",
        report_to=list(options.trackers),
        dataloader_num_workers=options.data_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        label_names=["labels"],
        remove_unused_columns=False,
    )


class _Rows(torch.utils.data.Dataset[tuple[TokenisedTexts, int]]):
    """Places in a tokenised split, which the collator turns into a batch at once."""

    def __init__(self, texts: TokenisedTexts) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> tuple[TokenisedTexts, int]:
        return self._texts, index


class _Collator:
    """``{"input_ids": [b, L], "attention_mask": [b, L], "labels": {emotion: [b]}}``."""

    def __call__(self, rows: list[tuple[TokenisedTexts, int]]) -> dict[str, Any]:
        tokens, labels = rows[0][0].rows_as_batch([index for _, index in rows])
        return {**tokens, "labels": dict(zip(EMOTIONS, labels.unbind(1)))}


def _as_columns(by_task: Any) -> Tensor:
    return torch.stack([torch.as_tensor(by_task[task]).float() for task in EMOTIONS], dim=1)


def _metrics(prediction: Any) -> dict[str, float]:
    logits, labels = (_as_columns(own) for own in (prediction.predictions, prediction.label_ids))
    return {"auc": selection_score(task_scores(logits, labels, KINDS), KINDS)}


def _predicted(trainer: Any, rows: _Rows) -> dict[str, Tensor]:
    found = trainer.predict(rows)
    return {"outputs": _as_columns(found.predictions), "labels": _as_columns(found.label_ids)}


def _curves(history: list[dict[str, Any]], looks: list[dict[str, Any]]) -> dict[str, list[float]]:
    losses = [entry for entry in history if "loss" in entry]
    curves = {
        "epoch": [entry["epoch"] for entry in looks],
        "training_loss": [entry["loss"] / len(EMOTIONS) for entry in losses][: len(looks)],
        "validation_score": [entry["eval_auc"] for entry in looks],
    }
    for name, key in (("penalty_share", "saliency/share"), ("conflicts", "saliency/surgery/conflicts")):
        if losses and all(key in entry for entry in losses):
            curves[name] = [entry[key] for entry in losses]
    return curves
