"""One training on several sets of texts, by the Trainer of transformers."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_reg import PCGrad
from saliency_reg.integrations.transformers import MultiTaskCollator, SaliencyTrainer

from ..data.hub import fingerprint_of
from ..data.task_kinds import TaskKind
from ..data.texts.task_batches import SetExamples, TaskBatches
from ..data.texts.text_sets import Rows, TextSet, read_set
from ..methods.methods import METHODS
from ..models.text_encoders import SMALL, check_inputs, model_on_sets, small_encoder, tokenizer_of
from ..runtime.errors import OptionError, need
from ..runtime.files import write_json
from ..runtime.processes import Ranks
from ..runtime.tables import aligned
from ..training.metrics import METRICS_OF, TITLES, selection_score, task_scores
from .by_trainer import run_trainer, trainer_arguments
from .shell import Pictures, relation_pictures

DEFAULT_STRENGTH = 0.01
#: Options that only the small encoder has.
OWN_OF_SMALL = {"width": 128, "layers": 2, "vocabulary": 8000}

_transformers = need("transformers")


def named_source(text: str) -> list[str]:
    """The kind of an argument: a set, and where it comes from."""
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(
            f"found {text!r}. Pass NAME=SOURCE, such as sst2=nyu-mll/glue:sst2 or mine=folder/of/tables."
        )
    return [name, source]


def named_columns(text: str) -> list[Any]:
    """The kind of an argument: a set, and its columns of texts and labels."""
    name, _, columns = text.partition("=")
    names = columns.split(",")
    if not name or len(names) not in (2, 3) or not all(names):
        raise argparse.ArgumentTypeError(f"found {text!r}. Pass NAME=TEXT,LABEL or NAME=TEXT,TEXT,LABEL.")
    return [name, names]


class TextSetRun:
    """One model on all sets; a :class:`~recipes.runs.shell.SingleRun`.

    Args:
        options: of the command line.
        ranks: one process.

    Raises:
        RecipeError, SaliencyRegError: what cannot be trained.
    """

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        if ranks.size > 1:
            raise OptionError(f"found {ranks.size} processes. Start this recipe in one, without torchrun.")
        _transformers.utils.logging.disable_progress_bar()  # one for each file that is written
        self._options = options
        self._ranks = ranks
        self._method = METHODS[options.method]
        columns = dict(options.columns)
        self._sets = [
            read_set(name, source, columns.get(name, ()), skip=options.skip_incomplete) for name, source in options.sets
        ]
        self._batches = TaskBatches(
            [len(own.splits["train"]) for own in self._sets],
            options.batch_size,
            options.sampling_exponent,
            options.seed,
        )
        self._make_model()
        # Whatever has seen the labels that are reported cannot choose a step.
        self._without = [own.name for own in self._sets if not {"validation", "test"} <= set(own.splits)]
        rows = [own.splits[split] for own in self._sets for split in sorted(own.splits)]
        texts = [text for own in rows for text in (*own.texts, *(own.pairs or ()))]
        self.data = {"fingerprint": fingerprint_of(*(own.labels for own in rows), texts=texts)}

    def _make_model(self) -> None:
        options, sets = self._options, self._sets
        small = {name: getattr(options, name) or default for name, default in OWN_OF_SMALL.items()}
        name, length = options.tokenizer or options.encoder, options.max_length
        training = [own.splits["train"] for own in sets]
        texts = [text for rows in training for text in (*rows.texts, *(rows.pairs or ()))]
        self._tokenizer = tokenizer_of(name, texts, small["vocabulary"], pairs=True)
        if length > self._tokenizer.model_max_length:
            most = self._tokenizer.model_max_length
            raise OptionError(f"the tokenizer of {name} ends at {most} tokens. Use --max-length {most} or less.")
        encoder = options.encoder
        if encoder == SMALL:
            width, layers = small["width"], small["layers"]
            encoder = small_encoder(len(self._tokenizer), width=width, layers=layers, max_length=length)
        self._model = model_on_sets(encoder, sets, (options.head_width,) if options.head_width else (), options.seed)
        self._collate = MultiTaskCollator(self._model, self._tokenizer)
        self._encodings = {
            (own.name, split): _encoded(self._tokenizer, rows, length)
            for own in sets
            for split, rows in own.splits.items()
        }
        everything = [row for rows in self._encodings.values() for row in rows]
        check_inputs(self._model, self._tokenizer, everything, self._collate)
        strength = DEFAULT_STRENGTH if options.strength is None else options.strength
        self._regularizer = self._model.regularizer(
            # At 0 the relations are only watched: no gradient of the penalty is taken.
            strength=0.0 if self._method.rule is None else strength,
            metric=options.metric,
            surgery=None if self._method.surgery is None else PCGrad(options.seed),
        )

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

    @property
    def more(self) -> dict[str, Any]:
        """What ``results.json`` says of the sets."""
        return {
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
            }
        }

    def train(self, folder: Path, resume: str) -> dict[str, Any]:  # noqa: ARG002  # a new folder has no checkpoint
        """Train, and return the figures of the best step on validation, or of the last one.

        Raises:
            Terminated: SIGTERM came; a checkpoint was written.
        """
        validated = {own.name: "validation" for own in self._sets if "validation" in own.splits}
        trainer = _SetTrainer(
            model=self._model,
            args=self._arguments(folder, evaluated=bool(validated)),
            train_dataset=SetExamples(
                {own.name: self._encodings[own.name, "train"] for own in self._sets},
                {own.name: _training_labels(own) for own in self._sets},
            ),
            eval_dataset=validated or None,
            data_collator=self._collate,
            regularizer=self._regularizer,
            batches=self._batches,
            measure=lambda: validation_metrics(self._scores(validated), {own.name: own.kind for own in self._sets}),
        )
        run_trainer(trainer, folder, self._ranks)
        state = trainer.state
        chosen = not self._without and state.best_model_checkpoint
        return {
            "steps": state.global_step,
            "chosen_step": state.best_global_step if chosen else state.global_step,
            "chosen_by": "last step" if self._without else "validation",
            "scores": self._scores({own.name: own.reported for own in self._sets}),
            "relations": self._regularizer.relations.matrix().tolist(),
            "tasks": list(self._model.tasks),
            "validation": [
                {"step": entry["step"], **{name: value for name, value in entry.items() if name.startswith("eval_")}}
                for entry in state.log_history
                if "eval_score" in entry
            ],
        }

    def table(self, found: Mapping[str, Any]) -> str:
        """Scores of each task, and the relations."""
        names = (*METRICS_OF["classes"], *METRICS_OF["number"])
        rows = [["task", "split", "texts", *(TITLES.get(name, name) for name in names)]]
        for own in self._sets:
            values = [found["scores"][own.name].get(name, math.nan) for name in names]
            cells = ["-" if math.isnan(value) else f"{value:.4f}" for value in values]
            rows.append([own.name, own.reported, str(len(own.splits[own.reported])), *cells])
        lines = ["", aligned(rows, left=2), ""]
        if self._without:
            without = ", ".join(self._without)
            lines.append(f"Weights of the last step: {without} has not both a validation and a test split with labels.")
        else:
            lines.append(
                f"Weights of step {found['chosen_step']} of {found['steps']}, the best on the validation splits."
            )
        if any(own.kind.name == "number" for own in self._sets):
            lines.append("nMSE: mean squared error / variance of the training labels (lower is better).")
        weights = torch.tensor(found["relations"], dtype=torch.float64)
        weights = weights / weights.sum() * len(weights) * (len(weights) - 1)
        table = [["", *found["tasks"]]]
        for row, name in enumerate(found["tasks"]):
            table.append(
                [name, *("." if row == column else f"{value:.2f}" for column, value in enumerate(weights[row]))]
            )
        title = "Relations after the last step (1: as much in common as the average pair):"
        return "\n".join([*lines, "", title, aligned(table, left=1)])

    def save(self, folder: Path) -> None:
        """What ``MultiTaskModel.from_pretrained`` reads, the tokenizer, and what the outputs mean."""
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        # Numbers are predicted as (label - mean) / spread.
        kinds = {own.name: {**own.kind.to_dict(), "names": list(own.classes)} for own in self._sets}
        write_json(folder / "tasks.json", kinds)

    def pictures(self, found: Mapping[str, Any], folder: Path) -> Pictures:  # noqa: ARG002  # they need no model
        """Those of the relations."""
        return relation_pictures(found, found["tasks"], self._method.label)

    def _scores(self, splits: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Of tasks, each on its own texts of the split that is given for it."""
        training = self._model.training
        self._model.eval()
        found = {}
        for own in self._sets:
            if own.name in splits:
                split = splits[own.name]
                labels = own.splits[split].labels.unsqueeze(1)
                found.update(task_scores(self._outputs(own.name, split), labels, {own.name: own.kind}))
        self._model.train(training)
        return found

    @torch.no_grad()
    def _outputs(self, task: str, split: str) -> Tensor:
        encodings, at_once = self._encodings[task, split], 4 * self._options.batch_size
        # Texts of like length together: less padding.
        order = sorted(range(len(encodings)), key=lambda row: len(encodings[row]["input_ids"]))
        found = []
        for start in range(0, len(order), at_once):
            batch = self._collate([encodings[row] for row in order[start : start + at_once]])
            inputs = {name: value.to(self._model.device) for name, value in batch.items()}
            found.append(self._model(**inputs, tasks=[task]).logits[task].float().cpu())
        return torch.cat(found).reshape(len(order), -1)[torch.tensor(order).argsort()]

    def _arguments(self, folder: Path, evaluated: bool) -> Any:
        options = self._options
        steps = options.epochs * math.ceil(len(self._batches) / options.accumulation)
        every = max(1, math.ceil(steps / options.evaluations))
        default_rate = 5e-4 if options.encoder == SMALL else 5e-5
        chooses = not self._without
        return trainer_arguments(
            options,
            folder,
            per_device_train_batch_size=options.batch_size,
            learning_rate=default_rate if options.learning_rate is None else options.learning_rate,
            warmup_steps=round(options.warmup_share * steps),
            lr_scheduler_type="linear",
            eval_strategy="steps" if evaluated else "no",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=1,  # beside the best one
            load_best_model_at_end=chooses,
            metric_for_best_model="score" if chooses else None,
            greater_is_better=True if chooses else None,
            logging_steps=every,
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
            use_cpu=not torch.cuda.is_available(),
        )


def validation_metrics(scores: Mapping[str, Mapping[str, float]], kinds: Mapping[str, TaskKind]) -> dict[str, float]:
    """``eval_score``, -inf where any task has diverged, and the scores of each as ``eval_TASK_SCORE``, for a Trainer."""
    diverged = any(math.isnan(own[kinds[task].score]) for task, own in scores.items())
    return {
        "eval_score": -math.inf if diverged else selection_score(scores, kinds),
        **{f"eval_{task}_{name}": value for task, own in scores.items() for name, value in own.items()},
    }


class _SetTrainer(SaliencyTrainer):
    """On batches of one task each, all of whose tasks are measured at once."""

    def __init__(self, *, batches: TaskBatches, measure: Callable[[], dict[str, float]], **kwargs: Any) -> None:
        self._batches = batches
        self._measure = measure
        super().__init__(**kwargs)
        self.remove_callback(_transformers.PrinterCallback)
        self.add_callback(_EpochOfBatches(batches))

    def get_train_dataloader(self) -> Any:
        """Of whole batches, which are not cut again."""
        loader = torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self._batches, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # noqa: ARG002  # of Trainer
        """Measure, print and log."""
        metrics = self._measure()
        shown = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in metrics.items())
        print(f"step {self.state.global_step} of {self.state.max_steps}, validation: {shown}", flush=True)
        self.log(dict(metrics))
        trainer: Any = self
        trainer.control = trainer.callback_handler.on_evaluate(self.args, self.state, trainer.control, metrics)
        return metrics


class _EpochOfBatches(_transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    def __init__(self, batches: TaskBatches) -> None:
        self._batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        # Before the batches of the epoch are drawn, in every version of Trainer, resumed or not.
        steps = -(-len(self._batches) // args.gradient_accumulation_steps)
        self._batches.set_epoch(state.global_step // steps)


def _encoded(tokenizer: Any, rows: Rows, max_length: int) -> list[dict[str, list[int]]]:
    """Inputs of each row; pairs become one sequence."""
    pairs = None if rows.pairs is None else list(rows.pairs)
    found = tokenizer(list(rows.texts), pairs, truncation=True, max_length=max_length)
    return [dict(zip(found.keys(), values)) for values in zip(*found.values())]


def _training_labels(own: TextSet) -> list[Any]:
    labels = own.splits["train"].labels
    if own.kind.name == "number":
        return ((labels - own.kind.mean) / own.kind.spread).tolist()
    return labels.long().tolist()
