"""Several sets of texts, each labelled for a task of its own, on one encoder: GLUE, XTREME, reviews of different goods.

Each batch is of one set, drawn in proportion to the sets' sizes to a power; ``--accumulation`` puts batches of several sets
into one step. All heads run on every batch, so that there are saliencies of all tasks for texts with the label of one: the
penalty and the relations need no labels. PCGrad does. At the feature map the gradient of a text is its own, and with the
label of one task only there is no other gradient for it to conflict with: ``pcgrad`` changes nothing then
(docs/surgery.md). Nor does accumulation help: it acts on each micro-batch on its own.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saliency_reg import SaliencyRegularizer
from saliency_reg.errors import SaliencyRegError
from saliency_reg.integrations.plot import draw_relations, draw_task_tree

from .data.texts.text_sets import TextSet, read_set
from .models.text_encoders import SMALL
from .runs.command_line import (
    COUNT,
    NON_NEGATIVE,
    POSITIVE,
    Parser,
    add_folder,
    add_head,
    add_number,
    add_strength,
    whole_number,
)
from .runs.text_set_run import CHECKPOINTS, DEFAULT_STRENGTH, METHODS, OWN_OF_SMALL, SetRun
from .runtime.errors import OptionError, need
from .runtime.files import now, write_json
from .runtime.processes import PRECISIONS, Ranks
from .runtime.run_folder import NOT_WRITTEN, in_ranks, open_shared_folder, results_in
from .runtime.tables import aligned
from .runtime.termination import TERMINATED, Terminated, listening
from .training.metrics import METRICS_OF, TITLES

__all__ = ["main"]

SCHEMA_VERSION = 1
RECIPE = "text_sets"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one model and return the exit code."""
    for module in ("transformers", "tokenizers", "accelerate", "datasets", "sklearn", "matplotlib", "scipy"):
        need(module)
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    need("transformers").utils.logging.disable_progress_bar()  # one for each file that is written
    return in_ranks(parser, lambda ranks: _run(parser, options, ranks))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, ranks: Ranks) -> int:
    if ranks.size > 1:
        raise OptionError(f"found {ranks.size} processes. Start this recipe in one, without torchrun.")
    started = time.monotonic()
    columns = dict(options.columns)
    sets = [
        read_set(name, source, columns.get(name, ()), skip=options.skip_incomplete) for name, source in options.sets
    ]
    # Before the folder: what is wrong with the model should leave nothing behind.
    training = SetRun(options, sets)
    with listening(), open_shared_folder(parser, options, ranks, (RECIPE, SCHEMA_VERSION)) as folder:
        before = results_in(folder)
        if before.get("status") == "complete":
            print(f"The run in {folder} is complete. Pass another --name to train again.")
            return 0
        if before.get("fingerprint", training.fingerprint) != training.fingerprint:
            parser.error(f"argument --resume: the run in {folder} was begun with other data. Pass another --name.")
        print("\n".join(training.about), flush=True)
        head = {
            "schema_version": SCHEMA_VERSION,
            "recipe": RECIPE,
            "date": before.get("date") or now(),
            **training.head(),
        }
        write_json(folder / "results.json", {**head, "status": "running"})
        try:
            found = training.run(folder)
        except Terminated:
            where = f"--out {folder.parent} --name {folder.name}"
            print(f"\nTerminated. To go on, run the same command with {where} --resume auto.", flush=True)
            return TERMINATED
        training.save(folder / "model")
        write_json(folder / "results.json", {**head, "status": "complete", **found})
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        print(_tables(sets, found))
        code = _draw(folder, training.regularizer, options)
        names = ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
        print(f"\n{time.monotonic() - started:.0f} s. Written to {folder}: {names}")
    return code


def _tables(sets: Sequence[TextSet], found: Mapping[str, Any]) -> str:
    names = (*METRICS_OF["classes"], *METRICS_OF["number"])
    rows = [["task", "split", "texts", *(TITLES.get(name, name) for name in names)]]
    for own in sets:
        values = [found["scores"][own.name].get(name, math.nan) for name in names]
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
    title = f"Learned relations, {METHODS[options.method].label}"
    try:
        draw_relations(regularizer, path=folder / "relations.png", title=title)
        draw_task_tree(regularizer, path=folder / "task_tree.png", title=title)
    except (OSError, SaliencyRegError) as error:  # the training is worth more than its pictures
        print(f"Not all pictures were drawn: {error}")
        return NOT_WRITTEN
    return 0


def _named(text: str) -> list[str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(
            f"found {text!r}. Pass NAME=SOURCE, such as sst2=nyu-mll/glue:sst2 or mine=folder/of/tables."
        )
    return [name, source]


def _named_columns(text: str) -> list[Any]:
    name, _, columns = text.partition("=")
    names = columns.split(",")
    if not name or len(names) not in (2, 3) or not all(names):
        raise argparse.ArgumentTypeError(f"found {text!r}. Pass NAME=TEXT,LABEL or NAME=TEXT,TEXT,LABEL.")
    return [name, names]


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    names = [name for name, _ in options.sets]
    if len(names) < 2:
        parser.error(
            f"argument --set: found {len(names)}, and relations need two. Use --set NAME=SOURCE twice or more."
        )
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        parser.error(f"argument --set: found {doubled[0]} more than once. Give each set a name of its own.")
    for name, _ in options.columns:
        if name not in names:
            parser.error(f"argument --columns: found {name}, which is no set. Use one of {', '.join(names)}.")
    if options.strength is not None and not METHODS[options.method].penalty:
        parser.error(f"argument --strength: {options.method} has no penalty. Leave it out.")
    if options.encoder != SMALL:
        for name in OWN_OF_SMALL:
            if getattr(options, name) is not None:
                parser.error(f"argument --{name}: only the encoder {SMALL!r} has it. Leave it out.")
    elif options.tokenizer is not None:
        parser.error(f"argument --tokenizer: the encoder {SMALL!r} learns its own. Leave it out.")
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error("argument --mixed-precision: fp16 needs a GPU, and none was found. Use bf16, or no.")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m recipes.{RECIPE}", description=__doc__)
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
        type=NON_NEGATIVE,
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
    for name, default in OWN_OF_SMALL.items():
        model.add_argument(f"--{name}", type=COUNT, metavar="N", help=f"of the small encoder (default: {default})")
    model.add_argument("--max-length", type=COUNT, default=128, metavar="N", help="tokens of a text (default: 128)")
    add_head(model, 128, activation=False)
    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        choices=list(METHODS),
        default="srdml",
        metavar="METHOD",
        help=f"one of {', '.join(METHODS)}; without a penalty relations are only watched (default: srdml)",
    )
    add_strength(method, DEFAULT_STRENGTH)
    method.add_argument(
        "--metric",
        choices=("l1", "l2", "sqeuclidean", "cosine", "sqchordal"),
        default="l1",
        help="of the distance between saliencies (default: l1)",
    )
    _add_steps(parser.add_argument_group("steps"))
    add_folder(parser.add_argument_group("run"), RECIPE)
    return parser


def _add_steps(steps: Any) -> None:
    add_number(steps, "--epochs", 5, "of as many batches as one pass over all sets has")
    add_number(steps, "--batch-size", 32, "texts of a batch, all of one set")
    add_number(steps, "--accumulation", 1, "batches of a step, each of its own set")
    text = "of AdamW (default: 0.0005 for the small encoder, 0.00005 for others)"
    add_number(steps, "--learning-rate", None, text, POSITIVE)
    add_number(steps, "--weight-decay", 0.01, "of matrices", NON_NEGATIVE)
    add_number(steps, "--warmup-share", 0.1, "of the steps, in which the learning rate rises", NON_NEGATIVE)
    add_number(steps, "--evaluations", 10, "looks at the validation texts; each writes a checkpoint")
    add_number(steps, "--seed", 0, "of all draws", whole_number(0))
    steps.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="fp16 needs a GPU (default: no)")


if __name__ == "__main__":
    sys.exit(main())
