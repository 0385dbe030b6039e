"""A training with a report is the same to the bit: weights, statistics, momentum, random numbers, what hooks see."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, GradNorm, PCGrad, RelationReport, RepMTL, SaliencyRegularizer, relation_report
from tests.support.training import assert_same_state

TASKS = ("left", "right", "up")


class Net(nn.Module):
    """Dropout, running statistics and an in-place activation in the heads, and before them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8))
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(
                    nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 1)
                )
                for task in TASKS
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.backbone(x)
        return {task: head(feature).squeeze(1) for task, head in self.heads.items()}


def source_of(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    if kind == "surgery":
        return FeatureSurgery(model, heads="heads")
    if kind == "gradnorm":
        return GradNorm(model, heads="heads", optimizer=optimizer)
    if kind == "rep_mtl":
        return RepMTL(model, heads="heads", optimizer=optimizer, cross_sample="ignore")
    surgery = PCGrad() if "surgery" in kind else None
    strength = 0.0 if "without strength" in kind else 0.1
    return SaliencyRegularizer(model, heads="heads", optimizer=optimizer, strength=strength, surgery=surgery)


def train(kind: str, watched: bool, first: bool = False, steps: int = 6) -> tuple[Net, Any, Any, Counter[str], Tensor]:
    torch.manual_seed(0)
    model = Net()
    seen: Counter[str] = Counter()
    for task, head in model.heads.items():
        head[0].register_forward_hook(lambda *_, task=task: seen.update([f"forward {task}"]))
        head.register_forward_pre_hook(lambda *_, task=task: seen.update([f"before {task}"]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    source = source_of(kind, model, optimizer)
    report = relation_report(source, tag_every=2) if watched else None
    for step in range(steps):
        x = torch.randn(16, 6)
        labels = (torch.rand(16, 3) < 0.5).float()
        labels[torch.rand(16, 3) < 0.2] = torch.nan
        outputs = model(x)
        losses = {}
        for column, (task, output) in enumerate(outputs.items()):
            known = ~labels[:, column].isnan()
            each = nn.functional.binary_cross_entropy_with_logits(
                output, labels[:, column].nan_to_num(), reduction="none"
            )
            losses[task] = each * known
        if report is not None and first:
            report.update(labels)
        means = {task: loss.mean() for task, loss in losses.items()}
        if kind == "surgery":
            loss = sum(means.values())
        elif kind == "gradnorm":
            loss = source(means)
        else:
            loss = sum(means.values()) + source(losses=losses)
        if report is not None and not first:
            report.update(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 3 == 2:
            with torch.no_grad():
                model.eval()
                model(x)
                model.train()
    return model, optimizer, (source, report), seen, torch.get_rng_state()


KINDS = [
    "regularizer",
    "regularizer without strength",
    "regularizer with surgery",
    "surgery",
    "gradnorm",
    "rep_mtl",
]


@pytest.mark.parametrize("first", [False, True], ids=["after the call", "before the call"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_to_the_bit(kind: str, first: bool) -> None:
    plain, plain_optimizer, (plain_source, _), plain_seen, plain_state = train(kind, False)
    model, optimizer, (source, report), seen, state = train(kind, True, first)
    assert_same_state(plain, model)
    assert_same_state(plain_source, source)
    assert torch.equal(plain_state, state)
    assert plain_seen == seen
    for one, other in zip(plain_optimizer.state.values(), optimizer.state.values()):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    for one, other in zip(plain.parameters(), model.parameters()):
        assert torch.equal(one.grad, other.grad)
    assert isinstance(report, RelationReport)
    assert report.views().matrices["tag"].isfinite().all(), (
        "heads with dropout and BatchNorm are run again as they were"
    )


def test_after_removal_nothing_is_kept() -> None:
    model, _, (source, report), _, _ = train("regularizer", True)
    before = report.views()
    report.remove()
    model(torch.randn(4, 6))
    source()
    assert source._capture._kept is None
    assert torch.equal(report.views().matrices["tag"], before.matrices["tag"])
    assert "3 tasks, 6 updates" in repr(report)
    relation_report(source)
