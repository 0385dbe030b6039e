"""``verify`` leaves the model and everything around it as they were."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer, verify

from .support import Dropping, Net, X, losses, report_of


class Counting(Dropping):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.append(nn.BatchNorm1d(6))
        self.runs = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.runs += 1
        random.random()
        return super().forward(x)


def state_of(model: nn.Module, *others: nn.Module) -> Any:
    return (
        {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()},
        {name: None if one.grad is None else one.grad.clone() for name, one in model.named_parameters()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        model.runs,
        *({name: tensor.clone() for name, tensor in other.state_dict().items()} for other in others),
    )


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("surgery", [False, True])
def test_nothing_changes(attached: bool, surgery: bool) -> None:
    model = Counting()
    model.heads["b"].eval()
    options: dict[str, Any] = {"heads": "heads", "strength": 0.5, "surgery": PCGrad() if surgery else None}
    regularizer, others = None, []
    if attached:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        regularizer = SaliencyRegularizer(model, optimizer=optimizer, **{"strength": 0.1, "metric": "l1", **options})
        for _ in range(2):
            outputs = model(X)
            (sum(losses(outputs).values()) + regularizer(losses=losses(outputs))).backward()
            optimizer.step()
        model(X)  # waits to be read
        others, options = [regularizer], {}
        read = regularizer.report, vars(regularizer._capture)["_latest"], regularizer.describe()
        reminded = {
            name: copy.copy(value) if isinstance(value, (set, list)) else value
            for name, value in vars(regularizer._reminders).items()
        }
    before, identities = state_of(model, *others), [*map(id, model.parameters()), *map(id, model.buffers())]
    report = verify(model, X, losses=losses, show=False, regularizer=regularizer, **options)
    assert report.passed, str(report)
    assert report["surgery"].passed is (True if surgery else None)
    torch.testing.assert_close(state_of(model, *others), before, rtol=0, atol=0)
    assert [*map(id, model.parameters()), *map(id, model.buffers())] == identities
    if regularizer is not None:
        assert regularizer.describe() == read[2]
        assert vars(regularizer._capture)["_latest"] is read[1]
        if not surgery:
            assert regularizer.report is read[0]
        assert vars(regularizer._reminders) == reminded
        assert float(regularizer()) > 0  # the forward that waited
    else:
        SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")  # nothing is attached


def test_a_regularizer_that_has_seen_nothing_has_seen_nothing_afterwards() -> None:
    model = Net()
    regularizer = SaliencyRegularizer(model, "heads", feature="backbone.0:input", strength=10.0, metric="l1")
    capture = regularizer._capture

    def seen() -> list[Any]:
        known = [vars(way) for way in capture._ways]
        return copy.deepcopy([known, capture._changes_output, capture._raw_inputs._ran, capture._raw_inputs._told])

    before = seen()
    assert verify(model, X, losses=losses, show=False, regularizer=regularizer).passed
    assert seen() == before
    model(X)
    regularizer()
    assert seen() != before


def test_a_model_that_raises_is_put_back() -> None:
    model = Counting()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        report_of(model, torch.zeros(6, 3))
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
