"""Several sets of texts, each labelled for a task of its own, on one encoder: GLUE, XTREME, reviews of different goods.

Each batch is of one set, drawn in proportion to the sets' sizes to a power; ``--accumulation`` puts batches of several sets
into one step. All heads run on every batch, so that there are saliencies of all tasks for texts with the label of one: the
penalty and the relations need no labels. PCGrad does. At the feature map the gradient of a text is its own, and with the
label of one task only there is no other gradient for it to conflict with: ``pcgrad`` changes nothing then
(docs/surgery.md). Nor does accumulation help: it acts on each micro-batch on its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.distances import METRICS as DISTANCES
from saliency_reg.errors import SaliencyRegError
from saliency_reg.integrations.plot import draw_relations, draw_task_tree
from saliency_reg.integrations.transformers import MultiTaskCollator

from .arguments import OneVoiceParser, folder_name, real_number, whole_number
from .errors import OptionError, RecipeError
from .extras import need
from .fingerprints import fingerprint_of
from .ranks import PRECISIONS, Ranks, started_ranks
from .runs import machine, now, versions, write_json
from .study_run import INTERRUPTED, NOT_WRITTEN, open_shared_folder
from .tables import aligned
from .termination import TERMINATED, Terminated, deferred, listening
from .text.domains import TextSet, read_set
from .text.emotion_model import SMALL
from .text.set_model import build_model, check_inputs, encode, fitting_tokenizer
from .text.set_scores import METRICS
from .text.set_training import Examined, SetTrainer, latest_checkpoint, scores_on
from .text.task_batches import SetExamples, TaskBatches

__all__ = ["main"]

SCHEMA_VERSION = 1
RECIPE = "text_sets"
CHECKPOINTS = "checkpoints"
_DEFAULT_STRENGTH = 0.01
_OWN_OF_SMALL = {"width": 128, "layers": 2, "vocabulary": 8000}


@dataclass(frozen=True)
class _Method:
    label: str
    penalty: bool
    surgery: bool


_METHODS = {
    "hard_sharing": _Method("hard sharing", penalty=False, surgery=False),
    "srdml": _Method("SRDML", penalty=True, surgery=False),
    "pcgrad": _Method("PCGrad (feature)", penalty=False, surgery=True),
    "srdml_pcgrad": _Method("SRDML w/ PCGrad (feature)", penalty=True, surgery=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one model and return the exit code."""
    for module in ("transformers", "tokenizers", "accelerate", "datasets", "sklearn", "matplotlib", "scipy"):
        need(module)
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    need("transformers").utils.logging.disable_progress_bar()  # one for each file that is written
    with started_ranks() as state:
        try:
            return _run(parser, options, Ranks(state))
        except (RecipeError, SaliencyRegError) as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nInterrupted. Type the same command with the --name of the run and --resume auto to go on.")
            return INTERRUPTED


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, ranks: Ranks) -> int:
    if ranks.size > 1:
        raise OptionError(f"found {ranks.size} processes. Start this recipe in one, without torchrun.")
    started = time.monotonic()
    columns = dict(options.columns)
    sets = [
        read_set(name, source, columns.get(name, ()), skip=options.skip_incomplete) for name, source in options.sets
    ]
    # Before the folder: what is wrong with the model should leave nothing behind.
    training = _Training(options, sets)
    with listening(), open_shared_folder(parser, options, ranks, (RECIPE, SCHEMA_VERSION)) as folder:
        before = _results_in(folder)
        if before.get("status") == "complete":
            print(f"The run in {folder} is complete. Type another --name to train again.")
            return 0
        if before.get("fingerprint", training.fingerprint) != training.fingerprint:
            parser.error(f"argument --resume: the run in {folder} was begun with other data. Type another --name.")
        print("\n".join(training.about), flush=True)
        head = training.head(before.get("date") or now())
        write_json(folder / "results.json", {**head, "status": "running"})
        try:
            found = training.run(folder)
        except Terminated:
            where = f"--out {folder.parent} --name {folder.name}"
            print(f"\nTerminated. To go on, type the same command with {where} --resume auto.", flush=True)
            return TERMINATED
        training.save(folder / "model")
        write_json(folder / "results.json", {**head, "status": "complete", **found})
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        print(_tables(sets, found))
        code = _draw(folder, training.regularizer, options)
        names = ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
        print(f"\n{time.monotonic() - started:.0f} s. Written to {folder}: {names}")
    return code


class _Training:
    """Model, data, and what was found of them."""

    def __init__(self, options: argparse.Namespace, sets: Sequence[TextSet]) -> None:
        self._options = options
        self._sets = sets
        self._method = _METHODS[options.method]
        small = {name: getattr(options, name) or default for name, default in _OWN_OF_SMALL.items()}
        name = options.tokenizer or options.encoder
        self._tokenizer = fitting_tokenizer(name, sets, small["vocabulary"])
        length = options.max_length
        if length > self._tokenizer.model_max_length:
            most = self._tokenizer.model_max_length
            raise OptionError(f"the tokenizer of {name} ends at {most} tokens. Type --max-length {most} or less.")
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
        check_inputs(self.model, self._tokenizer, everything, self._collate, length)
        given = options.strength
        self.regularizer: SaliencyRegularizer = self.model.regularizer(
            # At 0 the relations are only watched: no gradient of the penalty is taken.
            strength=0.0 if not self._method.penalty else _DEFAULT_STRENGTH if given is None else given,
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

    def head(self, date: str) -> dict[str, Any]:
        """What ``results.json`` says from the beginning on."""
        own_versions = versions()
        for package in ("transformers", "tokenizers"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                own_versions[package] = metadata.version(package)
        return {
            "schema_version": SCHEMA_VERSION,
            "recipe": RECIPE,
            "date": date,
            "options": {
                name: value for name, value in vars(self._options).items() if name not in ("out", "name", "resume")
            },
            "versions": own_versions,
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


def _tables(sets: Sequence[TextSet], found: Mapping[str, Any]) -> str:
    rows = [["task", "split", "texts", *METRICS.values()]]
    for own in sets:
        values = [found["scores"][own.name].get(name, math.nan) for name in METRICS]
        cells = ["-" if math.isnan(value) else f"{value:.4f}" for value in values]
        rows.append([own.name, own.reported, str(len(own.splits[own.reported])), *cells])
    lines = ["", aligned(rows, left=2), ""]
    if found["chosen_by"] == "validation":
        lines.append(f"Weights of step {found['chosen_step']} of {found['steps']}, the best on the validation splits.")
    else:
        without = ", ".join(own.name for own in sets if not {"validation", "test"} <= set(own.splits))
        lines.append(f"Weights of the last step: {without} has not both a validation and a test split with labels.")
    if any(own.kind.name == "number" for own in sets):
        lines.append("nMSE: mean squared error / variance of the training labels (lower is better).")
    weights = torch.tensor(found["relations"], dtype=torch.float64)
    weights = weights / weights.sum() * len(sets) * (len(sets) - 1)
    names = found["tasks"]
    table = [["", *names]]
    for name, own in zip(names, weights.tolist()):
        table.append([name, *("." if other == name else f"{value:.2f}" for other, value in zip(names, own))])
    title = "Relations after the last step (1: as much in common as the average pair):"
    return "\n".join([*lines, "", title, aligned(table, left=1)])


def _draw(folder: Path, regularizer: SaliencyRegularizer, options: argparse.Namespace) -> int:
    title = f"Learned relations, {_METHODS[options.method].label}"
    try:
        draw_relations(regularizer, path=folder / "relations.png", title=title)
        draw_task_tree(regularizer, path=folder / "task_tree.png", title=title)
    except (OSError, SaliencyRegError) as error:  # the training is worth more than its pictures
        print(f"Not all pictures were drawn: {error}")
        return NOT_WRITTEN
    return 0


def _results_in(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _named(text: str) -> list[str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(
            f"found {text!r}. Type NAME=SOURCE, such as sst2=nyu-mll/glue:sst2 or mine=folder/of/tables."
        )
    return [name, source]


def _named_columns(text: str) -> list[Any]:
    name, _, columns = text.partition("=")
    names = columns.split(",")
    if not name or len(names) not in (2, 3) or not all(names):
        raise argparse.ArgumentTypeError(f"found {text!r}. Type NAME=TEXT,LABEL or NAME=TEXT,TEXT,LABEL.")
    return [name, names]


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    names = [name for name, _ in options.sets]
    if len(names) < 2:
        parser.error(
            f"argument --set: found {len(names)}, and relations need two. Type --set NAME=SOURCE twice or more."
        )
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        parser.error(f"argument --set: found {doubled[0]} more than once. Give each set a name of its own.")
    for name, _ in options.columns:
        if name not in names:
            parser.error(f"argument --columns: found {name}, which is no set. Type one of {', '.join(names)}.")
    if options.strength is not None and not _METHODS[options.method].penalty:
        parser.error(f"argument --strength: {options.method} has no penalty. Leave it out.")
    if options.encoder != SMALL:
        for name in _OWN_OF_SMALL:
            if getattr(options, name) is not None:
                parser.error(f"argument --{name}: only the encoder {SMALL!r} has it. Leave it out.")
    elif options.tokenizer is not None:
        parser.error(f"argument --tokenizer: the encoder {SMALL!r} learns its own. Leave it out.")
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error("argument --mixed-precision: fp16 needs a GPU, and none was found. Type bf16, or no.")


def _parser() -> argparse.ArgumentParser:
    parser = OneVoiceParser(prog=f"python -m recipes.{RECIPE}", description=__doc__)
    count, non_negative = whole_number(1), real_number(above_zero=False)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--set",
        dest="sets",
        type=_named,
        action="append",
        required=True,
        metavar="NAME=SOURCE",
        help="a folder or file of tables, or an id on the hub with a configuration behind a colon; for each set once",
    )
    data.add_argument(
        "--columns",
        type=_named_columns,
        action="append",
        default=[],
        metavar="NAME=TEXT,[TEXT,]LABEL",
        help="of one set (default: those with common names)",
    )
    data.add_argument("--skip-incomplete", action="store_true", help="leave out rows without a text or a label")
    data.add_argument(
        "--sampling-exponent",
        type=non_negative,
        default=0.5,
        metavar="X",
        help="batches of a set are in proportion to its size to this power (default: 0.5)",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--encoder",
        default=SMALL,
        metavar="ENCODER",
        help="id on the hub or folder; small is a BERT with new weights and a vocabulary of the training texts (default: "
        "small)",
    )
    model.add_argument("--tokenizer", metavar="NAME", help="id or folder (default: that of the encoder)")
    for name, default in _OWN_OF_SMALL.items():
        model.add_argument(f"--{name}", type=count, metavar="N", help=f"of the small encoder (default: {default})")
    model.add_argument("--max-length", type=count, default=128, metavar="N", help="tokens of a text (default: 128)")
    model.add_argument(
        "--head-width",
        type=whole_number(0),
        default=128,
        metavar="N",
        help="of the hidden layer in each head; 0 for linear heads (default: 128)",
    )
    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        choices=list(_METHODS),
        default="srdml",
        metavar="METHOD",
        help=f"one of {', '.join(_METHODS)}; without a penalty relations are only watched (default: srdml)",
    )
    method.add_argument(
        "--strength",
        type=non_negative,
        metavar="X",
        help=f"of the penalty, for methods that have one (default: {_DEFAULT_STRENGTH:g})",
    )
    method.add_argument(
        "--metric",
        choices=DISTANCES,
        default="l1",
        help="of the distance between saliencies (default: l1)",
    )
    _add_steps(parser.add_argument_group("steps"))
    run = parser.add_argument_group("run")
    out = Path("runs", RECIPE)
    run.add_argument("--out", type=Path, default=out, metavar="FOLDER", help=f"of all runs (default: {out})")
    run.add_argument("--name", type=folder_name, help="of this run's folder in it (default: date and time)")
    run.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|FOLDER",
        help="auto goes on with the run of this --name from its latest checkpoint, if there is one; FOLDER is that of the "
        "run (default: never)",
    )
    return parser


def _add_steps(steps: Any) -> None:
    count, positive, non_negative = whole_number(1), real_number(above_zero=True), real_number(above_zero=False)
    for name, kind, default, text in (
        ("--epochs", count, 5, "of as many batches as one pass over all sets has"),
        ("--batch-size", count, 32, "texts of a batch, all of one set"),
        ("--accumulation", count, 1, "batches of a step, each of its own set"),
        ("--learning-rate", positive, None, "of AdamW (default: 0.0005 for the small encoder, 0.00005 for others)"),
        ("--weight-decay", non_negative, 0.01, "of matrices"),
        ("--warmup-share", non_negative, 0.1, "of the steps, in which the learning rate rises"),
        ("--evaluations", count, 10, "looks at the validation texts; each writes a checkpoint"),
        ("--seed", whole_number(0), 0, "of all draws"),
    ):
        shown = text if default is None else f"{text} (default: {default:g})"
        metavar = "N" if kind not in (positive, non_negative) else "X"
        steps.add_argument(name, type=kind, default=default, metavar=metavar, help=shown)
    steps.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="fp16 needs a GPU (default: no)")


if __name__ == "__main__":
    sys.exit(main())
