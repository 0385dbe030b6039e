"""Wrong arguments, a missing package, and the examples of the docstrings."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import pytest
import torch

from saliency_reg import FeatureSurgery, ParameterSurgery, SaliencyRegularizer
from saliency_reg.errors import (
    CaptureError,
    ConfigurationError,
    MissingPackageError,
    SaliencyRegError,
    TaskError,
    WrongTypeError,
)
from saliency_reg.integrations import accelerate as integration
from saliency_reg.integrations.accelerate import backward, log_report, register
from tests.support.training import TASKS, make_model

accelerate: Any = pytest.importorskip("accelerate")
Tracker: Any = pytest.importorskip("accelerate.tracking").GeneralTracker


def test_wrong_arguments() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    with pytest.raises(WrongTypeError, match=r"found Accelerator. Use register\(regularizer, accelerator\)"):
        register(accelerator, regularizer)
    with pytest.raises(WrongTypeError, match=r"must be an accelerate.Accelerator, found Net"):
        register(regularizer, model)
    with pytest.raises(WrongTypeError, match=r"optimizer must be a torch.optim.Optimizer"):
        register(regularizer, accelerator, optimizer=torch.optim.lr_scheduler.StepLR(optimizer, 1))
    with pytest.raises(WrongTypeError, match=r"Call accelerator.backward\(loss\)"):
        backward(regularizer, accelerator, {})
    with pytest.raises(TaskError):
        backward(ParameterSurgery(model, shared="backbone"), accelerator, {})
    with pytest.raises(WrongTypeError):
        backward(ParameterSurgery(model, shared="backbone"), accelerator, 3)
    with pytest.raises(ConfigurationError, match="closure"):
        register(FeatureSurgery(make_model()[0], "heads"), accelerator, optimizer=torch.optim.LBFGS(model.parameters()))
    assert not accelerator._custom_objects
    with pytest.raises(CaptureError, match="has no report yet"):
        log_report(regularizer, accelerator, 0)
    with pytest.raises(WrongTypeError, match=r"step must be an int, found 0.5 \(float\)"):
        log_report(regularizer, accelerator, 0.5)
    with pytest.raises(ConfigurationError, match="image_every must be at least 1, found 0"):
        log_report(regularizer, accelerator, 0, image_every=0)
    with pytest.raises(ConfigurationError, match="max_pairs must be at least 0, found -1"):
        log_report(regularizer, accelerator, 0, max_pairs=-1)


def test_a_prepared_regularizer_is_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    regularizer = accelerator.prepare(SaliencyRegularizer(None, tasks=TASKS, strength=0.1, metric="l1"))
    with pytest.raises(ConfigurationError, match="Prepare the model, the optimizer and the loaders only"):
        register(regularizer, accelerator)


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    regularizer = SaliencyRegularizer(None, tasks=TASKS, strength=0.1, metric="l1")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingPackageError, match=r'pip install "saliency-reg\[accelerate\]"') as caught:
        register(regularizer, object())
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, SaliencyRegError)


def test_examples() -> None:
    found = doctest.testmod(integration, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 20
    assert not found.failed
