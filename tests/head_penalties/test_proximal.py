"""Lasso and L21: the proximal operators by brute force, and what trainings with them come to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saliency_reg import HeadPenalty
from saliency_reg.head_penalties.proximal import l1_step, l21_step

from .support import TASKS, Heads, first_weights, linear_heads, make

optimize: Any = pytest.importorskip("scipy.optimize")
linear_model: Any = pytest.importorskip("sklearn.linear_model")
pytestmark = pytest.mark.usefixtures("float64")


def brute_force(z: np.ndarray, threshold: float, g: Any) -> np.ndarray:
    """The minimum of ``1/2 |w - z|^2 + s g(w)`` by a search without derivatives, from several starts."""
    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 20000, "maxfev": 20000}
    starts = [z, 0 * z, 0.5 * z, 0.1 * z]
    objective = lambda w: 0.5 * ((w - z) ** 2).sum() + threshold * g(w)  # noqa: E731
    found = [optimize.minimize(objective, start, method="Nelder-Mead", options=options) for start in starts]
    return min(found, key=lambda one: one.fun).x


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("z", [[0.5, -1.5], [2.0, 0.2, -0.9], [0.0, 1.0, 0.0]])
def test_steps_are_the_minima(z: list[float], threshold: float) -> None:
    value = torch.tensor(z)
    l1 = l1_step(value[None], threshold)[0]
    np.testing.assert_allclose(l1.numpy(), brute_force(np.array(z), threshold, lambda w: abs(w).sum()), atol=1e-6)
    # One input; two heads with one and the other weights of it.
    l21 = torch.cat(l21_step([value[None, :1], value[None, 1:]], threshold), 1)[0]
    expected = brute_force(np.array(z), threshold, lambda w: np.sqrt((w**2).sum()))
    np.testing.assert_allclose(l21.numpy(), expected, atol=1e-6)
    if threshold >= value.norm():
        assert l21.eq(0).all()
        assert l1.eq(0).all()
    if threshold == 0:
        assert torch.equal(l1, value)
        assert torch.equal(l21, value)


def data(tasks: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(40, 6)
    weights = torch.randn(6, tasks) * torch.tensor([1.0, 0, 2, 0, 0.3, 0]).unsqueeze(1)
    return x, x @ weights + 0.1 * torch.randn(40, tasks) + torch.tensor([1.0, -2, 0])[:tasks]


def trained(model: nn.Module, heads: Any, kind: str, strength: float, steps: int = 1500, **options: Any) -> HeadPenalty:
    """Gradient descent on the mean square of all tasks, at a rate below ``1 / L``."""
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = HeadPenalty(model, heads, kind=kind, strength=strength, optimizer=optimizer, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        outputs = torch.cat(list(outputs.values()), 1) if isinstance(outputs, dict) else outputs
        ((outputs - y).square().mean(0).sum() + penalty()).backward()
        optimizer.step()
    return penalty


def gradients(model: nn.Module) -> Tensor:
    """``[T, D]``, of the losses alone, at the end."""
    x, y = data()
    model.zero_grad()
    (torch.cat(list(model(x).values()), 1) - y).square().mean(0).sum().backward()
    return torch.stack([head.weight.grad[0] for head in model.heads.values()])


@pytest.mark.parametrize("kind", ["lasso", "l21"])
@pytest.mark.parametrize("joint", [False, True])
def test_gradient_descent_comes_to_the_solution_of_sklearn(kind: str, joint: bool) -> None:
    x, y = data()
    strength = 0.4
    solver = linear_model.Lasso if kind == "lasso" else linear_model.MultiTaskLasso
    expected = solver(alpha=strength / 2, tol=1e-12, max_iter=100000).fit(x.numpy(), y.numpy())
    model = nn.Sequential(nn.Linear(6, 3)) if joint else linear_heads(6)
    penalty = trained(model, "0" if joint else "heads", kind, strength, tasks=TASKS)
    layer = model[0].weight.detach() if joint else first_weights(model)
    np.testing.assert_allclose(layer.numpy(), expected.coef_, atol=1e-7)
    assert torch.equal(layer.eq(0), torch.tensor(expected.coef_ == 0))
    zeros = (expected.coef_ == 0).mean()
    assert 0 < zeros < 1
    assert penalty.zeros == pytest.approx(zeros)
    value = penalty()
    assert not value.requires_grad
    norms = layer.abs().sum() if kind == "lasso" else layer.norm(dim=0).sum()
    torch.testing.assert_close(value, strength * norms)


def test_the_solutions_meet_their_conditions() -> None:
    lasso, l21 = linear_heads(6), linear_heads(6)
    trained(lasso, "heads", "lasso", 0.4)
    trained(l21, "heads", "l21", 0.4)
    weights, slopes = first_weights(lasso), gradients(lasso)
    used = weights != 0
    torch.testing.assert_close(slopes[used], -0.4 * weights[used].sign(), atol=1e-7, rtol=0)
    assert (slopes[~used].abs() <= 0.4).all()
    weights, slopes = first_weights(l21), gradients(l21)
    used = weights.norm(dim=0) != 0
    assert used.any()
    assert not used.all()
    torch.testing.assert_close(
        slopes[:, used], -0.4 * weights[:, used] / weights[:, used].norm(dim=0), atol=1e-7, rtol=0
    )
    assert (slopes[:, ~used].norm(dim=0) <= 0.4).all()


@pytest.mark.parametrize("kind", ["lasso", "l21"])
def test_from_the_largest_useful_strength_on_all_weights_are_zero(kind: str) -> None:
    x, y = data()
    slopes = -2 * x.T @ (y - y.mean(0)) / len(x)  # [D, T], at weights of 0 and fitted biases
    largest = float(slopes.abs().max() if kind == "lasso" else slopes.norm(dim=1).max())
    for share, expected in ((1.001, True), (0.98, False)):
        model = linear_heads(6)
        assert (trained(model, "heads", kind, share * largest).zeros == 1) == expected
        assert all(head.bias.abs() > 0.01 for head in model.heads.values())


def test_groups_are_the_inputs_of_heads_of_other_widths_and_the_channels_of_convolutions() -> None:
    model = Heads(lambda task: nn.Sequential(nn.Linear(4, {"a": 2, "b": 3, "c": 1}[task]), nn.Tanh(), nn.Linear(1, 1)))
    penalty, optimizer = make(model, "l21", 1.0, lr=0.5)
    before = torch.cat([head[0].weight.detach() for head in model.heads.values()])
    last = [head[2].weight.detach().clone() for head in model.heads.values()]
    optimizer.step()  # without gradients
    after = torch.cat([head[0].weight.detach() for head in model.heads.values()])
    torch.testing.assert_close(after, before * (1 - 0.5 / before.norm(dim=0)).clamp(min=0))
    assert all(torch.equal(head[2].weight, own) for head, own in zip(model.heads.values(), last))
    torch.testing.assert_close(penalty(), after.norm(dim=0).sum())
    for make_layer, axis in ((nn.Conv2d, 1), (nn.ConvTranspose2d, 0)):
        model = Heads(lambda task, layer=make_layer: layer(4, 2, 3), ("a", "b"))
        penalty, optimizer = make(model, "l21", 1.0, lr=0.5)
        layers = [head.weight.detach().clone().movedim(axis, 0) for head in model.heads.values()]
        norms = torch.cat([layer.flatten(1) for layer in layers], 1).norm(dim=1)
        optimizer.step()
        for head, layer in zip(model.heads.values(), layers):
            expected = (1 - 0.5 / norms).clamp(min=0)[:, None, None, None] * layer
            torch.testing.assert_close(head.weight.detach().movedim(axis, 0), expected)


@pytest.mark.parametrize("kind", ["lasso", "l21"])
def test_rows_of_no_task_stay(kind: str) -> None:
    model = nn.Sequential(nn.Tanh(), nn.Linear(4, 6))
    before = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    columns = {"a": [5, 0], "b": slice(2, 4)}
    penalty = HeadPenalty(model, "1", columns=columns, kind=kind, strength=0.2, optimizer=optimizer)
    rows = [5, 0, 2, 3]
    expected = l1_step(before[rows], 0.2) if kind == "lasso" else l21_step([before[rows].T], 0.2)[0].T
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach()[rows], expected)
    assert torch.equal(model[1].weight[[1, 4]], before[[1, 4]])
    assert penalty.zeros == pytest.approx(float(expected.eq(0).double().mean()))


def test_the_threshold_follows_the_rate_of_the_group_in_each_step() -> None:
    model = linear_heads()
    groups = [
        {"params": list(head.parameters()), "lr": rate} for head, rate in zip(model.heads.values(), (0.1, 0.2, 0))
    ]
    optimizer = torch.optim.Adam(groups)
    HeadPenalty(model, "heads", kind="lasso", strength=0.5, optimizer=optimizer).zeros  # noqa: B018  # not kept alive
    before = first_weights(model)
    optimizer.step()
    assert torch.equal(first_weights(model), before)
    penalty = HeadPenalty(model, "heads", kind="lasso", strength=0.5, optimizer=optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + step)
    for factor in (1, 2):
        before = first_weights(model)
        optimizer.step()
        schedule.step()
        expected = torch.cat([l1_step(row[None], 0.5 * factor * rate) for row, rate in zip(before, (0.1, 0.2, 0))])
        assert torch.equal(first_weights(model), expected)
    optimizer.load_state_dict(optimizer.state_dict())  # makes new groups
    optimizer.param_groups[0]["lr"] = torch.tensor(10.0)
    optimizer.step()
    assert first_weights(model)[0].eq(0).all()
    assert int(penalty.steps) == 3
