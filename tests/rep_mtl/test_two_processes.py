"""Two gloo processes together return the penalty, and the gradient, of one process with the joined batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import ConfigurationError, RepMTL
from tests.distributed.support import quiet
from tests.support.two_processes import run_on_two_processes
from tests.support.zoo import TASKS

from .models import gradients, losses_of, make

#: Samples of each process; tasks whose losses the second one lacks; whether losses are logarithms. One process may have a
#: sample alone, whose negatives are elsewhere, or none.
CASES = [((3, 5), (), True), ((3, 5), ("second",), True), ((3, 5), (), False), ((7, 1), (), True), ((8, 0), (), True)]


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64)
    known = torch.rand(8, 3, generator=generator) > 0.25
    return x, torch.randn(8, 3, generator=generator, dtype=torch.float64), known


def penalties_of(rank: int) -> list[tuple[Tensor, Tensor, list[int], list[Tensor]]]:
    quiet()
    found = []
    for split, absent, log_losses in CASES:
        model, _ = make("map")
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        rep = RepMTL(wrapped, heads="heads", log_losses=log_losses)
        part = slice(0, split[0]) if rank == 0 else slice(split[0], 8)
        x, targets, known = (each[part] for each in data())
        losses = losses_of(wrapped(x), targets, known)
        for task in absent if rank == 1 else ():
            losses.pop(task)
        penalty = rep(losses=losses)
        (penalty + 0.0 * sum(loss.sum() for loss in losses.values())).backward()
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        found.append((penalty.detach(), rep.report.penalty, rep.report.samples.tolist(), gradient))
        rep.remove()
    return found


def test_two_processes_are_one_with_the_joined_batch() -> None:
    first, second = run_on_two_processes(penalties_of, timeout=120.0)
    for (split, absent, log_losses), one, other in zip(CASES, first, second):
        model, _ = make("map")
        rep = RepMTL(model, heads="heads", log_losses=log_losses)
        x, targets, known = data()
        for task in absent:
            known[split[0] :, TASKS.index(task)] = False
        expected = rep(losses=losses_of(model(x), targets, known))
        expected_gradients = gradients(expected, model)
        assert rep.report.cross_task != 0
        for found in (one, other):
            torch.testing.assert_close(found[0], expected.detach(), rtol=0, atol=1e-10)
            torch.testing.assert_close(found[1], expected.detach(), rtol=0, atol=1e-10)
            assert found[2] == rep.report.samples.tolist()
            torch.testing.assert_close(found[3], expected_gradients, rtol=0, atol=1e-10)


def without_heads(rank: int) -> list[Tensor]:
    model, x = make("map")
    rep = RepMTL(model, heads="heads")
    if rank == 0:
        penalty = rep(losses=losses_of(model(x), data()[1][:4]))
        return [penalty.detach(), *gradients(penalty, model)]
    model.forward = model.feature_map
    model(x)
    penalty = rep(losses={})
    return [penalty.detach()]


def test_a_process_without_heads_waits_for_nobody() -> None:
    first, second = run_on_two_processes(without_heads)
    model, x = make("map")
    expected = RepMTL(model, heads="heads")(losses=losses_of(model(x), data()[1][:4]))
    torch.testing.assert_close(first[0], expected.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        second[0].double(), expected.detach(), rtol=1e-6, atol=1e-6
    )  # it has no float64 of its own
    # The mean over the processes, of which the other one has no gradient.
    torch.testing.assert_close(first[1:], [2 * one for one in gradients(expected, model)], rtol=0, atol=1e-10)


def with_other_settings(rank: int) -> str:
    model, x = make("map")
    rep = RepMTL(model, heads="heads", temperature=0.1 + rank)
    losses = losses_of(model(x), data()[1][:4])
    with pytest.raises(ConfigurationError) as caught:
        rep(losses=losses)
    return str(caught.value)


def test_settings_that_differ_are_refused_everywhere() -> None:
    assert all("temperature" in message for message in run_on_two_processes(with_other_settings))
