"""A forward that is looked at, before or after it is taken: who takes it does not notice."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from saliency_reg import CaptureError, SaliencyRegularizer
from saliency_reg.capture import FeatureCapture, resolve_heads
from tests.support.zoo import TASKS, VectorHeads, mlp


def build() -> tuple[VectorHeads, FeatureCapture, Tensor]:
    model = VectorHeads(lambda: mlp(torch.nn.Tanh()))
    capture = FeatureCapture(model, resolve_heads(model, "heads", None, None))
    capture.observed = True
    return model, capture, torch.randn(3, 5)


def test_look_and_take_return_the_same_in_any_order() -> None:
    model, capture, x = build()
    for looks_first in (True, False):
        outputs = model(x)
        both = [capture.look, capture.take] if looks_first else [capture.take, capture.look]
        for read in both:
            forward = read()
            assert forward is not None
            assert [output is own for output, own in zip(forward.outputs, outputs.values())] == [True] * len(TASKS)
            assert len(forward.calls) == len(TASKS)
        for read, match in ((capture.look, "read already"), (capture.take, "read already")):
            with pytest.raises(CaptureError, match=match):
                read()
    model(x)
    capture.look()
    with pytest.raises(CaptureError, match="looked at already"):
        capture.look()
    assert capture.take() is not None


def test_nothing_is_kept_longer_than_needed() -> None:
    model, capture, x = build()
    for reads in ((capture.look, capture.take), (capture.take, capture.look), (capture.take, capture.look_away)):
        output = weakref.ref(model(x)[TASKS[0]])
        for read in reads:
            read()
        assert output() is None
    output = weakref.ref(model(x)[TASKS[0]])
    capture.take()
    with torch.no_grad():
        model(x)  # an evaluation in between
    assert capture.look() is not None
    capture.observed = False
    output = weakref.ref(model(x)[TASKS[0]])
    capture.take()
    assert output() is None


def test_a_head_runs_again_as_it_was_called() -> None:
    torch.manual_seed(0)
    model = VectorHeads(
        lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 1))
    )
    regularizer = SaliencyRegularizer(model, heads="heads", strength=0.1, cross_sample="ignore")
    capture = regularizer._capture
    assert capture is not None
    capture.observed = True
    seen: list[object] = []
    for head in model.heads.values():
        head[2].register_forward_hook(lambda *_: seen.append(None))
    outputs = model(torch.randn(8, 5))
    forward = capture.look()
    assert forward is not None
    state, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
    number = len(seen)
    feature = forward.features[0].tensor
    for output, call in zip(outputs.values(), forward.calls):
        assert call is not None
        assert torch.equal(call.again([(feature, feature.detach())]), output)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before, after) for before, after in zip(buffers, model.buffers()))
    assert len(seen) == number
