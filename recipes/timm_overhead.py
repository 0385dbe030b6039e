"""What the regularizer and gradient surgery cost on timm models at their own image size: step times beside the plain step.

Times are process CPU times of interleaved steps, compared step by step. Both ways are timed: a head with a hidden layer for
each task on the feature map before pooling, and an unmodified classifier with a column for each task.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, saliency_regularizer

from .benchmarks.step_statistics import interval
from .benchmarks.timing import add_timing_arguments, kinds_of, markdown, run_timings, time_steps, training_step
from .runs.command_line import whole_number
from .runtime.errors import need

__all__ = ["main"]

HEADS, COLUMNS = "a head for each task", "one classifier with a column per task"
#: What is timed: shape of the model, and whether with the regularizer and with surgery.
KINDS = kinds_of((HEADS, COLUMNS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write results.json, and return the exit code."""
    options = _parser().parse_args(arguments)
    for module in ("numpy", "tqdm", "timm"):
        need(module)
    measurements = [
        functools.partial(_measure, backbone, tasks, options)
        for backbone in options.backbones
        for tasks in options.tasks
    ]
    return run_timings(options, measurements, _table, {})


def _measure(backbone: str, tasks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    steps: dict[str, Callable[[], None]] = {}
    size = 0
    for name, (shape, regularizes, surgery) in KINDS.items():
        steps[name], size = _step(backbone, tasks, shape, regularizes, surgery, options.batch_size)
    rows = time_steps(steps, KINDS, options, f"{backbone}, {tasks} tasks")
    return [{"backbone": backbone, "image_size": size, "tasks": tasks, **row} for row in rows]


def _step(
    backbone: str, tasks: int, shape: str, regularizes: bool, surgery: bool, batch_size: int
) -> tuple[Callable[[], None], int]:
    """One whole training step, and the side of the images."""
    torch.manual_seed(0)
    names = [f"task {task}" for task in range(tasks)]
    model: Any = (
        TimmMultiTaskModel(backbone, names, head=HeadConfig(hidden=(128,)))
        if shape == HEADS
        else need("timm").create_model(backbone, num_classes=tasks)
    )
    size = model.image_size[0] if shape == HEADS else model.pretrained_cfg["input_size"][-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    regularizer: SaliencyRegularizer | None = None
    if regularizes:
        chosen: dict[str, Any] = {"surgery": PCGrad()} if surgery else {}
        if shape == HEADS:
            regularizer = model.regularizer(optimizer=optimizer, **chosen)
        else:
            regularizer = saliency_regularizer(model, tasks=names, optimizer=optimizer, **chosen)
    images = torch.randn(batch_size, 3, size, size)
    labels = torch.randint(2, (batch_size, tasks)).float()

    return training_step(model, optimizer, regularizer, lambda: _loss(model, images, labels)), size


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    outputs = model(images)
    logits = outputs if isinstance(outputs, Tensor) else torch.stack(list(outputs.values()), dim=1)
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return losses.mean(0).sum()


def _table(rows: Sequence[dict[str, Any]]) -> str:
    titles = ("backbone", "image", "tasks", "step", "seconds", "time over the plain step")
    cells = [
        (
            row["backbone"],
            f"{row['image_size']}x{row['image_size']}",
            str(row["tasks"]),
            row["kind"],
            f"{row['median_seconds']:.2f}",
            interval(row["ratio_to_plain"]),
        )
        for row in rows
    ]
    return markdown(titles, cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.timm_overhead", description=__doc__)
    count = whole_number(1)
    parser.add_argument(
        "--backbones",
        nargs="+",
        default=["resnet50", "vit_small_patch16_224"],
        metavar="NAME",
        help="of timm's (default: resnet50 vit_small_patch16_224)",
    )
    parser.add_argument(
        "--tasks", type=count, nargs="+", default=[10, 40], metavar="T", help="numbers of tasks (default: 10 40)"
    )
    add_timing_arguments(parser, "images", Path("runs/timm_overhead"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
