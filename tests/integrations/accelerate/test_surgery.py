"""``ParameterSurgery`` in a loop of Hugging Face accelerate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saliency_reg import ParameterSurgery, PCGrad, SaliencyRegularizer
from saliency_reg.integrations.accelerate import backward, register
from tests.support.training import TASKS, Net, batch, make_model
from tests.support.two_processes import run_on_two_processes

from .support import losses_of, one_of_two

accelerate: Any = pytest.importorskip("accelerate")
Tracker: Any = pytest.importorskip("accelerate.tracking").GeneralTracker


def test_parameter_surgery_divides_scales_and_gathers() -> None:
    torch.manual_seed(0)
    x, y = batch(0)
    models = [Net().eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options: dict[str, Any] = {"shared": "backbone", "tasks": TASKS}
    own = ParameterSurgery(models[0], PCGrad(seed=3), **options)
    for part in range(2):
        rows = slice(8 * part, 8 * part + 8)
        losses = {task: loss / 2 for task, loss in losses_of(models[0](x[rows]), y[rows]).items()}
        own.backward(losses, accumulate=part == 0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    surgery = ParameterSurgery(models[1], PCGrad(seed=3), **options)
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.0)
    register(surgery, accelerator, optimizer=optimizer)
    model, optimizer = accelerator.prepare(models[1], optimizer)
    for part in range(2):
        rows = slice(8 * part, 8 * part + 8)
        with accelerator.accumulate(model):
            losses = losses_of(model(x[rows]), y[rows])
            backward(surgery, accelerator, losses if part else list(losses.values()))
            optimizer.step()
    assert accelerator.scaler.get_scale() == 1024.0
    assert surgery.report is not None
    assert int(surgery.steps) == 1
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(b.grad, a.grad)  # unscaled by the step


def test_parameter_surgery_adds_the_penalty_by_its_share() -> None:
    torch.manual_seed(0)
    x, y = batch(0)
    model = Net().eval()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.5, metric="l1")
    surgery = ParameterSurgery(model, lambda gramian: torch.ones(len(gramian)), shared="backbone")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    (sum(losses_of(model(x), y).values()) + regularizer()).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    for _ in range(2):
        with accelerator.accumulate(model):
            losses = losses_of(model(x), y)
            backward(surgery, accelerator, losses, regularizer())
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def surgery_of(rank: int) -> dict[str, Any]:
    with one_of_two(rank, gradient_accumulation_steps=2) as accelerator:
        plain, optimizer = make_model()
        surgery = ParameterSurgery(plain, shared="backbone")
        register(surgery, accelerator, optimizer=optimizer)
        model, optimizer = accelerator.prepare(plain, optimizer)
        for step in range(4):
            x, y = batch(step + 10 * rank)
            with accelerator.accumulate(model):
                backward(surgery, accelerator, losses_of(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        return {"weight": plain.backbone[0].weight.detach(), "steps": int(surgery.steps)}


def test_parameter_surgery_in_two_processes() -> None:
    first, second = run_on_two_processes(surgery_of)
    assert first["steps"] == second["steps"] == 2
    assert torch.equal(first["weight"], second["weight"])
