"""Which parameters several tasks share, and how the others get their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import ParameterSurgery, PCGrad
from tests.reference.slow_surgery import flat_gradient, split_like, textbook_pcgrad

from .support import TASKS, Net, assert_same, expected, gradients, losses_of, make, order_of, penalty_of

pytestmark = pytest.mark.usefixtures("float64")


def test_a_task_may_be_missing() -> None:
    model = make()
    surgery = ParameterSurgery(model, tasks=TASKS)
    for call, absent in enumerate([("b",), ("b", "d")]):
        model.zero_grad()
        losses = {task: loss for task, loss in losses_of(model, 1).items() if task not in absent}
        order = order_of(call)
        rows = [task for task in range(4) if TASKS[task] not in absent]
        # The order among those that are there: a zero gradient changes nothing.
        among = [[rows.index(int(other)) for other in order[task] if int(other) in rows] for task in rows]
        wanted = expected(model, losses, among)
        surgery.backward(losses)
        assert_same(gradients(model), wanted)
        assert all(gradients(model)[f"heads.{task}.weight"] is None for task in absent)
        assert surgery.report.weights.isnan().tolist() == [task in absent for task in TASKS]


def test_a_single_task_gets_its_plain_gradient_and_none_only_the_penalty() -> None:
    for options in ({}, {"shared": ["lower", "upper"]}, {"measure": "upper"}, {"chunk_size": 2}):
        model = make()
        surgery = ParameterSurgery(model, tasks=TASKS, **options)
        surgery.backward({"b": losses_of(model)["b"]}, penalty_of(model))
        twin = make()
        (losses_of(twin)["b"] + penalty_of(twin)).backward()
        assert_same(gradients(model), gradients(twin))
        model.zero_grad()
        twin.zero_grad()
        surgery.backward({}, penalty_of(model))
        penalty_of(twin).backward()
        assert_same(gradients(model), gradients(twin))
        assert surgery.report is None


class Uneven(Net):
    """Tasks a and b share a part that c and d do not have; d reads the lower layer."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = torch.tanh(self.lower(x))
        high = torch.tanh(self.upper(low))
        part = torch.tanh(self.middle(high))
        inputs = {"a": part, "b": part + low, "c": high, "d": low}
        return {task: self.heads[task](feature) for task, feature in inputs.items()}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"measure": ["lower", "upper"]}], ids=str)
def test_partly_shared_modules(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Uneven()
    losses = losses_of(model)
    shared = [*model.lower.parameters(), *model.upper.parameters(), *model.middle.parameters()]
    measured = shared if "measure" not in options else shared[:4]
    gramian = torch.stack([flat_gradient(loss, measured) for loss in losses.values()])
    weights = PCGrad()(gramian @ gramian.T)
    assert (weights - 1).abs().max() > 0.1
    wanted = split_like(sum(w * flat_gradient(loss, shared) for w, loss in zip(weights, losses.values())), shared)
    ParameterSurgery(model, **options).backward(losses)
    for parameter, value in zip(shared, wanted):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-10, atol=1e-10)


def test_explicit_shared_leaves_the_rest_plain() -> None:
    model = make()
    losses = losses_of(model)
    shared = list(model.upper.parameters())
    wanted = textbook_pcgrad([flat_gradient(loss, shared) for loss in losses.values()], order_of())
    plain = torch.autograd.grad(sum(losses.values()), list(model.lower.parameters()), retain_graph=True)
    ParameterSurgery(model, shared=model.upper).backward(losses)
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in shared]), wanted, rtol=1e-10, atol=1e-10)
    for parameter, value in zip(model.lower.parameters(), plain):
        torch.testing.assert_close(parameter.grad, value)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"measure": "upper"}], ids=str)
def test_learned_loss_weights_outside_of_the_model(options: dict[str, Any]) -> None:
    model = make()
    scales = nn.Parameter(torch.linspace(0.5, 2, 4))
    losses = {task: loss * scales[i] for i, (task, loss) in enumerate(losses_of(model).items())}
    wanted = expected(model, losses, order_of(), None, {"upper": "upper."}.get(options.get("measure", ""), "er."))
    (plain,) = torch.autograd.grad(sum(losses.values()), scales, retain_graph=True)
    ParameterSurgery(model, **options).backward(losses)
    assert_same(gradients(model), wanted)
    torch.testing.assert_close(scales.grad, plain)


def test_one_gradient_for_two_parameters_is_not_one_tensor() -> None:
    class Biases(Net):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(1))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {task: output + (self.one + self.two) for task, output in super().forward(x).items()}

    torch.manual_seed(0)
    model = Biases()
    surgery = ParameterSurgery(model, shared=["lower", "upper"])
    losses = losses_of(model)
    (plain,) = torch.autograd.grad(sum(losses.values()), model.one, retain_graph=True)
    surgery.backward(losses)
    torch.testing.assert_close(model.one.grad, plain)
    torch.testing.assert_close(model.two.grad, plain)
    assert model.one.grad.untyped_storage().data_ptr() != model.two.grad.untyped_storage().data_ptr()
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in model.parameters())


def test_memory_format_and_sparse_gradients() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4, sparse=True)
            self.own = nn.Embedding(10, 4, sparse=True)
            self.convolution = nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last)

    torch.manual_seed(0)
    model = Words()
    words = torch.tensor([[1, 2, 2], [4, 5, 1], [7, 8, 9]])
    for options in ({}, {"chunk_size": 1}):
        model.zero_grad()
        image = model.convolution(model.table(words).permute(2, 0, 1)).tanh()
        losses = [(image * (k + 1)).cos().sum() + (model.own(words).sum().sin() if k == 0 else 0) for k in range(3)]
        shared = [model.table.weight, *model.convolution.parameters()]
        rows = [[g.to_dense() for g in torch.autograd.grad(loss, shared, retain_graph=True)] for loss in losses]
        flat = [torch.cat([g.reshape(-1) for g in row]) for row in rows]
        wanted = split_like(textbook_pcgrad(flat, order_of(0, 3)), shared)
        ParameterSurgery(model, **options).backward(losses)
        for parameter, value in zip(shared, wanted):
            torch.testing.assert_close(parameter.grad.to_dense(), value)
        assert model.own.weight.grad.is_sparse
        assert model.convolution.weight.grad.stride() == model.convolution.weight.stride()


def test_frozen_part() -> None:
    model = make()
    model.lower.requires_grad_(False)
    losses = losses_of(model)
    shared = list(model.upper.parameters())
    wanted = textbook_pcgrad([flat_gradient(loss, shared) for loss in losses.values()], order_of())
    ParameterSurgery(model).backward(losses)
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in shared]), wanted, rtol=1e-10, atol=1e-10)
    assert model.lower.weight.grad is None
