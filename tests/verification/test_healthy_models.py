"""``verify``: healthy models pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_reg.saliency.extraction
from saliency_reg import PCGrad, verify
from tests.support.zoo import build

from .support import TASKS, Dropping, Net, X, failed, head, report_of


@pytest.mark.parametrize("name", ["linear heads", "tanh heads, 3 classes", "mlp columns", "pooled columns",
                                  "dense heads, 3 classes", "token heads", "trunk", "cascade", "in-place heads"])  # fmt: skip
def test_healthy_models_pass(name: str) -> None:
    entry = build(name)
    report = verify(entry.model, entry.inputs, show=False, **entry.options)
    assert report.passed, str(report)
    assert {
        row for row in ("heads", "compiled", "saliency", "samples", "derivatives") if not report[row].passed
    } == set()
    assert report["share"].passed is None


def test_a_healthy_model_under_surgery_passes_whole() -> None:
    report = report_of(Net(), surgery=PCGrad())
    assert [check.passed for check in report] == [True] * 9, str(report)
    assert len(str(report).splitlines()) >= 10
    assert max(map(len, str(report).splitlines())) <= 120


def test_one_head_with_columns_under_surgery() -> None:
    entry = build("mlp columns")
    report = verify(
        entry.model,
        entry.inputs,
        losses=lambda out: (out - 2).square().mean(0),
        surgery=PCGrad(),
        show=False,
        **entry.options,
    )
    assert report.passed, str(report)
    assert report["surgery"].passed


class SequenceFirst(nn.Module):
    """A recurrent layer, ``[L, B, 6]``, and heads that read each step or the last one, or a column of each step per task."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads, self.lstm = reads, nn.LSTM(4, 6)
        self.heads: nn.Module = nn.ModuleDict({task: head() for task in TASKS})
        if reads == "columns":
            self.heads = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, len(TASKS)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.lstm(x)[0]
        if isinstance(self.heads, nn.ModuleDict):
            return {task: head(feature[-1] if self.reads == "last" else feature) for task, head in self.heads.items()}
        return dict(zip(TASKS, self.heads(feature).unbind(-1)))


@pytest.mark.parametrize("length", [7, 5])
@pytest.mark.parametrize(("reads", "options"), [
    ("each", {}), ("each", {"surgery": PCGrad()}), ("each", {"pool": None}), ("last", {"feature": "lstm:output.0"}),
    ("columns", {"tasks": TASKS}), ("columns", {"tasks": TASKS, "surgery": PCGrad()}),
])  # fmt: skip
def test_the_sequence_comes_first(reads: str, options: dict[str, Any], length: int) -> None:
    x = torch.randn(length, 5, 4, generator=torch.Generator().manual_seed(1))  # as many steps as samples, too
    report = report_of(SequenceFirst(reads), x, batch_axis=1, **options)
    assert report.passed, str(report)
    assert report["saliency"].passed
    assert report["surgery"].passed is ("surgery" in options or None), str(report)


@pytest.mark.parametrize("options", [{"target": "loss"}, {"metric": "cosine"}, {"reduction": "sum"}, {"strength": 0.0},
                                     {"start_step": 5}, {"feature": "backbone.1"}, {"max_tasks_per_step": 2}])  # fmt: skip
def test_dropout_and_options(options: dict[str, Any]) -> None:
    report = report_of(Dropping(), **options)
    assert report.passed, str(report)
    assert report["saliency"].passed
    assert report["derivatives"].passed


def test_ways_to_call_and_heads_that_do_not_run() -> None:
    class Missing(Net):
        def forward(self, x: Tensor, *, only: tuple[str, ...]) -> dict[str, Tensor]:
            feature = self.backbone(x)
            return {task: self.heads[task](feature) for task in only}

    report = report_of(Missing(), {"x": X, "only": ("a", "c")})
    assert report.passed, str(report)
    assert "did not run in this batch: 'b'" in report["heads"].found
    assert report_of(Net(), (X,)).passed


def test_half_precision() -> None:
    model = Net().bfloat16()
    assert report_of(model, X.bfloat16()).passed
    with torch.autocast("cpu", torch.bfloat16):
        assert report_of(Net()).passed


def test_saliencies_that_are_not_those_of_the_samples_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return input_gradients(*args, **kwargs).roll(1, dims=1)

    input_gradients = saliency_reg.saliency.extraction.input_gradients
    monkeypatch.setattr(saliency_reg.saliency.extraction, "input_gradients", wrong)
    report = report_of(Net())
    assert failed(report) == ["saliency"], str(report)
    assert "task '" in report["saliency"].found
    assert report_of(Net(), tolerance=10.0).passed
