"""What the regularizer and gradient surgery cost on an encoder of texts: step times beside the plain step.

Random weights in the shape of bert-base. Times are process CPU times of interleaved steps, compared step by step. Both ways
are timed: a head with a hidden layer for each label on the mean of the tokens, and an unmodified classifier with a column
for each label.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel, saliency_regularizer

from .benchmarks.command import add_timing_options, run_timings
from .benchmarks.integrations import Training, multi_label_loss, time_kinds
from .benchmarks.table import markdown_table
from .runs.command_line import add_number
from .runtime.errors import need

COLUMNS, HEADS = "one classifier with a column per label", "a head for each label"
TABLE = {"layers": "{layers}", "channels": "{hidden}", "tokens": "{tokens}", "labels": "{tasks}"}
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
    measurements = (
        time_kinds(partial(_training, tasks, shape, options), shape, options, f"{tasks} labels, {shape}")
        for tasks in options.tasks
        for shape in (COLUMNS, HEADS)
    )
    return run_timings(options, measurements, partial(markdown_table, TABLE), batch_below=True)


def _training(tasks: int, shape: str, options: argparse.Namespace) -> Training:
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
    model: Any
    if shape == HEADS:
        model = MultiTaskModel.from_encoder(config, names, head=HeadConfig(hidden=(HEAD_WIDTH,)))
        attach = model.regularizer
    else:
        model = transformers.BertForSequenceClassification(config)
        attach = partial(saliency_regularizer, model, tasks=names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    size = (options.batch_size, options.tokens)
    inputs = {"input_ids": torch.randint(config.vocab_size, size), "attention_mask": torch.ones(size).long()}
    labels = torch.randint(2, (options.batch_size, tasks)).float()
    description = {"layers": options.layers, "hidden": options.hidden, "tokens": options.tokens, "tasks": tasks}
    return Training(optimizer, lambda: multi_label_loss(model(**inputs).logits, labels), attach, description)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.transformers_overhead", description=__doc__)
    add_number(parser, "--layers", 12, "of the encoder")
    add_number(parser, "--hidden", 768, "channels of the encoder")
    add_number(parser, "--tokens", 64, "of a text")
    add_timing_options(parser, Path("runs/transformers_overhead"), tasks=(28,), samples="texts", called="labels")
    return parser


if __name__ == "__main__":
    sys.exit(main())
