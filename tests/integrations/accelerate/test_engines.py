"""Engines, and compiled models, that accelerate prepares."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saliency_reg import FeatureSurgery, ParameterSurgery, SaliencyRegularizer
from saliency_reg.errors import ConfigurationError
from saliency_reg.integrations.accelerate import backward, register
from tests.support.training import TASKS, Net, batch, make_model

from .support import fresh_state, losses_of, steps_with

accelerate: Any = pytest.importorskip("accelerate")
Tracker: Any = pytest.importorskip("accelerate.tracking").GeneralTracker


class EngineOptimizer:
    """As an engine wraps an optimizer whose steps it takes itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()


class Lomo(torch.optim.SGD):
    """Named as one that updates in the backward pass."""


def engine_optimizers() -> dict[str, Callable[[torch.optim.Optimizer], Any]]:
    def of_deepspeed(optimizer: torch.optim.Optimizer) -> Any:
        engine = type("DeepSpeedZeroOptimizer", (EngineOptimizer,), {"__module__": "deepspeed.runtime.zero.stage"})
        return importlib.import_module("accelerate.utils.deepspeed").DeepSpeedOptimizerWrapper(engine(optimizer))

    return {
        "DeepSpeedOptimizerWrapper": of_deepspeed,
        "MegatronLMOptimizerWrapper": type("MegatronLMOptimizerWrapper", (EngineOptimizer,), {}),
        "FusedAdam": type("FusedAdam", (EngineOptimizer,), {"__module__": "deepspeed.ops.adam"}),
        "Lomo": lambda optimizer: Lomo(optimizer.param_groups, lr=0.1),
    }


@pytest.mark.parametrize("name", ["DeepSpeedOptimizerWrapper", "MegatronLMOptimizerWrapper", "FusedAdam", "Lomo"])
def test_optimizers_of_engines_are_known_without_the_engine(name: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    wrapped = engine_optimizers()[name](optimizer)
    with pytest.raises(ConfigurationError, match=rf"{name}.*if accelerator.sync_gradients.*regularizer.step\(\)"):
        register(regularizer, accelerator, optimizer=wrapped)
    assert not accelerator._custom_objects


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_engines(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = accelerate.DistributedType[engine]
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", property(lambda self: kind))
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    with pytest.raises(ConfigurationError, match=rf"{engine}.*without optimizer=.*regularizer.step\(\)"):
        register(regularizer, accelerator, optimizer=optimizer)
    register(regularizer, accelerator)
    model(batch(0)[0])
    regularizer()
    regularizer.step()
    accelerator.save_state(str(tmp_path))
    saved = regularizer.relations.matrix()
    regularizer.load_state_dict(SaliencyRegularizer(None, tasks=TASKS, strength=0.1, metric="l1").state_dict())
    accelerator.load_state(str(tmp_path))
    assert torch.equal(regularizer.relations.matrix(), saved)
    assert int(regularizer.steps) == 1
    following = SaliencyRegularizer(None, tasks=TASKS, optimizer=optimizer, strength=0.1, metric="l1")
    with pytest.raises(ConfigurationError, match="Build the regularizer without optimizer="):
        register(following, accelerator)
    surgery = ParameterSurgery(model)
    with pytest.raises(ConfigurationError, match="Use FeatureSurgery"):
        register(surgery, accelerator)
    with pytest.raises(ConfigurationError, match="Use FeatureSurgery"):
        backward(surgery, accelerator, losses_of(model(batch(0)[0]), batch(0)[1]))


# Compiling.


def test_a_model_that_prepare_compiles_is_refused_in_time() -> None:
    for backend in ("inductor", "aot_eager"):
        with fresh_state():
            accelerator = accelerate.Accelerator(cpu=True, dynamo_backend=backend)
            model, optimizer = make_model()
            regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
            with pytest.raises(ConfigurationError, match=rf"dynamo_backend='{backend}'.*model.backbone.compile\(\)"):
                register(regularizer, accelerator, optimizer=optimizer)
            register(FeatureSurgery(make_model()[0], "heads"), accelerator)  # needs no second derivative
    with fresh_state():
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR"  # as accelerate launch sets it
        accelerator = accelerate.Accelerator(cpu=True)
        with pytest.raises(ConfigurationError, match="ACCELERATE_DYNAMO_BACKEND"):
            register(regularizer, accelerator)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_backbone_compiled_alone_works(when: str) -> None:
    found = []
    for compiled in (False, True):
        with fresh_state():
            accelerator = accelerate.Accelerator(cpu=True)
            plain, plain_optimizer = make_model()
            plain.eval()
            if compiled and when == "before":
                plain.backbone.compile(backend="aot_eager")
            regularizer = SaliencyRegularizer(plain, "heads", strength=0.5, metric="l1")
            register(regularizer, accelerator, optimizer=plain_optimizer)
            model, optimizer = accelerator.prepare(plain, plain_optimizer)
            if compiled and when == "after":
                plain.backbone.compile(backend="aot_eager")
            found.append(torch.stack(steps_with(accelerator, model, optimizer, regularizer, range(3))))
            assert int(regularizer.relations.updates) == 3
            assert list(model.state_dict()) == list(Net().state_dict())
    torch.testing.assert_close(*found)
