"""GoEmotions: 28 emotions as 28 heads on one encoder, trained by the Trainer of transformers or in a loop with accelerate.

By default a small BERT begins with random weights, which two cores can train; ``--encoder`` takes any of the hub's, or a
folder. Epochs, learning rate and weight decay are 8, 0.002 and 0.5 for the small one, and 3, 3e-5 and 0.01 for others.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saliency_reg.errors import SaliencyRegError
from saliency_reg.integrations.plot import draw_relations, draw_task_tree

from .data.texts.emotions import EMOTIONS, HUB_ID, RARE, emotion_splits, fingerprint
from .methods.methods import METHODS
from .models.text_encoders import SMALL, EncoderTasks, small_encoder, tokenizer_of
from .runs.command_line import (
    COUNT,
    Parser,
    add_choice,
    add_folder,
    add_head,
    add_labelled,
    add_method,
    add_number,
    add_options,
    check_method,
    check_options,
)
from .runs.emotion_loops import CHECKPOINTS, LOOPS, Training, processes_started
from .runtime.errors import need
from .runtime.files import machine, now, versions, write_json
from .runtime.processes import Ranks
from .runtime.run_folder import NOT_WRITTEN, in_ranks, open_shared_folder, results_in
from .runtime.tables import aligned
from .runtime.termination import TERMINATED, Terminated, listening
from .training.checkpoints import Checkpoints
from .training.metrics import with_f1
from .training.train import PRETRAINING, Outcome

__all__ = ["main"]

RECIPE = "go_emotions"
SCHEMA_VERSION = 1
#: What a small encoder with new weights likes, and a pretrained one.
_STEPS_OF = {True: (8, 2e-3, 0.5), False: (3, 3e-5, 0.01)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one model and return the exit code."""
    for module in ("transformers", "datasets", "sklearn", "matplotlib", "accelerate", "tqdm"):
        need(module)
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in zip(("epochs", "learning_rate", "weight_decay"), _STEPS_OF[options.encoder == SMALL]):
        if getattr(options, name) is None:
            setattr(options, name, value)
    check_options(parser, options)
    check_method(parser, options)
    parts = options.accumulation * processes_started()
    if options.loop == "trainer" and options.batch_size % parts:
        parser.error(
            f"argument --batch-size: --loop trainer cannot split {options.batch_size} texts into {parts} equal parts."
        )
    return in_ranks(parser, lambda ranks: _run(parser, options, ranks))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, ranks: Ranks) -> int:
    started = time.monotonic()
    training = _loaded(options)
    data = fingerprint(options.data)
    with listening(), open_shared_folder(parser, options, ranks, (RECIPE, SCHEMA_VERSION)) as folder:
        before = ranks.from_main(results_in(folder) if ranks.is_main else None)
        if before.get("status") == "complete":
            if ranks.is_main:
                print(f"The run in {folder} is complete. Pass another --name to train again.")
            return 0
        if before.get("data", data) != data:
            parser.error(f"argument --resume: the run in {folder} was begun with other data. Pass another --name.")
        head = {
            "schema_version": SCHEMA_VERSION,
            "recipe": RECIPE,
            "date": before.get("date") or now(),
            "options": {name: own for name, own in vars(options).items() if name not in ("out", "name", "resume")},
            "versions": versions(),
            "machine": machine(),
            "processes": ranks.size,
            "data": data,
        }
        if ranks.is_main:
            print(_about(options, training), flush=True)
            write_json(folder / "results.json", {**head, "status": "running"})
        try:
            outcome, model = LOOPS[options.loop](
                training, folder, options.resume if options.resume == "never" else "auto"
            )
        except Terminated:
            if ranks.is_main:
                where = f"--out {folder.parent} --name {folder.name}"
                print(f"\nTerminated. To go on, run the same command with {where} --resume auto.", flush=True)
            return TERMINATED
        if not ranks.is_main:
            return 0
        model.save_pretrained(str(folder / "model"))
        training.tokenizer.save_pretrained(str(folder / "model"))
        scores, more = with_f1(outcome.scores, outcome.outputs, outcome.validation_outputs, RARE)
        outcome.scores = scores
        found = outcome.to_dict()
        found["macro"] = {**found["macro"], **more}
        write_json(folder / "results.json", {**head, "status": "complete", **found})
        for own in (folder, folder / PRETRAINING):
            Checkpoints(own).remove_all()
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        print(_table(outcome, found["macro"], training))
        code = _draw(folder, outcome, options)
        names = ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
        print(f"\n{time.monotonic() - started:.0f} s. Written to {folder}: {names}")
    return code


def _loaded(options: argparse.Namespace) -> Training:
    splits = emotion_splits(
        options.data,
        seed=options.seed,
        train_texts=options.train_texts,
        validation_texts=options.validation_texts,
        labelled=options.labelled,
    )
    tokenizer = tokenizer_of(options.encoder, splits.train.texts, options.vocabulary)
    encoder: Any = options.encoder
    if encoder == SMALL:
        encoder = small_encoder(
            len(tokenizer), width=options.width, layers=options.layers, max_length=options.max_length
        )
    hidden = (options.head_width,) if options.head_width else ()

    def build() -> EncoderTasks:
        return EncoderTasks(encoder, EMOTIONS, hidden, options.activation)

    if options.encoder != SMALL:
        build()  # what is wrong with the encoder should leave nothing behind
    return Training(options, splits, tokenizer, build)


def _about(options: argparse.Namespace, training: Training) -> str:
    splits = training.splits
    return (
        f"GoEmotions, {len(EMOTIONS)} tasks: {len(splits.train)} training and {len(splits.validation)} validation texts, "
        f"{len(splits.test)} test texts (the published {splits.test_name} split).\n"
        f"{METHODS[options.method].label} on the encoder {options.encoder}, --loop {options.loop}."
    )


def _table(outcome: Outcome, macro: dict[str, float], training: Training) -> str:
    names = ("f1", "auc", "precision", "recall")
    counts = (training.splits.train.labels == 1).sum(0).tolist()
    rows = [["emotion", "training texts", "F1", "AUC", "precision", "recall"]]
    order = sorted(range(len(EMOTIONS)), key=lambda task: -counts[task])
    for task in order:
        own = outcome.scores[EMOTIONS[task]]
        rows.append([EMOTIONS[task], str(counts[task]), *(_text(own[name]) for name in names)])
    rows.append(["mean", "", *(_text(macro[name]) for name in names)])
    rows.append([f"mean of {len(RARE)} rare ones", "", _text(macro["f1_rare"]), _text(macro["auc_rare"]), "", ""])
    chosen = f"Best weights by validation AUC: epoch {outcome.best_epoch}. "
    return (
        f"\n{chosen}F1 at a probability of {macro['threshold']:.2f}, chosen on validation; precision and recall at one "
        "half.\n"
        f"{aligned(rows, left=1)}"
    )


def _text(value: float) -> str:
    return f"{value:.4f}" if value == value else "-"


def _draw(folder: Path, outcome: Outcome, options: argparse.Namespace) -> int:
    if outcome.relations is None:
        return 0
    title = f"Learned relations, {METHODS[options.method].label}"
    relations = torch.tensor(outcome.relations)
    try:
        draw_relations(relations, EMOTIONS, folder / "relations.png", title=title)
        draw_task_tree(relations, EMOTIONS, folder / "task_tree.png", title=title)
    except (OSError, SaliencyRegError) as error:  # the training is worth more than its pictures
        print(f"Not all pictures were drawn: {error}")
        return NOT_WRITTEN
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m recipes.go_emotions", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default=HUB_ID,
        metavar="DATA",
        help="folder of parquet files with the columns text and labels (lists of 0 to 27), or id on the hub (default: "
        f"{HUB_ID})",
    )
    for name in ("train", "validation"):
        data.add_argument(
            f"--{name}-texts",
            type=COUNT,
            metavar="N",
            help="drawn at random (default: all; without a test split 2,000 validation texts of the training split)",
        )
    add_labelled(data)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--encoder", default=SMALL, metavar="NAME", help=f"hub id or folder; {SMALL!r}: a new one (default: {SMALL})"
    )
    add_number(model, "--max-length", 32, "tokens that are kept of a text")
    add_number(model, "--width", 128, f"of the encoder {SMALL!r}")
    add_number(model, "--layers", 1, f"of the encoder {SMALL!r}")
    add_number(model, "--vocabulary", 4000, f"of the encoder {SMALL!r}, learned from the training texts")
    add_head(model, 32)
    groups = {name: parser.add_argument_group(name) for name in ("method", "steps", "run")}
    add_method(groups["method"])
    add_choice(
        groups["steps"],
        "--loop",
        list(LOOPS),
        "trainer",
        "the Trainer of transformers, which looks at the validation texts and saves after each epoch, or a loop with "
        "accelerate, which has all methods",
    )
    add_options(
        groups,
        samples="texts",
        epochs=None,
        batch_size=64,
        learning_rate=None,
        weight_decay=None,
        warmup_steps=100,
        checkpoint_steps=200,
    )
    add_folder(groups["run"], RECIPE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
