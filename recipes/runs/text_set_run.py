"""One training on several sets of texts, from checked options to its figures."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.integrations.transformers import MultiTaskCollator

from ..data.fingerprints import fingerprint_of
from ..data.texts.task_batches import SetExamples, TaskBatches
from ..data.texts.text_sets import TextSet
from ..models.set_model import build_model, check_inputs, encode, fitting_tokenizer
from ..models.text_encoders import SMALL
from ..runtime.errors import OptionError, need
from ..runtime.files import machine, versions, write_json
from ..runtime.termination import Terminated, deferred
from .by_trainer import Examined, SetTrainer, latest_checkpoint, scores_on

__all__ = ["CHECKPOINTS", "DEFAULT_STRENGTH", "METHODS", "OWN_OF_SMALL", "SetRun"]

CHECKPOINTS = "checkpoints"
DEFAULT_STRENGTH = 0.01
#: Options that only the small encoder has.
OWN_OF_SMALL = {"width": 128, "layers": 2, "vocabulary": 8000}


@dataclass(frozen=True)
class _Method:
    label: str
    penalty: bool
    surgery: bool


METHODS = {
    "hard_sharing": _Method("hard sharing", penalty=False, surgery=False),
    "srdml": _Method("SRDML", penalty=True, surgery=False),
    "pcgrad": _Method("PCGrad (feature)", penalty=False, surgery=True),
    "srdml+pcgrad": _Method("SRDML w/ PCGrad (feature)", penalty=True, surgery=True),
}


class SetRun:
    """Model and data of one training.

    Args:
        options: of the command line.
        sets: at least two.

    Raises:
        RecipeError, SaliencyRegError: what cannot be trained.
    """

    def __init__(self, options: argparse.Namespace, sets: Sequence[TextSet]) -> None:
        self._options = options
        self._sets = sets
        self._method = METHODS[options.method]
        small = {name: getattr(options, name) or default for name, default in OWN_OF_SMALL.items()}
        name = options.tokenizer or options.encoder
        self._tokenizer = fitting_tokenizer(name, sets, small["vocabulary"])
        length = options.max_length
        if length > self._tokenizer.model_max_length:
            most = self._tokenizer.model_max_length
            raise OptionError(f"the tokenizer of {name} ends at {most} tokens. Use --max-length {most} or less.")
        self.model = build_model(
            options.encoder,
            sets,
            self._tokenizer,
            head_width=options.head_width,
            width=small["width"],
            layers=small["layers"],
            max_length=length,
            seed=options.seed,
        )
        self._collate = MultiTaskCollator(self.model, self._tokenizer)
        self._encodings = {
            own.name: {split: encode(self._tokenizer, rows, length) for split, rows in own.splits.items()}
            for own in sets
        }
        everything = [row for own in self._encodings.values() for rows in own.values() for row in rows]
        check_inputs(self.model, self._tokenizer, everything, self._collate)
        given = options.strength
        self.regularizer: SaliencyRegularizer = self.model.regularizer(
            # At 0 the relations are only watched: no gradient of the penalty is taken.
            strength=0.0 if not self._method.penalty else DEFAULT_STRENGTH if given is None else given,
            metric=options.metric,
            surgery=PCGrad(options.seed) if self._method.surgery else None,
        )
        # Whatever has seen the labels that are reported cannot choose a step.
        self._chooses = all({"validation", "test"} <= set(own.splits) for own in sets)
        self._batches = TaskBatches(
            [len(own.splits["train"]) for own in sets], options.batch_size, options.sampling_exponent, options.seed
        )

    @property
    def fingerprint(self) -> str:
        """Of the data."""
        rows = [own.splits[split] for own in self._sets for split in sorted(own.splits)]
        texts = [text for own in rows for text in (*own.texts, *(own.pairs or ()))]
        return fingerprint_of(*(own.labels for own in rows), texts=texts)

    @property
    def about(self) -> list[str]:
        """Lines on what was found."""
        lines = []
        for own, quota in zip(self._sets, self._batches.quotas):
            kind = f"{own.kind.classes} classes" if own.kind.name == "classes" else "number"
            sizes = ", ".join(f"{len(rows)} {split}" for split, rows in own.splits.items())
            texts = " + ".join(own.columns[:-1])
            lines.append(
                f"{own.name} ({kind}): {sizes} texts; {texts} -> {own.columns[-1]}; {quota} batches in an epoch."
                + (f" No labels in: {', '.join(own.unlabelled)}." if own.unlabelled else "")
                + (f" {own.left_out} rows without a text or a label were left out." if own.left_out else "")
            )
        return [*lines, f"{self._method.label} on {self._options.encoder}."]

    def head(self) -> dict[str, Any]:
        """What ``results.json`` says from the beginning on."""
        return {
            "options": {
                name: value for name, value in vars(self._options).items() if name not in ("out", "name", "resume")
            },
            "versions": versions(),
            "machine": machine(),
            "fingerprint": self.fingerprint,
            "sets": {
                own.name: {
                    "source": own.source,
                    "columns": list(own.columns),
                    "kind": own.kind.to_dict(),
                    "classes": list(own.classes),
                    "rows": {split: len(rows) for split, rows in own.splits.items()},
                    "unlabelled": list(own.unlabelled),
                    "left_out": own.left_out,
                    "reported": own.reported,
                    "batches_per_epoch": quota,
                }
                for own, quota in zip(self._sets, self._batches.quotas)
            },
        }

    def run(self, folder: Path) -> dict[str, Any]:
        """Train, from the latest checkpoint if there is one, and return the figures.

        Raises:
            Terminated: after a checkpoint, if SIGTERM has come.
        """
        place = folder / CHECKPOINTS
        with deferred() as requested:
            trainer = SetTrainer(
                model=self.model,
                args=self._arguments(place),
                train_dataset=SetExamples(
                    {name: own["train"] for name, own in self._encodings.items()},
                    {own.name: self._labels(own) for own in self._sets},
                ),
                data_collator=self._collate,
                regularizer=self.regularizer,
                batches=self._batches,
                examined=self._examined("validation"),
                stops=requested,
            )
            checkpoint = latest_checkpoint(place)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if trainer.state.global_step < trainer.state.max_steps:
                raise Terminated
        state = trainer.state
        chosen = state.best_global_step if self._chooses and state.best_model_checkpoint else state.global_step
        reported = {own.name: self._examined(own.reported)[own.name] for own in self._sets}
        return {
            "steps": state.global_step,
            "chosen_step": chosen,
            "chosen_by": "validation" if self._chooses else "last step",
            "scores": scores_on(self.model, reported, self._collate, 4 * self._options.batch_size),
            "relations": self.regularizer.relations.matrix().tolist(),
            "tasks": list(self.model.tasks),
            "validation": [
                {"step": entry["step"], **{name: value for name, value in entry.items() if name.startswith("eval_")}}
                for entry in state.log_history
                if "eval_score" in entry
            ],
        }

    def save(self, folder: Path) -> None:
        """What ``MultiTaskModel.from_pretrained`` reads, the tokenizer, and what the outputs mean."""
        self.model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        # Numbers are predicted as (label - mean) / spread.
        kinds = {own.name: {**own.kind.to_dict(), "names": list(own.classes)} for own in self._sets}
        write_json(folder / "tasks.json", kinds)

    def _labels(self, own: TextSet) -> list[Any]:
        labels = own.splits["train"].labels
        if own.kind.name == "number":
            return ((labels - own.kind.mean) / own.kind.spread).tolist()
        return labels.long().tolist()

    def _examined(self, split: str) -> dict[str, Examined]:
        return {
            own.name: Examined(own.kind, self._encodings[own.name][split], own.splits[split].labels)
            for own in self._sets
            if split in own.splits
        }

    def _arguments(self, place: Path) -> Any:
        options = self._options
        steps = options.epochs * math.ceil(len(self._batches) / options.accumulation)
        every = max(1, math.ceil(steps / options.evaluations))
        default_rate = 5e-4 if options.encoder == SMALL else 5e-5
        return need("transformers").TrainingArguments(
            output_dir=str(place),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=default_rate if options.learning_rate is None else options.learning_rate,
            weight_decay=options.weight_decay,
            warmup_steps=round(options.warmup_share * steps),
            lr_scheduler_type="linear",
            bf16=options.mixed_precision == "bf16",
            fp16=options.mixed_precision == "fp16",
            seed=options.seed,
            eval_strategy="steps" if self._examined("validation") else "no",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=1,  # beside the best one
            load_best_model_at_end=self._chooses,
            metric_for_best_model="score" if self._chooses else None,
            greater_is_better=True if self._chooses else None,
            logging_steps=every,
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=not torch.cuda.is_available(),
        )
