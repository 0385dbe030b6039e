"""What counts as a sample: padding, and heads that read some rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer, errors, task_distances, task_saliencies
from tests.reference.slow import slow_distances

from .support import Behind, Net, called, mlp, plain

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("metric", ["l1", "cosine"])
@pytest.mark.parametrize(
    "kind", ["linear heads", "columns", "mlp", "tokens", "tokens, a mask of samples", "tokens, mean"]
)
def test_rows_of_padding_do_not_count(kind: str, metric: str, reduction: str) -> None:
    tokens = kind.startswith("tokens")
    options: dict[str, Any] = {"metric": metric, "reduction": reduction}
    if kind == "columns":
        net: nn.Module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        options |= {"tasks": list("abc")}
    else:
        net = plain({task: nn.Linear(6, 1) if kind == "linear heads" else mlp(6, 1) for task in "abc"})
    if kind == "tokens, mean":
        options["pool"] = "mean"
    heads = "2" if kind == "columns" else "heads"
    x = torch.randn(6, 5, 4) if tokens else torch.randn(6, 4)
    real = torch.tensor([True, False, True, True, False, True])
    mask = torch.randint(2, (6, 5), generator=torch.Generator().manual_seed(1)) if tokens else real
    mask = real if kind == "tokens, a mask of samples" else mask * real[:, None] if tokens else mask
    if tokens and mask.ndim == 2:
        mask[real, 0] = 1
    with_padding = SaliencyRegularizer(net, heads=heads, strength=1.0, **{"metric": "l1", **options})
    net(x)
    penalty = with_padding(mask=mask)
    with_padding.remove()
    alone = SaliencyRegularizer(net, heads=heads, strength=1.0, **{"metric": "l1", **options})
    net(x[real])
    expected = alone(mask=mask[real] if mask.ndim == 2 else None)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(with_padding.report.distances, alone.report.distances)
    assert with_padding.report.samples.tolist() == [4, 4, 4]
    parameters = [each for each in net.parameters() if each.requires_grad]
    ours, theirs = (torch.autograd.grad(each, parameters, allow_unused=True) for each in (penalty, expected))
    for one, other in zip(ours, theirs):
        assert (one is None and other is None) or torch.allclose(one, other)


@pytest.mark.parametrize("heads", ["linear", "mlp"])
def test_a_batch_of_padding_alone(heads: str) -> None:
    net = plain({task: nn.Linear(6, 1) if heads == "linear" else mlp(6, 1) for task in "ab"})
    regularizer = called(net, torch.randn(3, 4), mask=torch.zeros(3))
    assert regularizer.report.penalty == 0
    assert regularizer.report.samples.tolist() == [0, 0]
    before = regularizer.relations.matrix()
    regularizer.step()
    assert torch.equal(regularizer.relations.matrix(), before)


def test_masks_of_another_shape_are_refused() -> None:
    net = plain({"a": mlp(6, 1), "b": mlp(6, 1)})
    with pytest.raises(errors.ShapeError, match=r"Pass one value per sample, \[3\]"):
        called(net, torch.randn(3, 4), mask=torch.ones(3, 6))
    with pytest.raises(errors.ShapeError, match=r"expected \[3, 5\].*or \[3\]"):
        called(net, torch.randn(3, 5, 4), mask=torch.ones(5))
    with pytest.raises(errors.ShapeError, match=r"mask must be \[2\]"):
        task_distances(torch.ones(2, 2, 3), mask=torch.ones(3))


# Heads that read some rows, or pool them.


class Routed(nn.Module):
    def __init__(self, rows: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone, self.rows = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), rows
        self.heads = nn.ModuleDict({task: mlp(6, 1) for task in rows})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.backbone(x)
        return {task: head(feature[self.rows[task]]) for task, head in self.heads.items()}


APART = {"a": torch.arange(0, 4), "b": torch.arange(4, 9)}

APART_ALIKE = {"a": torch.arange(0, 4), "b": torch.arange(4, 8)}

OVERLAPPING = {"a": torch.arange(0, 6), "b": torch.arange(3, 9), "c": torch.arange(9)}

SAME = {"a": torch.tensor([0, 3, 4]), "b": torch.tensor([0, 3, 4])}


@pytest.mark.parametrize("rows", [APART, APART_ALIKE, OVERLAPPING])
@pytest.mark.parametrize("way", ["plain", "function", "loss"])
def test_heads_on_rows_of_their_own_are_refused(rows: dict[str, Tensor], way: str) -> None:
    net = Routed(rows)
    options: dict = {"plain": {}, "function": {"scalarize": lambda z: z}, "loss": {"target": "loss"}}[way]
    regularizer = SaliencyRegularizer(net, feature="backbone", strength=1.0, **{"metric": "l1", **options})
    outputs = net(torch.randn(9, 4))
    with pytest.raises(errors.ShapeError, match=r"head\(feature\)\[rows\] in place of head\(feature\[rows\]\)"):
        regularizer(losses={task: output.square().mean() for task, output in outputs.items()})


def test_heads_on_the_same_rows_are_compared_over_these() -> None:
    net, x = Routed(SAME), torch.randn(9, 4)
    regularizer = SaliencyRegularizer(net, feature="backbone", strength=1.0, scalarize=lambda z: z, metric="l1")
    net(x)
    regularizer()
    feature = net.backbone(x[SAME["a"]])
    expected = task_distances(task_saliencies({task: head(feature) for task, head in net.heads.items()}, feature))
    torch.testing.assert_close(regularizer.report.distances, expected.detach())
    assert regularizer.report.samples.tolist() == [3, 3]


@pytest.mark.parametrize("dead", [{"a": [1], "b": [1]}, {"a": [0, 1], "b": [0]}, {"a": [1], "b": []}])
@pytest.mark.parametrize("way", ["function", "loss"])
def test_rows_that_heads_do_not_react_to_count(dead: dict[str, list[int]], way: str) -> None:
    net, x = Routed(SAME), torch.randn(9, 4)
    for task, rows in dead.items():
        alive = torch.ones(3, 1).index_fill(0, torch.tensor(rows, dtype=torch.int64), 0.0)
        net.heads[task] = Behind(net.heads[task], lambda z, alive=alive: z * alive)
    options = {"function": {"scalarize": lambda z: z}, "loss": {"target": "loss"}}[way]
    regularizer = SaliencyRegularizer(net, feature="backbone", strength=1.0, metric="sqeuclidean", **options)
    outputs = net(x)
    regularizer(losses={task: output.sum() / 9 for task, output in outputs.items()})
    feature = net.backbone(x[SAME["a"]]).detach().requires_grad_()
    rows = [torch.autograd.grad(head(feature).sum(), feature)[0] for head in net.heads.values()]
    expected = slow_distances([list(row) for row in rows], "sqeuclidean", "mean")
    torch.testing.assert_close(regularizer.report.distances, expected)
    assert regularizer.report.samples.tolist() == [3, 3]
    assert expected[0, 1] > 0


class TopOne(nn.Module):
    """Reads one row of each set: that with the highest score."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.net = nn.Linear(6, 1), mlp(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        sets = x.view(3, 4, 6)
        best = self.score(sets).argmax(1, keepdim=True)
        return self.net(sets.gather(1, best.expand(-1, 1, 6)).squeeze(1))


@pytest.mark.parametrize("options", [{}, {"feature": "backbone"}])
def test_heads_that_choose_rows_within_are_compared_over_all(options: dict[str, str]) -> None:
    net, x = plain({"a": TopOne(), "b": TopOne()}), torch.randn(12, 4)
    regularizer = called(net, x, scalarize=lambda output: output.sum(-1), **options)
    feature = net.backbone(x).detach().requires_grad_()
    rows = [torch.autograd.grad(head(feature).sum(), feature)[0] for head in net.heads.values()]
    assert not torch.equal(rows[0].any(1), rows[1].any(1))
    expected = slow_distances([list(row) for row in rows], "l1", "mean")
    torch.testing.assert_close(regularizer.report.distances, expected)
    assert regularizer.report.samples.tolist() == [12, 12]


def test_heads_that_pool_graphs() -> None:
    graph = torch.tensor([0, 0, 1, 1, 1, 2])

    def pooled(nodes: Tensor) -> Tensor:
        return torch.zeros(3, nodes.shape[1]).index_add(0, graph, nodes)

    net = Net(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), {t: Behind(mlp(6, 1), pooled) for t in "ab"})
    x = torch.randn(6, 4)
    with pytest.raises(errors.ShapeError, match=r"pools rows \(nodes of graphs, sets\).*scalarize=lambda output"):
        called(net, x)
    found = called(net, x, scalarize=lambda output: output.sum(-1)).report
    feature = net.backbone(x)
    outputs = {task: head.inner(feature) for task, head in net.heads.items()}
    torch.testing.assert_close(found.distances, task_distances(task_saliencies(outputs, feature)).detach())
    assert found.samples.tolist() == [6, 6]
