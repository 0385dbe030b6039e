"""Mean-regularised multi-task learning: its closed form, and the saliency penalty that it equals on ``Linear`` heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import HeadPenalty, SaliencyRegularizer
from tests.support.attachment import uniform

from .support import Heads, deep_heads, first_weights, linear_heads, make

pytestmark = pytest.mark.usefixtures("float64")


def test_least_squares_with_data_of_their_own_have_a_closed_form() -> None:
    tasks, width, ridge, strength = 3, 4, 0.05, 0.7
    xs = [torch.randn(10 + 5 * t, width) for t in range(tasks)]
    ys = [torch.randn(len(x)) for x in xs]
    grams = [x.T @ x / len(x) for x in xs]
    system = torch.block_diag(*grams) + (ridge + strength) * torch.eye(tasks * width)
    system -= strength / tasks * torch.kron(torch.ones(tasks, tasks), torch.eye(width))
    solution = torch.linalg.solve(system, torch.cat([x.T @ y / len(x) for x, y in zip(xs, ys)])).view(tasks, width)
    model = Heads(lambda task: nn.Linear(width, 1, bias=False))
    penalty = HeadPenalty(model, "heads", kind="mean", strength=strength, ridge=ridge)  # needs no optimizer

    def gradient() -> Tensor:
        model.zero_grad()
        losses = [(head(x)[:, 0] - y).square().mean() for head, x, y in zip(model.heads.values(), xs, ys)]
        (sum(losses) + penalty()).backward()
        return torch.stack([head.weight.grad[0] for head in model.heads.values()])

    assert gradient().norm() > 0.1
    with torch.no_grad():
        for head, row in zip(model.heads.values(), solution):
            head.weight.copy_(row[None])
    assert gradient().norm() < 1e-12
    assert penalty.zeros == 0


def test_it_is_the_saliency_penalty_with_equal_weights_times_the_tasks() -> None:
    model = linear_heads()
    x = torch.randn(5, 4, requires_grad=True)
    own = HeadPenalty(model, "heads", kind="mean", strength=0.3)
    saliency = SaliencyRegularizer(model, "heads", strength=0.1, metric="sqeuclidean", relations=uniform(3))
    model(x)
    weights = [head.weight for head in model.heads.values()]
    values = [(value, *torch.autograd.grad(value, weights)) for value in (own(), saliency())]
    for one, other in zip(*values):  # 3 tasks: sum over pairs = 3 * sum over tasks
        torch.testing.assert_close(one, other)


def test_it_counts_the_deeper_weights_up_to_one_of_another_shape() -> None:
    for last, layers in ((lambda task: 1, [0, 3, 4]), (lambda task: len(task) + (task == "b"), [0, 3])):
        model = deep_heads(last=last)
        penalty = HeadPenalty(model, "heads", kind="mean", strength=2.0)
        expected = 0
        for layer in layers:
            weights = torch.stack([head[layer].weight.detach() for head in model.heads.values()])
            expected = expected + 2 * (weights - weights.mean(0)).square().sum()
        torch.testing.assert_close(penalty().detach(), expected)
        assert penalty.weight_names == tuple(f"heads.{task}.{layer}.weight" for layer in layers for task in "abc")
        assert torch.autograd.gradcheck(
            lambda *_, own=penalty: own(), tuple(head[3].weight for head in model.heads.values())
        )


@pytest.mark.parametrize("kind", ["mean", "mrn", "mtrl", "lasso", "l21"])
def test_one_layer_of_all_tasks_is_as_good_as_a_layer_for_each(kind: str) -> None:
    apart = Heads(lambda task: nn.Linear(4, 2))
    joint = nn.ModuleDict({"heads": nn.Linear(4, 6)})
    order = [4, 1, 0, 2, 5, 3]
    with torch.no_grad():
        joint["heads"].weight[order] = torch.cat([head.weight for head in apart.heads.values()])
    columns = {task: order[2 * t : 2 * t + 2] for t, task in enumerate("abc")}
    values = []
    for model, options in ((apart, {}), (joint, {"columns": columns})):
        steady = {"update_steps": 1} if kind in ("mrn", "mtrl") else {}
        penalty, optimizer = make(model, kind, 0.2, **options, **steady)
        for _ in range(2):
            optimizer.zero_grad()
            value = penalty()
            if value.requires_grad:
                value.backward()
            optimizer.step()
        values.append(penalty().detach())
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(joint["heads"].weight[order].view(3, 8), first_weights(apart))


@pytest.mark.parametrize("kind", ["mean", "mrn", "mtrl", "lasso", "l21"])
def test_the_order_of_the_tasks_does_not_matter(kind: str) -> None:
    torch.manual_seed(3)
    model = Heads(lambda task: nn.Linear(4, 2))
    found = []
    for order in ("abc", "cab"):
        torch.manual_seed(3)
        model = Heads(lambda task: nn.Linear(4, 2))
        steady = {"update_steps": 1} if kind in ("mrn", "mtrl") else {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        heads = {task: f"heads.{task}" for task in order}
        penalty = HeadPenalty(model, heads, kind=kind, strength=0.2, optimizer=optimizer, **steady)
        for _ in range(3):
            optimizer.zero_grad()
            if (value := penalty()).requires_grad:
                value.backward()
            optimizer.step()
        relations = None
        if steady:
            places = [order.index(task) for task in "abc"]
            relations = penalty.relations[places][:, places]
        found.append((first_weights(model), penalty().detach(), relations))
    torch.testing.assert_close(found[0], found[1])
