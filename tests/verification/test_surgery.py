"""``verify``: what is wrong with surgery is found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saliency_reg import ParameterSurgery, PCGrad, SaliencyRegularizer, verify
from tests.support.zoo import Reverse

from .support import TASKS, Net, Odd, X, failed, report_of, with_part


class OfSum(PCGrad):
    """Projects the sum of the gradients in the place of each of them."""

    def forward(self, gramian: Tensor) -> Tensor:
        products = gramian.sum(0).clamp(max=0)
        return torch.ones_like(products) - products / gramian.diagonal()


def detached(losses: dict[str, Tensor], penalty: Tensor) -> None:
    (sum(losses.values()) + penalty.item()).backward()


def summed_before(losses: dict[str, Tensor], penalty: Tensor) -> None:
    total = sum(losses.values()) + penalty
    total.backward(create_graph=True)


def twice(losses: dict[str, Tensor], penalty: Tensor) -> None:
    for loss in losses.values():  # the surgery sees one task at a time
        loss.backward(retain_graph=True)
    penalty.backward()


def right(losses: dict[str, Tensor], penalty: Tensor) -> None:
    (sum(losses.values()) + penalty).backward()


def conflicting(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        task: (1 if place else -1) * output.mean() + output.square().mean()
        for place, (task, output) in enumerate(outputs.items())
    }


def conflicts() -> Net:
    model = Net()
    for task in TASKS[1:]:
        model.heads[task].load_state_dict(model.heads["a"].state_dict())
        with torch.no_grad():
            model.heads[task][0].weight.add_(0.1 * torch.randn(4, 6))
    return model


@pytest.mark.parametrize("backward", [None, right, detached, summed_before, twice])
def test_surgery(backward: Any) -> None:
    report = report_of(conflicts(), losses=conflicting, surgery=PCGrad(), backward=backward)
    assert failed(report) == ([] if backward in (None, right) else ["surgery"]), str(report)
    assert ("that was built here" in report["surgery"].advice) == (backward is right)


def test_pcgrad_on_summed_gradients() -> None:
    report = report_of(conflicts(), losses=conflicting, surgery=OfSum())
    assert failed(report) == ["surgery"], str(report)
    assert "reference" in report["surgery"].found
    assert report_of(conflicts(), losses=conflicting, surgery=lambda gramian: gramian.diagonal().rsqrt()).passed
    assert failed(report_of(Net(), backward=detached)) == ["surgery"]
    assert report_of(Net(), backward=right)["surgery"].passed


def test_losses_that_go_around_the_surgery() -> None:
    report = report_of(
        conflicts(), losses=lambda out: {t: o.detach().requires_grad_().sum() for t, o in out.items()}, surgery=PCGrad()
    )
    assert failed(report) == ["surgery"], str(report)
    assert "weighed no gradient" in report["surgery"].found


def test_surgery_has_nothing_to_weigh_in_front_of_a_frozen_backbone() -> None:
    model = conflicts()
    model.backbone.requires_grad_(False)
    report = report_of(model, losses=conflicting, surgery=PCGrad())
    assert report.passed, str(report)
    assert "nothing is weighed" in report["surgery"].found


def by_hand(model: Net, *, of_sum: bool = False) -> Callable[[dict[str, Tensor], Tensor], None]:
    """PCGrad at the parameters of the backbone, in the order of the tasks; or, wrongly, of the sum of the gradients."""

    def backward(losses: dict[str, Tensor], penalty: Tensor) -> None:
        shared = list(model.backbone.parameters())
        rows = [flat_gradient(loss, shared) for loss in losses.values()]
        alone = flat_gradient(penalty, shared)
        (sum(losses.values()) + penalty).backward()
        projected = [sum(rows)] if of_sum else [row.clone() for row in rows]
        for place, row in enumerate(projected):
            for other, against in enumerate(rows):
                if (of_sum or place != other) and row @ against < 0:
                    row = row - (row @ against) / (against @ against) * against
            projected[place] = row
        total = sum(projected) + alone
        for one, part in zip(shared, total.split([one.numel() for one in shared])):
            one.grad = part.view_as(one).clone()

    return backward


def flat_gradient(value: Tensor, parameters: list[Any]) -> Tensor:
    found = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([one.flatten() for one in found])


def test_a_loop_at_the_parameters() -> None:
    model = conflicts()
    surgery = ParameterSurgery(model, PCGrad())
    loops: dict[str, Any] = {
        "right": lambda losses, penalty: surgery.backward(losses, penalty),
        "in tasks": lambda losses, penalty: surgery.backward({k: v + penalty for k, v in losses.items()}),
        "sum": lambda losses, penalty: (sum(losses.values()) + penalty).backward(),
        "no penalty": lambda losses, penalty: surgery.backward(losses),
        "by hand": by_hand(model),
        "of the sum": by_hand(model, of_sum=True),
    }
    expected: dict[str, Any] = {"right": True, "in tasks": False, "sum": False, "no penalty": False, "by hand": True}
    before = copy.deepcopy(surgery.weighting.state_dict())

    def row(loop: str, **options: Any) -> Any:
        return report_of(model, losses=conflicting, backward=loops[loop], **options)["surgery"]

    for loop in ("right", "in tasks", "sum", "no penalty"):
        assert row(loop, surgery=surgery).passed is expected[loop], loop
    assert row("right", surgery=PCGrad()).passed
    assert row("by hand", surgery=PCGrad()).passed
    assert row("of the sum", surgery=PCGrad()).passed is False
    assert "PCGrad on summed gradients" in row("sum", surgery=surgery).found
    for loop in ("right", "by hand"):
        found = row(loop)
        assert found.passed is None
        assert "changes the sum of the gradients (cosine" in found.found
        assert "pass surgery=PCGrad() (or the ParameterSurgery)" in found.advice.replace("Pass", "pass")
    assert "penalty's gradient is missing" in row("no penalty", surgery=surgery).found
    assert surgery.tasks is None
    assert surgery.weighting.state_dict() == before


@pytest.mark.parametrize("kind", ["feature map", "parameters"])
def test_a_weighting_with_state_of_its_own_keeps_it(kind: str) -> None:
    class Weighting:
        calls = 0

        def __call__(self, gramian: Tensor) -> Tensor:
            self.calls += 1
            return torch.linspace(1, 2, len(gramian)) * self.calls

    model, weighting = conflicts(), Weighting()
    used = weighting if kind == "feature map" else ParameterSurgery(model, weighting)
    report = report_of(model, losses=conflicting, surgery=used)
    assert report["surgery"].passed, str(report)
    assert weighting.calls == 0


def test_passing_in_the_users_loop_shows() -> None:
    model = conflicts()
    regularizer = SaliencyRegularizer(model, "heads", strength=10.0, surgery=PCGrad(), metric="l1")

    def passing(losses: dict[str, Tensor], penalty: Tensor) -> None:
        with regularizer.surgery.passing():
            (sum(losses.values()) + penalty).backward()

    options: dict[str, Any] = {"losses": conflicting, "show": False, "regularizer": regularizer}
    assert verify(model, X, backward=right, **options)["surgery"].passed
    assert verify(model, X, backward=passing, **options)["surgery"].passed is False
    assert regularizer.surgery.report is None
    regularizer.surgery.enabled = False
    assert verify(model, X, backward=right, **options)["surgery"].passed is None
    regularizer.enabled = False
    assert "enabled is False" in str(verify(model, X, **options)["heads"])


def test_a_batch_without_conflicts_is_told() -> None:
    same = {task: (lambda output: output.square().mean()) for task in TASKS}
    model = Net()
    for task in TASKS[1:]:
        model.heads[task].load_state_dict(model.heads["a"].state_dict())
    with torch.no_grad():
        model.heads["b"][2].weight.mul_(1.1)
    found = report_of(model, losses=lambda out: {t: same[t](o) for t, o in out.items()}, surgery=PCGrad())["surgery"]
    assert found.passed
    assert "nothing was projected" in found.found


def test_a_reversal_before_a_head() -> None:
    reversing = Net(before=lambda task, feature: Reverse.apply(feature) if task == "b" else feature)
    report = report_of(reversing)
    assert report["derivatives"].passed is False
    assert "heads ['heads.b'] read the feature map" in report["derivatives"].found
    for model in (reversing, with_part(Odd(Reverse.apply))):
        found = report_of(model, custom_backward="ignore")["derivatives"]
        assert found.passed is None
        assert "(meant: custom_backward='ignore')" in found.found
