"""A small problem with tasks of every kind and missing labels, and one training on it without anything random."""

import copy
import math

import pytest
import torch
from torch import nn

from recipes.data.digits import Examples
from recipes.data.task_kinds import BINARY, TaskKind
from recipes.methods.methods import METHODS
from recipes.training.options import Options
from recipes.training.train import Data, train

NAN = math.nan
MIXED = {"yes": BINARY, "which": TaskKind("classes", 3), "much": TaskKind("number", mean=2.0, spread=3.0)}
ALL_BINARY = dict.fromkeys(("one", "two", "three"), BINARY)
KINDS = pytest.mark.parametrize("kinds", [MIXED, ALL_BINARY], ids=["mixed", "binary"])
SAMPLES, RATE = 14, 0.05


class Net(nn.Module):
    def __init__(self, kinds, dtype=torch.float64):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.heads = nn.ModuleDict({task: head(kind.classes) for task, kind in kinds.items()})
        self.to(dtype)

    def forward(self, inputs):
        feature = self.backbone(inputs)
        return {task: head(feature) for task, head in self.heads.items()}


def head(classes):
    last = nn.Flatten(0) if classes == 1 else nn.Identity()
    return nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, classes), last)


def drawn(kinds, count=SAMPLES, missing=0.4, seed=0, dtype=torch.float64):
    """Inputs and labels; the first sample has no label at all, and the second one has all."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator, dtype=dtype)
    columns = []
    for column, kind in enumerate(kinds.values()):
        if kind.name == "number":
            columns.append(4 * inputs[:, 0] + 1)
        else:
            columns.append((inputs[:, column] > 0).to(dtype) * max(kind.classes - 1, 1))
    labels = torch.stack(columns, dim=1)
    hidden = torch.rand(labels.shape, generator=generator) < missing
    hidden[0], hidden[1] = True, False
    return inputs, torch.where(hidden, NAN, labels)


def slow_loss(kind, output, label):
    """Of one sample, from the definitions."""
    if kind.name == "binary":
        chance = torch.sigmoid(output)
        return -torch.log(chance if label == 1 else 1 - chance)
    if kind.name == "classes":
        return -torch.log(output.exp()[int(label)] / output.exp().sum())
    return ((output * kind.spread + kind.mean - label) / kind.spread) ** 2


def slow_total(model, kinds, inputs, labels):
    """Sum over the tasks of the mean loss over the samples with a label."""
    total = torch.zeros((), dtype=inputs.dtype)
    for column, (task, kind) in enumerate(kinds.items()):
        known = [row for row in range(len(inputs)) if not math.isnan(labels[row, column])]
        losses = [slow_loss(kind, model(inputs[row : row + 1])[task][0], labels[row, column]) for row in known]
        if losses:
            total = total + sum(losses) / len(losses)
    return total


def net(kinds, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Net(kinds, dtype)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def examples(inputs, labels):
    return Examples(inputs, labels, tuple(range(len(inputs))))


def trained(
    kinds,
    inputs,
    labels,
    key="hard_sharing",
    value=0.0,
    model=None,
    folder=None,
    resume="never",
    tested=True,
    **options,
):
    """One training with plain gradient descent, without anything random."""
    options = {
        "epochs": 1,
        "batch_size": len(inputs),
        "learning_rate": RATE,
        "decay": "constant",
        "evaluations": 1,
        "seed": 3,
        **options,
    }
    held_out = examples(*drawn(kinds, 20, 0.2, seed=5, dtype=inputs.dtype))
    return train(
        lambda: net(kinds, dtype=inputs.dtype) if model is None else copy.deepcopy(model),
        Data(kinds, examples(inputs, labels), held_out, held_out if tested else None),
        METHODS[key],
        value,
        Options(**options),
        folder=folder,
        resume=resume,
        make_optimizer=lambda model, rate, decay: torch.optim.SGD(model.parameters(), lr=rate),
    )
