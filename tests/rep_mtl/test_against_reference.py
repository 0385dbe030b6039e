"""The penalty and its gradient, against plain loops over samples, tasks and ``[C, C]`` matrices, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saliency_reg import RepMTL
from saliency_reg.regularizer.rep_mtl.terms import (
    alignment,
    anchor_products,
    positions_entropy,
    spread_over_others,
    unit_anchors,
)
from tests.reference.slow_rep_mtl import slow_cross_task, slow_task_specific
from tests.support.zoo import TASKS

from .models import attached, gradients, losses_of, make, slow_penalty, targets_of

CHANNEL = {"vector": 1, "map": 1, "tokens": 2}
ALL = torch.ones(4, 3, dtype=torch.bool)
SOME = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("kind", CHANNEL)
@pytest.mark.parametrize("known", [ALL, SOME], ids=["all labels", "some labels"])
@pytest.mark.parametrize("log_losses", [True, False])
def test_penalty_and_gradient_are_those_of_plain_loops(kind: str, known: Tensor, log_losses: bool) -> None:
    model, x = make(kind)
    targets = targets_of(4)
    options = {"log_losses": log_losses}
    expected = slow_penalty(model, x, targets, known, CHANNEL[kind], **options)
    expected_gradients = gradients(expected, model)
    rep = attached(model, **options)
    found = rep(losses=losses_of(model(x), targets, known))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(found, model), expected_gradients, rtol=1e-9, atol=1e-11)
    assert rep.report.samples.tolist() == known.sum(0).tolist()
    assert any(gradient.abs().max() > 1e-3 for gradient in expected_gradients)


@pytest.mark.parametrize(("strengths", "temperature"), [((0.7, 0.0), 0.1), ((0.0, 0.3), 0.1), ((1.0, 0.5), 2.0)])
def test_strengths_and_temperature_are_used(strengths: tuple[float, float], temperature: float) -> None:
    model, x = make("map")
    targets = targets_of(4)
    expected = slow_penalty(model, x, targets, ALL, 1, log_losses=True, strengths=strengths, temperature=temperature)
    rep = attached(
        model, task_specific_strength=strengths[0], cross_task_strength=strengths[1], temperature=temperature
    )
    torch.testing.assert_close(rep(losses=losses_of(model(x), targets)), expected, rtol=1e-12, atol=1e-12)
    assert (rep.report.task_specific is None) == (strengths[0] == 0)
    assert (rep.report.cross_task is None) == (strengths[1] == 0)


@pytest.mark.parametrize("kind", CHANNEL)
def test_gradient_is_that_of_finite_differences(kind: str) -> None:
    model, x = make(kind)
    targets = targets_of(4)
    rep = attached(model, log_losses=False)

    def penalty() -> Tensor:
        return rep(losses=losses_of(model(x), targets, SOME))

    found = gradients(penalty(), model)
    for parameter, gradient in zip(model.parameters(), found):
        direction = torch.randn_like(parameter)
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
        above = penalty().detach()
        with torch.no_grad():
            parameter -= 2 * step * direction
        below = penalty().detach()
        with torch.no_grad():
            parameter += step * direction
        torch.testing.assert_close((above - below) / (2 * step), (gradient * direction).sum(), rtol=2e-5, atol=2e-6)


def test_terms_pass_gradcheck() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: penalty_of(v)[0], values)
    assert torch.autograd.gradcheck(lambda v: penalty_of(v)[1], values)


def penalty_of(values: Tensor, temperature: float = 0.3) -> tuple[Tensor, Tensor]:
    """Both terms of saliencies ``[B, T, C, P]``, all of which count."""
    counts = torch.ones(len(values), dtype=torch.bool)
    entropy, positions = positions_entropy(values.mean(2), counts)
    anchors, _ = unit_anchors(values.mean(3), counts)
    has = torch.ones(values.shape[:2], dtype=torch.bool)
    positive = alignment(values, anchors, has).mean(1)
    negative = spread_over_others(anchor_products(anchors), temperature)
    return entropy / positions, (negative - positive / temperature).mean()


@pytest.mark.parametrize("shape", [(2, 2, 5, 3), (3, 4, 2, 6), (4, 3, 1, 1), (6, 3, 3, 1), (2, 2, 40, 2)])
def test_both_ways_of_products_are_the_printed_formula(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.randn(shape, dtype=torch.float64)
    nested = [list(sample) for sample in values]
    entropy, aligned = penalty_of(values)
    torch.testing.assert_close(entropy, slow_task_specific(nested), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(aligned, slow_cross_task(nested, 0.3), rtol=1e-12, atol=1e-13)


def test_entropy_of_equal_shares_and_of_one_task() -> None:
    same = torch.randn(5, 1, 4, 6, dtype=torch.float64).expand(5, 3, 4, 6)
    torch.testing.assert_close(penalty_of(same)[0], torch.tensor(math.log(3), dtype=torch.float64))
    owned = torch.zeros(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    values = owned + torch.eye(3, dtype=torch.float64).repeat(1, 2).view(1, 3, 1, 6)  # a position belongs to one task
    entropy = penalty_of(values)[0]
    assert entropy == 0
    (gradient,) = torch.autograd.grad(entropy, owned)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("factor", [1e-30, 1e-9, 3.0, 1e20])
def test_terms_are_blind_to_a_common_factor(factor: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 3, 5, 6, requires_grad=True)
    expected = penalty_of(values)
    found = penalty_of(values * factor)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(found, expected):
        torch.testing.assert_close(
            torch.autograd.grad(one, values, retain_graph=True), torch.autograd.grad(other, values, retain_graph=True)
        )


def test_alignment_is_blind_to_the_size_of_each_sample() -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    scaled = values * torch.tensor([0.1, 2.0, 30.0, 5.0], dtype=torch.float64).view(4, 1, 1, 1)
    torch.testing.assert_close(penalty_of(scaled)[1], penalty_of(values)[1])
    one_task = values * torch.tensor([1.0, 9.0, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    assert not torch.isclose(penalty_of(one_task)[1], penalty_of(values)[1])  # it weighs in the anchor


def test_positions_without_saliency_are_left_out() -> None:
    values = torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    more = torch.cat([values, torch.zeros(3, 2, 4, 7, dtype=torch.float64)], 3)
    torch.testing.assert_close(penalty_of(more), penalty_of(values))


def test_order_of_tasks_and_samples_does_not_matter() -> None:
    model, x = make("map")
    targets = targets_of(4)
    rep = attached(model)
    expected = rep(losses=losses_of(model(x), targets, SOME)).detach()
    order = torch.tensor([2, 0, 3, 1])
    found = rep(losses=losses_of(model(x[order]), targets[order], SOME[order]))
    torch.testing.assert_close(found, expected)
    rep.remove()
    turned = RepMTL(model, heads={TASKS[place]: f"heads.{TASKS[place]}" for place in (2, 0, 1)})
    assert turned.tasks == ("third", "first", "second")
    torch.testing.assert_close(turned(losses=losses_of(model(x), targets, SOME)), expected)
