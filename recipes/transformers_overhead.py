"""What the regularizer and gradient surgery cost on an encoder of texts: step times beside the plain step.

Random weights in the shape of bert-base. Times are process CPU times of interleaved steps, compared step by step. Both ways
are timed: a head with a hidden layer for each label on the mean of the tokens, and an unmodified classifier with a column
for each label.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel, saliency_regularizer

from .benchmarks.step_statistics import interval
from .benchmarks.timing import add_timing_arguments, kinds_of, markdown, run_timings, time_steps, training_step
from .runs.command_line import whole_number
from .runtime.errors import need

__all__ = ["main"]

COLUMNS, HEADS = "one classifier with a column per label", "a head for each label"
#: Of the hidden layer of a task head; channels of an attention head, and of a layer's middle per channel, as in bert-base.
HEAD_WIDTH, CHANNELS_PER_HEAD, HIDDEN_FACTOR = 64, 64, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write results.json, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.hidden % min(options.hidden, CHANNELS_PER_HEAD):
        parser.error(
            f"argument --hidden: {options.hidden} channels do not split into attention heads of {CHANNELS_PER_HEAD}. Use "
            f"a multiple of {CHANNELS_PER_HEAD}."
        )
    for module in ("numpy", "tqdm", "transformers"):
        need(module)
    packages = {"transformers": str(need("transformers").__version__)}
    measurements = [
        functools.partial(_measure, tasks, shape, options) for tasks in options.tasks for shape in (COLUMNS, HEADS)
    ]
    return run_timings(options, measurements, _table, packages)


def _measure(tasks: int, shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    kinds = kinds_of([shape])
    steps = {name: _step(tasks, *kind, options) for name, kind in kinds.items()}
    rows = time_steps(steps, kinds, options, f"{tasks} labels, {shape}")
    sizes = {"layers": options.layers, "hidden": options.hidden, "tokens": options.tokens, "tasks": tasks}
    return [{**sizes, **row} for row in rows]


def _step(tasks: int, shape: str, regularizes: bool, surgery: bool, options: argparse.Namespace) -> Callable[[], None]:
    """One whole training step."""
    torch.manual_seed(0)
    names = [f"label {task}" for task in range(tasks)]
    transformers = need("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=max(1, options.hidden // CHANNELS_PER_HEAD),
        intermediate_size=HIDDEN_FACTOR * options.hidden,
        max_position_embeddings=max(512, options.tokens),
        num_labels=tasks,
        problem_type="multi_label_classification",
    )
    model: Any = (
        MultiTaskModel.from_encoder(config, names, head=HeadConfig(hidden=(HEAD_WIDTH,)))
        if shape == HEADS
        else transformers.BertForSequenceClassification(config)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    regularizer: SaliencyRegularizer | None = None
    if regularizes:
        chosen: dict[str, Any] = {"optimizer": optimizer, **({"surgery": PCGrad()} if surgery else {})}
        regularizer = (
            model.regularizer(**chosen) if shape == HEADS else saliency_regularizer(model, tasks=names, **chosen)
        )
    size = (options.batch_size, options.tokens)
    inputs = {"input_ids": torch.randint(config.vocab_size, size), "attention_mask": torch.ones(size).long()}
    labels = torch.randint(2, (options.batch_size, tasks)).float()
    return training_step(model, optimizer, regularizer, lambda: _loss(model, inputs, labels))


def _loss(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    found = model(**inputs).logits
    logits = found if isinstance(found, Tensor) else torch.stack(list(found.values()), dim=1)
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0).sum()


def _table(rows: Sequence[dict[str, Any]]) -> str:
    titles = ("layers", "channels", "tokens", "labels", "step", "seconds", "time over the plain step")
    names = ("layers", "hidden", "tokens", "tasks", "kind")
    cells = [
        (*(str(row[name]) for name in names), f"{row['median_seconds']:.2f}", interval(row["ratio_to_plain"]))
        for row in rows
    ]
    return markdown(titles, cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.transformers_overhead", description=__doc__)
    count = whole_number(1)
    parser.add_argument(
        "--tasks", type=count, nargs="+", default=[28], metavar="T", help="numbers of labels (default: 28)"
    )
    for name, default, text in (
        ("--layers", 12, "of the encoder"),
        ("--hidden", 768, "channels of the encoder"),
        ("--tokens", 64, "of a text"),
    ):
        parser.add_argument(name, type=count, default=default, metavar="N", help=f"{text} (default: {default})")
    add_timing_arguments(parser, "texts", Path("runs/transformers_overhead"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
