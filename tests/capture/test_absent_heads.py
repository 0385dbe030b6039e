"""Batches of one task each: heads that did not run in the forward are run for their saliency."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer

TASKS = ("a", "b", "c")


class OneHeadAtATime(nn.Module):
    """With a mask as a second argument, as heads on texts have it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Linear(6, 5)
        self.heads = nn.ModuleDict({task: Head(dropout) for task in TASKS})

    def forward(self, inputs: Tensor, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        feature = self.backbone(inputs).tanh()
        keep = torch.ones(len(inputs), dtype=torch.bool)
        return {task: self.heads[task](feature, keep=keep) for task in tasks}


class Head(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Dropout(dropout), nn.Linear(4, 1))

    def forward(self, feature: Tensor, keep: Tensor) -> Tensor:
        found: Tensor = self.layers(feature).squeeze(1) * keep
        return found


def built(dropout: float = 0.0) -> OneHeadAtATime:
    torch.manual_seed(0)
    return OneHeadAtATime(dropout).double()


def inputs() -> Tensor:
    return torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("surgery", [None, PCGrad])
@pytest.mark.parametrize("ran", [("b",), ("c", "a")])
def test_penalty_and_gradients_are_those_of_all_heads(ran: tuple[str, ...], surgery: Any) -> None:
    found = []
    for together in (True, False):
        model = built()
        regularizer = SaliencyRegularizer(
            model, heads="heads", strength=0.3, surgery=surgery and surgery(), run_all_heads=not together, metric="l1"
        )
        outputs = model(inputs()) if together else model(inputs(), ran)
        penalty = regularizer()
        (sum(outputs[task].square().mean() for task in ran) + penalty).backward()
        assert regularizer.report is not None
        assert regularizer.report.distances.isfinite().all()
        found.append((penalty, [p.grad for p in model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    for one, other in zip(found[0][1], found[1][1]):
        assert (one is None) == (other is None)  # the last bias of a head without a loss
        assert one is None or torch.allclose(one, other, atol=1e-14)


def test_without_it_one_head_has_nothing_to_be_related_to() -> None:
    model = built()
    regularizer = SaliencyRegularizer(model, heads="heads", strength=0.1, metric="l1")
    model(inputs(), ("a",))
    assert regularizer() == 0


def test_random_numbers_of_the_model_stay_as_they_are() -> None:
    model = built(dropout=0.5).train()
    regularizer = SaliencyRegularizer(model, heads="heads", run_all_heads=True, strength=0.1, metric="l1")
    model(inputs(), ("a",))
    state = torch.get_rng_state()
    first = regularizer()
    assert torch.equal(state, torch.get_rng_state())
    assert first > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_several_batches_and_heads_called_by_the_loop(frozen: bool) -> None:
    model = built()
    model.backbone.requires_grad_(not frozen)
    regularizer = SaliencyRegularizer(model, heads="heads", strength=0.3, run_all_heads=True, metric="l1")
    model(inputs())
    expected = regularizer()
    for task in TASKS:
        model(inputs(), (task,))
        assert torch.allclose(regularizer(), expected, rtol=1e-12)
    feature = model.backbone(inputs()).tanh()
    model.heads["b"](feature, torch.ones(7, dtype=torch.bool))
    assert torch.allclose(regularizer(), expected, rtol=1e-12)
    with torch.no_grad():
        model(inputs(), ("a",))
        assert regularizer() == 0


def test_in_mixed_precision_the_others_run_as_the_first_did() -> None:
    model = built().float()
    regularizer = SaliencyRegularizer(model, heads="heads", strength=0.3, run_all_heads=True, metric="l1")
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs().float())
    expected = regularizer()
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs().float(), ("b",))
    assert torch.equal(regularizer(), expected)  # outside of autocast, as in most loops


def test_running_statistics_of_the_others_stay_as_they_are() -> None:
    model = built().train()
    for head in model.heads.values():
        head.layers.insert(1, nn.BatchNorm1d(4).double())
        head.norm = head.layers[1]  # a second name for it
    regularizer = SaliencyRegularizer(
        model, heads="heads", run_all_heads=True, cross_sample="ignore", strength=0.1, metric="l1"
    )
    tensors = list(model.heads["b"].buffers())
    before = {name: buffer.clone() for name, buffer in model.heads["b"].named_buffers()}
    model(inputs(), ("a",))
    assert regularizer() > 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.heads["b"].named_buffers())
    assert all(one is other for one, other in zip(tensors, model.heads["b"].buffers()))
