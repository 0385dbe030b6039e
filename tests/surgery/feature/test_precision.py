"""Surgery at the feature map under autocast and a loss scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer
from tests.support.zoo import TASKS, build, mlp

from .support import losses_of


def float_model(classes: int = 1) -> nn.Module:
    torch.manual_seed(0)
    entry = build("tanh heads")
    entry.model.heads = nn.ModuleDict({task: mlp(nn.Tanh(), classes) for task in TASKS})
    return entry.model.float()


@pytest.mark.parametrize("classes", [1, 3])  # the two ways around the fork
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 6e-3)])
def test_autocast_and_scaler_give_the_update_of_float32(dtype: torch.dtype, tolerance: float, classes: int) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(16, 5)

    def update(autocast: bool) -> tuple[Tensor, float]:
        model = float_model(classes)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        regularizer = SaliencyRegularizer(
            model, "heads", strength=0.5, scalarize="logsumexp", optimizer=optimizer, surgery=PCGrad(), metric="l1"
        )
        scaler = torch.amp.GradScaler("cpu", enabled=autocast and dtype == torch.float16, init_scale=1024.0)
        before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            losses = losses_of({task: output.double() for task, output in model(inputs).items()})
            loss = sum(losses.values()).float() + regularizer()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        return after - before, regularizer.report.surgery.conflicts

    exact, conflicts = update(autocast=False)
    found, _ = update(autocast=True)
    assert conflicts > 0
    assert (found - exact).norm() / exact.norm() < tolerance


def test_an_overflow_in_one_task_skips_the_step_and_trains_on() -> None:
    for weighting in (PCGrad(), lambda gramian: torch.ones(len(gramian))):
        model = float_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regularizer = SaliencyRegularizer(
            model, "heads", strength=0.5, optimizer=optimizer, surgery=weighting, metric="l1"
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for step in range(3):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            optimizer.zero_grad()
            losses = losses_of({task: output.double() for task, output in model(torch.randn(8, 5)).items()})
            factor = float("inf") if step == 1 else 1.0
            loss = (losses["first"] + factor * losses["second"] + losses["third"]).float() + regularizer()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
            assert all(moved) if step != 1 else not any(moved)
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
        assert int(regularizer.steps) == 2
