"""A training on emotions in two ways: by the Trainer of transformers, and in a loop with accelerate."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_reg import FeatureSurgery, PCGrad, SaliencyRegularizer
from saliency_reg.integrations.transformers import SaliencyTrainer

from ..data.task_kinds import BINARY
from ..data.texts.emotions import EMOTIONS, RARE, LabelledTexts, emotion_splits, fingerprint
from ..data.texts.tokens import TokenisedTexts
from ..methods.methods import METHODS
from ..models.text_encoders import SMALL, EncoderTasks, small_encoder, tokenizer_of
from ..runtime.errors import OptionError, need
from ..runtime.processes import Ranks
from ..runtime.tables import aligned
from ..training.metrics import TITLES, selection_score, task_scores, with_f1
from ..training.outcome import Outcome
from ..training.train import Data, train
from .by_trainer import run_trainer, trainer_arguments
from .command_line import method_value, single_run_options
from .shell import Pictures, relation_pictures

LOOPS = ("trainer", "accelerate")
_KINDS = dict.fromkeys(EMOTIONS, BINARY)
_IN_TABLE = ("f1", "auc", "precision", "recall")


class EmotionRun:
    """One model on the emotions; a :class:`~recipes.runs.shell.SingleRun`.

    Args:
        options: of the command line.
        ranks: the processes that train.

    Raises:
        RecipeError, SaliencyRegError: what cannot be trained.
    """

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        self._options = options
        self._ranks = ranks
        self._method = METHODS[options.method]
        if options.loop == "trainer":
            _check_trainer(options)
        self._splits = emotion_splits(
            options.data,
            seed=options.seed,
            train_texts=options.train_texts,
            validation_texts=options.validation_texts,
            labelled=options.labelled,
        )
        self._tokenizer = tokenizer_of(options.encoder, self._splits.train.texts, options.vocabulary)
        self._encoder: Any = options.encoder
        if options.encoder == SMALL:
            self._encoder = small_encoder(
                len(self._tokenizer), width=options.width, layers=options.layers, max_length=options.max_length
            )
        else:
            self._build()  # what is wrong with the encoder should leave nothing behind
        self._model: Any = None
        self.data = {"data": fingerprint(options.data)}
        self.more: Mapping[str, Any] = {}

    @property
    def about(self) -> list[str]:
        """Lines on what was found."""
        options, splits = self._options, self._splits
        return [
            f"GoEmotions, {len(EMOTIONS)} tasks: {len(splits.train)} training and {len(splits.validation)} validation "
            f"texts, {len(splits.test)} test texts (the published {splits.test_name} split).",
            f"{self._method.label} on the encoder {options.encoder}, --loop {options.loop}.",
        ]

    def train(self, folder: Path, resume: str) -> dict[str, Any]:
        """Train, and return the figures of the best epoch by validation AUC.

        Raises:
            Terminated: SIGTERM came; a checkpoint was written.
        """
        splits = self._splits
        train_rows, validation, test = map(self._tokenised, (splits.train, splits.validation, splits.test))
        data = Data(_KINDS, train_rows, validation, test)
        outcome = (
            self._by_trainer(data, folder) if self._options.loop == "trainer" else self._loop(data, folder, resume)
        )
        self._model = outcome.model
        outcome.scores, outcome.more = with_f1(outcome.scores, outcome.outputs, outcome.validation_outputs, RARE)
        return outcome.to_dict()

    def table(self, found: Mapping[str, Any]) -> str:
        """Scores of each emotion, the frequent ones first."""

        def shown(values: Mapping[str, float], *names: str) -> list[str]:
            return [f"{values[name]:.4f}" if values[name] == values[name] else "-" for name in names]

        macro = found["macro"]
        counts = dict(zip(EMOTIONS, (self._splits.train.labels == 1).sum(0).tolist()))
        rows = [["emotion", "training texts", *(TITLES.get(name, name) for name in _IN_TABLE)]]
        for task in sorted(EMOTIONS, key=lambda task: -counts[task]):
            rows.append([task, str(counts[task]), *shown(found["scores"][task], *_IN_TABLE)])
        rows.append(["mean", "", *shown(macro, *_IN_TABLE)])
        rows.append([f"mean of {len(RARE)} rare ones", "", *shown(macro, "f1_rare", "auc_rare"), "", ""])
        return (
            f"\nBest weights by validation AUC: epoch {max(found['best_epochs'].values())}. F1 at a probability of "
            f"{macro['threshold']:.2f}, chosen on validation; precision and recall at one half.\n{aligned(rows, left=1)}"
        )

    def save(self, folder: Path) -> None:
        """What ``MultiTaskModel.from_pretrained`` reads, and the tokenizer."""
        self._model.save_pretrained(str(folder))
        self._tokenizer.save_pretrained(str(folder))

    def pictures(self, found: Mapping[str, Any], folder: Path) -> Pictures:  # noqa: ARG002  # they need no model
        """Those of the relations."""
        return relation_pictures(found, EMOTIONS, self._method.label)

    def _tokenised(self, own: LabelledTexts) -> TokenisedTexts:
        return TokenisedTexts(self._tokenizer, own.texts, own.labels, self._options.max_length)

    def _build(self) -> EncoderTasks:
        options = self._options
        hidden = (options.head_width,) if options.head_width else ()
        return EncoderTasks(self._encoder, EMOTIONS, hidden, options.activation)

    def _loop(self, data: Data, folder: Path, resume: str) -> Outcome:
        options = self._options
        outcome = train(
            self._build,
            data,
            self._method,
            method_value(options),
            single_run_options(options),
            folder=folder,
            resume=resume,
            tracked=("go_emotions", {"method": options.method, "seed": options.seed}) if options.trackers else None,
        )
        model: Any = outcome.model
        outcome.model = model.model
        return outcome

    def _by_trainer(self, data: Data, folder: Path) -> Outcome:
        options, method = self._options, self._method
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)
            model: Any = self._build().model
        regularizer: SaliencyRegularizer | None = None
        surgery: FeatureSurgery | None = None
        if method.rule is not None:
            own: dict[str, Any] = {"surgery": None if method.surgery is None else PCGrad()}
            if method.tuned:
                own |= {"strength": method_value(options), "metric": method.metric, "relations": method.rule}
            regularizer = model.regularizer(**own)
        elif method.surgery is not None:
            surgery = FeatureSurgery(model, heads="heads", weighting=PCGrad())
        common: dict[str, Any] = {
            "model": model,
            "args": self._arguments(folder),
            "train_dataset": _rows(data.train),
            "eval_dataset": _rows(data.validation),
            "data_collator": _collate,
            "compute_metrics": _auc,
        }
        trainer: Any = (
            need("transformers").Trainer(**common)
            if regularizer is None
            else SaliencyTrainer(regularizer=regularizer, **common)
        )
        run_trainer(trainer, folder, self._ranks)
        outputs, validation = (_as_columns(trainer.predict(_rows(own))) for own in (data.test, data.validation))
        for attached in (regularizer, surgery):
            if attached is not None:
                attached.remove()
        history = trainer.state.log_history
        looks = [entry for entry in history if "eval_auc" in entry]
        best = max(looks, key=lambda entry: entry["eval_auc"])
        return Outcome(
            model,
            dict.fromkeys(EMOTIONS, round(best["epoch"])),
            best["eval_auc"],
            math.nan,
            task_scores(outputs["outputs"], outputs["labels"], _KINDS),
            _curves(history, looks),
            None if regularizer is None else regularizer.relations.matrix().tolist(),
            outputs,
            validation,
        )

    def _arguments(self, folder: Path) -> Any:
        options = self._options
        return trainer_arguments(
            options,
            folder,
            per_device_train_batch_size=options.batch_size // (options.accumulation * self._ranks.size),
            per_device_eval_batch_size=4 * options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup" if options.decay == "constant" else options.decay,
            warmup_steps=options.warmup_steps,
            max_grad_norm=options.clip_norm or 0.0,
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
        )


def _check_trainer(options: argparse.Namespace) -> None:
    method = METHODS[options.method]
    if method.rule == "authors" or (method.surgery is not None and method.key not in ("pcgrad", "srdml+pcgrad")):
        raise OptionError(f"--loop trainer does not have the method {method.key}. Use --loop accelerate.")
    for name, value in (("pretraining-epochs", options.pretraining_epochs), ("temperature", options.temperature)):
        if value:
            raise OptionError(f"--loop trainer does not have --{name}. Leave it out, or use --loop accelerate.")


def _rows(texts: Any) -> Any:
    """Places in a tokenised split, which the collator turns into a batch at once."""
    return [(texts, row) for row in range(len(texts))]


def _collate(rows: list[tuple[TokenisedTexts, int]]) -> dict[str, Any]:
    tokens, labels = rows[0][0].rows_as_batch([row for _, row in rows])
    return {**tokens, "labels": dict(zip(EMOTIONS, labels.unbind(1)))}


def _as_columns(prediction: Any) -> dict[str, Tensor]:
    return {
        name: torch.stack([torch.as_tensor(by_task[task]).float() for task in EMOTIONS], dim=1)
        for name, by_task in (("outputs", prediction.predictions), ("labels", prediction.label_ids))
    }


def _auc(prediction: Any) -> dict[str, float]:
    split = _as_columns(prediction)
    return {"auc": selection_score(task_scores(split["outputs"], split["labels"], _KINDS), _KINDS)}


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
