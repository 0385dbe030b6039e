"""Passes through the backbone, gradients that are held, accumulation, and graphs that are freed."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency_reg import ParameterSurgery, PCGrad, SaliencyRegularizer
from tests.reference.slow_surgery import flat_gradient

from .support import TASKS, Net, assert_same, data, gradients, losses_of, make, penalty_of

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("options", [{}, {"measure": "upper"}, {"chunk_size": 2}], ids=str)
def test_every_third_step(options: dict[str, Any]) -> None:
    model = make()
    surgery = ParameterSurgery(model, every=3, **options)
    shared = [*model.lower.parameters(), *model.upper.parameters()]
    measured = list(model.upper.parameters()) if "measure" in options else shared
    for step in range(8):
        model.zero_grad()
        losses = losses_of(model, step)
        if step % 3 == 0:
            rows = torch.stack([flat_gradient(loss, measured) for loss in losses.values()])
            weighting = PCGrad()
            weighting.calls.fill_(step // 3)
            weighting.load_state_dict(weighting.state_dict())
            weights = weighting(rows @ rows.T)
        wanted = sum(w * flat_gradient(loss, shared) for w, loss in zip(weights, losses.values()))
        plain = torch.autograd.grad(
            sum(losses.values()) + penalty_of(model), model.heads["b"].weight, retain_graph=True
        )[0]
        extra = flat_gradient(penalty_of(model), shared)
        surgery.backward(losses, penalty_of(model))
        torch.testing.assert_close(
            torch.cat([p.grad.reshape(-1) for p in shared]), wanted + extra, rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(model.heads["b"].weight.grad, plain)
        torch.testing.assert_close(surgery.report.weights, weights)


class Counting(torch.autograd.Function):
    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Counting.passes += 1
        return gradient


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, [5, 5, 5]),
        ({"every": 2}, [5, 1, 5]),
        ({"measure": "upper"}, [1, 1, 1]),
        ({"chunk_size": 2}, [7, 7, 7]),
    ],
    ids=str,
)
def test_passes_through_the_backbone(options: dict[str, Any], passes: list[int]) -> None:
    model = make()
    model.lower.register_forward_hook(lambda module, args, output: Counting.apply(output))
    surgery = ParameterSurgery(model, **options)
    found = []
    for step in range(3):
        Counting.passes = 0
        x, targets = data(step)
        outputs = model(x)
        penalty = 1e-3 * sum(output.square().sum() for output in outputs.values())
        surgery.backward({task: (outputs[task] - targets[task]).square().mean() for task in TASKS}, penalty)
        found.append(Counting.passes)
    assert found == passes


@pytest.mark.parametrize(
    ("options", "most"), [({}, 3), ({"chunk_size": 1}, 1), ({"chunk_size": 2}, 2), ({"measure": "upper"}, 3)], ids=str
)
def test_how_many_task_gradients_are_held(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], most: int) -> None:
    """At most T, or ``chunk_size + 1`` including the one that is being taken."""
    model = make()
    surgery = ParameterSurgery(model, **options)
    grad, counts = torch.autograd.grad, []
    alive: list[weakref.ref[Tensor]] = []

    def counted(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        counts.append(sum(reference() is not None for reference in alive))
        found = grad(*args, **kwargs)
        alive.extend(weakref.ref(gradient) for gradient in found if gradient.shape == model.upper.weight.shape)
        return found

    losses = losses_of(model)
    monkeypatch.setattr(torch.autograd, "grad", counted)
    surgery.backward(losses)
    assert max(counts) == most


@pytest.mark.parametrize("with_penalty", [False, True])
@pytest.mark.parametrize("options", [{}, {"measure": "upper"}, {"every": 2}, {"every": 2, "measure": "upper"}], ids=str)
def test_accumulation_equals_the_big_batch(options: dict[str, Any], with_penalty: bool) -> None:
    model, twin = make(), make()
    surgery, whole = ParameterSurgery(model, **options), ParameterSurgery(twin, **options)
    parts = [slice(0, 8), slice(8, 16), slice(16, 24)]
    for step in range(4):
        model.zero_grad()
        twin.zero_grad()
        for number, part in enumerate(parts):
            assert model.lower.weight.grad is None
            penalty = penalty_of(model) / 3 if with_penalty else None
            surgery.backward(losses_of(model, step, part, 1 / 3), penalty, accumulate=number < 2)
        whole.backward(losses_of(twin, step), penalty_of(twin) if with_penalty else None)
        assert_same(gradients(model), gradients(twin))
        assert model.lower.weight.grad is not None


@pytest.mark.parametrize(
    "options", [{}, {"every": 2}, {"measure": "upper"}, {"shared": ["lower", "upper"], "every": 2}], ids=str
)
def test_micro_batches_with_one_task_each(options: dict[str, Any]) -> None:
    model, twin = make(), make()
    surgery, whole = ParameterSurgery(model, tasks=TASKS, **options), ParameterSurgery(twin, **options)
    for step in range(3):
        model.zero_grad()
        twin.zero_grad()
        for number, task in enumerate(TASKS):
            surgery.backward({task: losses_of(model, step)[task]}, accumulate=number < 3)
        whole.backward(losses_of(twin, step))
        assert_same(gradients(model), gradients(twin))


# Graphs.


@pytest.mark.parametrize("options", [{}, {"measure": "upper"}, {"chunk_size": 2}], ids=str)
def test_the_backbones_graph_is_freed(options: dict[str, Any]) -> None:
    model = make()
    kept = []

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        result = output * 1.0
        hidden = result.exp()  # saves its result
        kept.append(hidden.grad_fn)
        return hidden

    model.lower.register_forward_hook(note)
    losses = losses_of(model)
    ParameterSurgery(model, **options).backward(losses, penalty_of(model))
    with pytest.raises(RuntimeError, match="freed|been released|second time"):
        torch.autograd.grad(losses["a"], model.lower.weight)
    with pytest.raises(RuntimeError):
        _ = kept[0]._saved_result


def test_with_the_penalty_of_a_regularizer() -> None:
    class Smooth(Net):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict(
                {task: nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1)) for task in TASKS}
            )

    torch.manual_seed(0)
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    regularizer = SaliencyRegularizer(model, heads="heads", strength=3.0, optimizer=optimizer, metric="l1")
    surgery = ParameterSurgery(model, optimizer=optimizer)
    for step in range(3):
        optimizer.zero_grad()
        losses = losses_of(model, step)
        penalty = regularizer()
        (reach,) = torch.autograd.grad(penalty, model.lower.weight, retain_graph=True)
        assert reach.abs().max() > 1e-6
        rows = [flat_gradient(loss, [model.lower.weight]) for loss in losses.values()]
        surgery.backward(losses, penalty)
        wanted = sum(w * row for w, row in zip(surgery.report.weights, rows)).view(8, 6) + reach
        torch.testing.assert_close(model.lower.weight.grad, wanted)
        optimizer.step()
    assert not torch.equal(surgery.weights, torch.ones(4))


def test_checkpointed_backbone() -> None:
    model, twin = make(), make()
    layer = model.lower.forward
    model.lower.forward = lambda x: checkpoint(layer, x, use_reentrant=False)
    ParameterSurgery(model).backward(losses_of(model))
    ParameterSurgery(twin).backward(losses_of(twin))
    assert_same(gradients(model), gradients(twin))
