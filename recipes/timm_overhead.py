"""What the regularizer and gradient surgery cost on timm models at their own image size: step times beside the plain step.

Times are process CPU times of interleaved steps, compared step by step. Both ways are timed: a head with a hidden layer for
each task on the feature map before pooling, and an unmodified classifier with a column for each task.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, saliency_regularizer

from .arguments import folder_name, whole_number
from .extras import need
from .runs import machine, new_run_folder, now, versions, write_json
from .step_statistics import interval, median, ratio

__all__ = ["main"]

SCHEMA_VERSION = 1
HEADS, COLUMNS = "a head for each task", "one classifier with a column per task"
#: What is timed: shape of the model, and whether with the regularizer and with surgery.
KINDS = {
    f"{shape}, {label}": (shape, regularizes, surgery)
    for shape in (HEADS, COLUMNS)
    for label, regularizes, surgery in (
        ("plain", False, False),
        ("with the regularizer", True, False),
        ("with the regularizer w/ PCGrad (feature)", True, True),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write results.json, and return the exit code."""
    options = _parser().parse_args(arguments)
    for module in ("numpy", "tqdm", "timm"):
        need(module)
    torch.set_num_threads(options.threads)
    logging.getLogger("saliency_reg").setLevel(logging.ERROR)  # linear classifiers are timed on purpose
    folder = new_run_folder(options.out, options.name)
    rows: list[dict[str, Any]] = []
    result = {
        "schema_version": SCHEMA_VERSION,
        "date": now(),
        "options": {key: value for key, value in vars(options).items() if key not in ("out", "name")},
        "versions": versions(),
        "machine": machine(),
        "rows": rows,
    }
    try:
        for backbone in options.backbones:
            for tasks in options.tasks:
                rows += _measure(backbone, tasks, options)
                write_json(folder / "results.json", result)
    except KeyboardInterrupt:
        print("\nInterrupted; what follows is what was finished.")
    print(_table(rows))
    print(f"\nBatch {options.batch_size}, {options.threads} thread(s). Written to {folder}: results.json")
    return 0


def _measure(backbone: str, tasks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    steps: dict[str, Callable[[], None]] = {}
    size = 0
    for name, (shape, regularizes, surgery) in KINDS.items():
        steps[name], size = _step(backbone, tasks, shape, regularizes, surgery, options.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    rounds = need("tqdm").tqdm(range(options.steps + options.warmup), desc=f"{backbone}, {tasks} tasks", disable=None)
    for round_ in rounds:
        for place in range(len(names)):
            name = names[(place + round_) % len(names)]
            before = time.process_time()
            steps[name]()
            if round_ >= options.warmup:
                seconds[name].append(time.process_time() - before)
    return [
        {
            "backbone": backbone,
            "image_size": size,
            "tasks": tasks,
            "kind": name,
            "steps_counted": options.steps,
            "median_seconds": median(seconds[name]),
            "ratio_to_plain": ratio(seconds[name], seconds[f"{shape}, plain"]),
        }
        for name, (shape, regularizes, _) in KINDS.items()
        if regularizes
    ]


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

    def step() -> None:
        optimizer.zero_grad()
        loss = _loss(model, images, labels)
        if regularizer is not None:
            loss = loss + regularizer()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step, size


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    outputs = model(images)
    logits = outputs if isinstance(outputs, Tensor) else torch.stack(list(outputs.values()), dim=1)
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return losses.mean(0).sum()


def _table(rows: Sequence[dict[str, Any]]) -> str:
    titles = ("backbone", "image", "tasks", "step", "seconds", "time over the plain step")
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for row in rows:
        cells = (
            row["backbone"],
            f"{row['image_size']}x{row['image_size']}",
            str(row["tasks"]),
            row["kind"],
            f"{row['median_seconds']:.2f}",
            interval(row["ratio_to_plain"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
    for name, default, text in (
        ("--steps", 10, "counted steps of each kind"),
        ("--warmup", 2, "steps before that"),
        ("--batch-size", 8, "images per step"),
        ("--threads", 1, "of torch"),
    ):
        parser.add_argument(name, type=count, default=default, metavar="N", help=f"{text} (default: {default})")
    folder = Path("runs/timm_overhead")
    parser.add_argument("--out", type=Path, default=folder, metavar="FOLDER", help=f"where runs go (default: {folder})")
    parser.add_argument("--name", type=folder_name, help="of the run's folder (default: the present time)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
