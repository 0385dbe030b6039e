"""``HeadPenalty`` in a loop of Hugging Face accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import ConfigurationError, HeadPenalty, StateMismatchError, WrongTypeError
from saliency_reg.integrations.accelerate import log_report, register
from tests.support.training import assert_same_state, batch, make_model

from .support import fresh_state, losses_of

accelerate: Any = pytest.importorskip("accelerate")


def started(
    accelerator: Any, seed: int, kind: str = "mrn", strength: float = 2.0, **options: Any
) -> tuple[nn.Module, Any, HeadPenalty]:
    model, optimizer = make_model(seed)
    penalty = HeadPenalty(model, "heads", kind=kind, strength=strength, optimizer=optimizer, **options)
    register(penalty, accelerator, optimizer=optimizer)
    return (*accelerator.prepare(model, optimizer), penalty)


def trained(accelerator: Any, model: nn.Module, optimizer: Any, penalty: HeadPenalty, steps: range) -> list[Tensor]:
    found = []
    for step in steps:
        x, y = batch(step)
        with accelerator.accumulate(model):
            loss = sum(losses_of(model(x), y).values()) + penalty()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.detach())
    return found


def test_it_follows_real_steps_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    with fresh_state():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        run = started(accelerator, 0, update_steps=2)
        trained(accelerator, *run, range(6))
        accelerator.save_state(str(tmp_path / "state"))
        expected = trained(accelerator, *run, range(6, 12))
        assert int(run[2].steps) == 6
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    again = started(accelerator, 5, update_steps=2)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(torch.stack(trained(accelerator, *again, range(6, 12))), torch.stack(expected))
    assert_same_state(run[2], again[2])
    assert_same_state(run[0], again[0])
    with fresh_state():
        accelerator = accelerate.Accelerator(cpu=True)
        started(accelerator, 0, "mtrl")
        with pytest.raises(StateMismatchError, match="kind='mrn'"):
            accelerator.load_state(str(tmp_path / "state"))


def test_the_sparse_kinds_act_behind_the_prepared_optimizer() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, penalty = started(accelerator, 0, "l21", 10.0)
    trained(accelerator, model, optimizer, penalty, range(1))
    assert penalty.zeros == 0
    trained(accelerator, model, optimizer, penalty, range(1, 40))
    assert penalty.zeros > 0
    assert int(penalty.steps) == 20


def test_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    penalty = started(accelerator, 0)[2]
    with pytest.raises(
        WrongTypeError, match="SaliencyRegularizer, RepMTL, FeatureSurgery or ParameterSurgery .* HeadPenalty"
    ):
        log_report(penalty, accelerator, step=0)
    monkeypatch.setattr(accelerator.state, "distributed_type", accelerate.DistributedType.DEEPSPEED)
    with pytest.raises(ConfigurationError, match="DEEPSPEED .*HeadPenalty"):
        register(penalty, accelerator)
