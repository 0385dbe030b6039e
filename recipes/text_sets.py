"""Several sets of texts, each labelled for a task of its own, on one encoder: GLUE, XTREME, reviews of different goods.

Each batch is of one set, drawn in proportion to the sets' sizes to a power; ``--accumulation`` puts batches of several sets
into one step. All heads run on every batch, so that there are saliencies of all tasks for texts with the label of one: the
penalty and the relations need no labels. PCGrad does. At the feature map the gradient of a text is its own, and with the
label of one task only there is no other gradient for it to conflict with: ``pcgrad`` changes nothing then
(docs/surgery.md). Nor does accumulation help: it acts on each micro-batch on its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .methods.methods import METHODS
from .models.text_encoders import SMALL
from .runs import shell
from .runs.command_line import (
    NON_NEGATIVE,
    POSITIVE,
    Parser,
    add_choice,
    add_folder,
    add_head,
    add_number,
    add_strength,
    check_precision,
    method_name,
    whole_number,
)
from .runs.text_set_run import DEFAULT_STRENGTH, OWN_OF_SMALL, TextSetRun, named_columns, named_source
from .runtime.processes import PRECISIONS

RECIPE = "text_sets"
_METHODS = ("hard_sharing", "srdml", "pcgrad", "srdml+pcgrad")
_METRICS = ("l1", "l2", "sqeuclidean", "cosine", "sqchordal")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one model and return the exit code."""
    packages = ("transformers", "tokenizers", "accelerate", "datasets", "sklearn", "matplotlib", "scipy")
    return shell.main(RECIPE, _parser(), _check, TextSetRun, packages, arguments)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    names = [name for name, _ in options.sets]
    if len(names) < 2:
        parser.error(
            f"argument --set: found {len(names)}, and relations need two. Use --set NAME=SOURCE twice or more."
        )
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        parser.error(f"argument --set: found {doubled[0]} more than once. Give each set a name of its own.")
    if others := [name for name, _ in options.columns if name not in names]:
        parser.error(f"argument --columns: found {others[0]}, which is no set. Use one of {', '.join(names)}.")
    if options.method not in _METHODS:
        parser.error(f"argument --method: this recipe has no {options.method}. Use one of {', '.join(_METHODS)}.")
    if options.strength is not None and METHODS[options.method].rule is None:
        parser.error(f"argument --strength: {options.method} has no penalty. Leave it out.")
    if options.encoder != SMALL:
        if given := [name for name in OWN_OF_SMALL if getattr(options, name) is not None]:
            parser.error(f"argument --{given[0]}: only the encoder {SMALL!r} has it. Leave it out.")
    elif options.tokenizer is not None:
        parser.error(f"argument --tokenizer: the encoder {SMALL!r} learns its own. Leave it out.")
    check_precision(parser, options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m recipes.{RECIPE}", description=__doc__)
    data = parser.add_argument_group("data")
    text = "a folder or file of tables, or an id on the hub with a configuration behind a colon; for each set once"
    data.add_argument(
        "--set", dest="sets", type=named_source, action="append", required=True, metavar="NAME=SOURCE", help=text
    )
    text = "of one set (default: those with common names)"
    metavar = "NAME=TEXT,[TEXT,]LABEL"
    data.add_argument("--columns", type=named_columns, action="append", default=[], metavar=metavar, help=text)
    data.add_argument("--skip-incomplete", action="store_true", help="leave out rows without a text or a label")
    text = "batches of a set are in proportion to its size to this power"
    add_number(data, "--sampling-exponent", 0.5, text, NON_NEGATIVE)
    model = parser.add_argument_group("model")
    text = "id on the hub or folder; small is a BERT with new weights and a vocabulary of the training texts"
    model.add_argument("--encoder", default=SMALL, metavar="ENCODER", help=f"{text} (default: {SMALL})")
    model.add_argument("--tokenizer", metavar="NAME", help="id or folder (default: that of the encoder)")
    for name, default in OWN_OF_SMALL.items():
        add_number(model, f"--{name}", None, f"of the small encoder (default: {default})")
    add_number(model, "--max-length", 128, "tokens of a text")
    add_head(model, 128, activation=False)
    method = parser.add_argument_group("method")
    text = f"one of {', '.join(_METHODS)}; without a penalty relations are only watched (default: srdml)"
    method.add_argument("--method", type=method_name, default="srdml", metavar="METHOD", help=text)
    add_strength(method, DEFAULT_STRENGTH)
    add_choice(method, "--metric", _METRICS, "l1", "of the distance between saliencies")
    steps = parser.add_argument_group("steps")
    add_number(steps, "--epochs", 5, "of as many batches as one pass over all sets has")
    add_number(steps, "--batch-size", 32, "texts of a batch, all of one set")
    add_number(steps, "--accumulation", 1, "batches of a step, each of its own set")
    text = "of AdamW (default: 0.0005 for the small encoder, 0.00005 for others)"
    add_number(steps, "--learning-rate", None, text, POSITIVE)
    add_number(steps, "--weight-decay", 0.01, "of matrices", NON_NEGATIVE)
    add_number(steps, "--warmup-share", 0.1, "of the steps, in which the learning rate rises", NON_NEGATIVE)
    add_number(steps, "--evaluations", 10, "looks at the validation texts; each writes a checkpoint")
    add_number(steps, "--seed", 0, "of all draws", whole_number(0))
    add_choice(steps, "--mixed-precision", PRECISIONS, "no", "fp16 needs a GPU")
    add_folder(parser.add_argument_group("run"), RECIPE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
