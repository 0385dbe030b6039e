"""Autocast and 16-bit models on CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saliency_reg import SaliencyRegularizer, task_distances, task_saliencies
from tests.support.training import Net, batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32_and_distances_are_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    model(batch(0)[0])
    exact = regularizer()
    exact_gradient = torch.autograd.grad(exact, model.heads["left"].out.weight)[0]
    with torch.autocast("cpu", dtype=dtype):
        model(batch(0)[0])
        inside = regularizer()
        model(batch(0)[0])
    outside = regularizer()
    gradient = torch.autograd.grad(inside, model.heads["left"].out.weight)[0]
    assert inside.dtype == outside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)
    precision = 0.05 if dtype is torch.bfloat16 else 5e-3
    torch.testing.assert_close(inside, exact, rtol=precision, atol=0)
    assert (gradient - exact_gradient).norm() < precision * 2 * exact_gradient.norm()
    assert regularizer.report is not None
    assert regularizer.report.distances.dtype == torch.float32


def test_bfloat16_model() -> None:
    torch.manual_seed(0)
    model = Net().eval().to(torch.bfloat16)
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    model(batch(0)[0].to(torch.bfloat16))
    penalty = regularizer()
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert torch.isfinite(model.heads["left"].out.weight.grad).all()


def test_float16_gradients_behind_a_large_average_do_not_underflow() -> None:
    """1/(H*W) times a small weight is below float16's smallest number; the sum over positions is not."""
    torch.manual_seed(0)
    feature = torch.randn(2, 3, 128, 128, dtype=torch.float16, requires_grad=True)
    heads = [nn.Linear(3, 1).half() for _ in range(2)]
    with torch.no_grad():
        for index, head in enumerate(heads):
            head.weight.fill_(3e-4 * (index + 1))
    outputs = [head(feature.mean((2, 3))) for head in heads]
    naive = torch.autograd.grad(outputs[0].sum(), feature, retain_graph=True)[0]
    assert not naive.any()
    saliencies = task_saliencies(outputs, feature)
    assert saliencies.dtype == torch.float32
    torch.testing.assert_close(saliencies[:, :, 0], torch.tensor([[3e-4] * 2, [6e-4] * 2]), rtol=5e-2, atol=0)
    torch.testing.assert_close(task_distances(saliencies)[0, 1], torch.tensor(9e-4), rtol=5e-2, atol=0)
