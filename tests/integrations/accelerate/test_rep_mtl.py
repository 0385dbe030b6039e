"""Checkpoints, optimizer steps and figures through accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saliency_reg import RepMTL
from saliency_reg.integrations.accelerate import log_report, register
from tests.support.zoo import TASKS

accelerate: Any = pytest.importorskip("accelerate")
Tracker: Any = pytest.importorskip("accelerate.tracking").GeneralTracker


class Kept(Tracker):
    name, requires_logging_directory, tracker = "kept", False, None

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def store_init_configuration(self, values: Any) -> None: ...

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.values = values


def build() -> tuple[nn.Module, torch.optim.Optimizer, RepMTL]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, torch.optim.SGD(model.parameters(), 0.1), RepMTL(model, heads="2", tasks=TASKS)


def test_steps_checkpoints_and_figures(tmp_path: Path) -> None:
    tracker = Kept()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, log_with=tracker)
    accelerator.init_trackers("x")
    model, optimizer, rep = build()
    register(rep, accelerator, optimizer=optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(4):
        with accelerator.accumulate(model):
            losses = dict(zip(TASKS, model(torch.randn(4, 5)).square().unbind(1)))
            accelerator.backward(sum(loss.mean() for loss in losses.values()) + rep(losses=losses))
            optimizer.step()
            optimizer.zero_grad()
    assert int(rep.steps) == 2
    names = {f"saliency/{name}" for name in ("penalty", "strength", "task_specific", "cross_task")}
    assert set(log_report(rep, accelerator, step=2)) == names == set(tracker.values)
    accelerator.save_state(str(tmp_path))
    rep.step()
    accelerator.load_state(str(tmp_path))
    assert int(rep.steps) == 2
