"""What the regularizer and gradient surgery cost on timm models at their own image size: step times beside the plain step.

Times are process CPU times of interleaved steps, compared step by step. Both ways are timed: a head with a hidden layer for
each task on the feature map before pooling, and an unmodified classifier with a column for each task.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, saliency_regularizer

from .benchmarks.command import add_timing_options, run_timings
from .benchmarks.integrations import Training, multi_label_loss, time_kinds
from .benchmarks.table import markdown_table
from .runtime.errors import need

HEADS, COLUMNS = "a head for each task", "one classifier with a column per task"
TABLE = {"backbone": "{backbone}", "image": "{image_size}x{image_size}", "tasks": "{tasks}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write results.json, and return the exit code."""
    options = _parser().parse_args(arguments)
    for module in ("numpy", "tqdm", "timm"):
        need(module)
    measurements = (
        time_kinds(partial(_training, backbone, tasks, shape, options), shape, options, f"{backbone}, {tasks} tasks")
        for backbone in options.backbones
        for tasks in options.tasks
        for shape in (HEADS, COLUMNS)
    )
    return run_timings(options, measurements, partial(markdown_table, TABLE), batch_below=True)


def _training(backbone: str, tasks: int, shape: str, options: argparse.Namespace) -> Training:
    names = [f"task {task}" for task in range(tasks)]
    model: Any
    if shape == HEADS:
        model = TimmMultiTaskModel(backbone, names, head=HeadConfig(hidden=(128,)))
        size, attach = model.image_size[0], model.regularizer
    else:
        model = need("timm").create_model(backbone, num_classes=tasks)
        size, attach = model.pretrained_cfg["input_size"][-1], partial(saliency_regularizer, model, tasks=names)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(options.batch_size, 3, size, size)
    labels = torch.randint(2, (options.batch_size, tasks)).float()
    description = {"backbone": backbone, "image_size": size, "tasks": tasks}
    return Training(optimizer, lambda: multi_label_loss(model(images), labels), attach, description)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.timm_overhead", description=__doc__)
    backbones = ["resnet50", "vit_small_patch16_224"]
    text = f"of timm's (default: {' '.join(backbones)})"
    parser.add_argument("--backbones", nargs="+", default=backbones, metavar="NAME", help=text)
    add_timing_options(parser, Path("runs/timm_overhead"), tasks=(10, 40), samples="images")
    return parser


if __name__ == "__main__":
    sys.exit(main())
