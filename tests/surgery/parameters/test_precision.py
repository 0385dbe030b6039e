"""Surgery on the parameters under autocast and a loss scale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from saliency_reg import ParameterSurgery

from .support import losses_of, make, penalty_of


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_equals_float32(dtype: torch.dtype) -> None:
    model, twin = make(), make()
    optimizer, plain = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    surgery, exact = ParameterSurgery(model, optimizer=optimizer), ParameterSurgery(twin, optimizer=plain)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", dtype=dtype):
        losses, penalty = losses_of(model), 1e-2 * penalty_of(model)
    surgery.backward({task: scaler.scale(loss) for task, loss in losses.items()}, scaler.scale(penalty))
    scaler.step(optimizer)
    scaler.update()
    exact.backward(losses_of(twin), 1e-2 * penalty_of(twin))
    plain.step()
    assert surgery.report.conflicts > 0
    scale = max(float((value - before[name]).abs().max()) for name, value in twin.state_dict().items())
    for name, value in twin.state_dict().items():
        assert (model.state_dict()[name] - value).abs().max() < 8 * torch.finfo(dtype).eps * scale, name
        assert value.shape == () or name.startswith("unused") or not torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"measure": "upper"}, {"chunk_size": 2}], ids=str)
def test_a_loss_that_overflows_skips_the_step_and_trains_on(options: dict[str, Any], bad: float) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    surgery = ParameterSurgery(model, optimizer=optimizer, **options)
    for step in range(4):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            losses = losses_of(model, step)
        losses["c"] = losses["c"] * (bad if step == 0 else 1)
        surgery.backward({task: scaler.scale(loss) for task, loss in losses.items()})
        assert bool(torch.isfinite(model.lower.weight.grad).all()) is (step > 0)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before["lower.weight"], model.lower.weight) is (step == 0)
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
