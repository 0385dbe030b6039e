"""Small models of every kind that a report has to look at, their labels, and the same for the slow reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, GradNorm, RelationReport, RepMTL, SaliencyRegularizer, relation_report

from .slow import SlowReport, Step

TASKS = ("first", "second", "third", "fourth")


class Doubling(nn.Module):
    """Works in place on a copy of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone().mul_(2)


class Net(nn.Module):
    """A backbone, and heads or one head with columns."""

    def __init__(self, backbone: nn.Module, heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads

    def forward(self, x: Tensor) -> Any:
        return self.from_feature(self.backbone(x))

    def from_feature(self, feature: Tensor) -> Any:
        if isinstance(self.heads, nn.ModuleDict):
            return {task: head(feature) for task, head in self.heads.items()}
        return self.heads(feature)


@dataclass
class Case:
    make: Callable[[], Net]
    kinds: tuple[str, ...]
    columns: dict[str, Any] | None = None
    shape: tuple[int, ...] = (5,)

    def per_task(self, outputs: Any) -> list[Tensor]:
        if isinstance(outputs, dict):
            return list(outputs.values())
        if self.columns is None:
            return list(outputs.unbind(1))
        return [outputs[:, self.columns[task]] for task in TASKS]


def mlp(width: int, inputs: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, width))


def _vector() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh())


def _map() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh())


def _heads(make: Callable[[int], nn.Module], widths: Sequence[int]) -> nn.ModuleDict:
    return nn.ModuleDict({task: make(width) for task, width in zip(TASKS, widths)})


BINARY = ("binary",) * 4
MIXED = ("binary", "number", "class", "class")
WIDTHS = (1, 1, 3, 4)
GROUPS = {"first": 0, "second": 1, "third": slice(2, 5), "fourth": slice(5, 9)}

CASES = {
    "heads": Case(lambda: Net(_vector(), _heads(mlp, WIDTHS)), MIXED),
    "heads that work in place": Case(
        lambda: Net(_vector(), _heads(lambda w: nn.Sequential(Doubling(), mlp(w)), WIDTHS)), MIXED
    ),
    "linear heads": Case(lambda: Net(_vector(), _heads(lambda w: nn.Linear(6, w), WIDTHS)), MIXED),
    "linear columns": Case(lambda: Net(_vector(), nn.Linear(6, 4)), BINARY),
    "linear columns with classes": Case(lambda: Net(_vector(), nn.Linear(6, 9)), MIXED, GROUPS),
    "columns": Case(lambda: Net(_vector(), mlp(4)), ("binary", "number", "binary", "number")),
    "columns with classes": Case(lambda: Net(_vector(), mlp(9)), MIXED, GROUPS),
    "map": Case(
        lambda: Net(_map(), _heads(lambda w: nn.Sequential(nn.Conv2d(4, 3, 2), nn.Flatten(), mlp(w, 12)), WIDTHS)),
        MIXED,
        shape=(2, 4, 4),
    ),
    "batch norm": Case(
        lambda: Net(_vector(), _heads(lambda w: nn.Sequential(nn.BatchNorm1d(6), mlp(w)), WIDTHS)), MIXED
    ),
}


def build(case: str) -> Net:
    torch.manual_seed(4)
    return CASES[case].make().double()


def attach(kind: str, model: nn.Module, case: str, **options: Any) -> Any:
    columns = CASES[case].columns
    arguments: dict[str, Any] = {"heads": "heads", **options}
    if not isinstance(getattr(model, "module", model).heads, nn.ModuleDict):
        arguments |= {"columns": columns} if columns else {"tasks": TASKS}
    if kind == "regularizer":
        return SaliencyRegularizer(model, strength=0.1, **arguments)
    if kind == "regularizer with surgery":
        from saliency_reg import PCGrad

        return SaliencyRegularizer(model, strength=0.1, surgery=PCGrad(), **arguments)
    return {"surgery": FeatureSurgery, "gradnorm": GradNorm, "rep_mtl": RepMTL}[kind](model, **arguments)


def data(case: str, update: int, size: int = 7) -> tuple[Tensor, Tensor]:
    """Inputs, and labels ``[B, T]`` that are related, a third of them missing."""
    one = CASES[case]
    generator = torch.Generator().manual_seed(100 + update)
    x = torch.randn(size, *one.shape, generator=generator, dtype=torch.float64)
    score = x.flatten(1)[:, :4] + x.flatten(1)[:, :1]
    columns = []
    for task, kind in enumerate(one.kinds):
        if kind == "binary":
            columns.append((score[:, task] > 0).double())
        elif kind == "number":
            columns.append(3 + score[:, task])
        else:
            columns.append((score[:, task] + 1).round().clamp(0, (3, 4)[task % 2]).clamp(max=WIDTHS[task] - 1))
    labels = torch.stack(columns, 1)
    missing = torch.rand(labels.shape, generator=generator) < 0.3
    if update % 3 == 1:
        missing[:, 2] = True  # a task without labels in this batch
    return x, labels.masked_fill(missing, torch.nan)


def changed(model: nn.Module, update: int) -> None:
    """Move the weights, as a training would."""
    generator = torch.Generator().manual_seed(update)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def rows(labels: Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in labels.tolist()]


def snapshot(model: Net, case: str, x: Tensor, labels: Tensor, distances: Tensor | None = None) -> Step:
    twin = copy.deepcopy(model)
    feature = twin.backbone(x).detach()
    return Step(feature, lambda feature: CASES[case].per_task(twin.from_feature(feature)), rows(labels), distances)


def both(case: str, kind: str, updates: int, size: int = 7, **options: Any) -> tuple[RelationReport, SlowReport, Any]:
    """Return a report and the slow one after some updates, and what they looked at."""
    model = build(case)
    source = attach(kind, model, case)
    report = relation_report(source, kinds=CASES[case].kinds, **options)
    slow = SlowReport(CASES[case].kinds, **{key: options[key] for key in ("decay", "tag_every") if key in options})
    for update in range(updates):
        x, labels = data(case, update, size)
        model(x)
        if kind.startswith("regularizer"):
            source()
        report.update(labels)
        distances = source.report.distances if kind.startswith("regularizer") else None
        slow.steps.append(snapshot(model, case, x, labels, distances))
        changed(model, update)
    return report, slow, source
