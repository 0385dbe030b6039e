"""``strength="auto"`` in two processes: the same to the bit in both, and to 1e-10 that of loops over all they have."""

from __future__ import annotations

import pytest
import torch

from saliency_reg import RelationWeights, SaliencyRegularizer
from saliency_reg.regularizer.strength import WINDOW
from tests.reference.slow import slow_penalty
from tests.reference.slow_ranks import Share, slow_joined_step
from tests.support.two_processes import run_on_two_processes
from tests.support.zoo import TASKS

from .support import RATE, build_model, error_of, losses_of

STEPS = 2 * WINDOW + 1


def share_of(step: int, rank: int, sizes: tuple[int, int], absent: tuple[str, ...]) -> Share:
    generator = torch.Generator().manual_seed(10 * step + rank)
    inputs = torch.randn(sizes[rank], 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(sizes[rank], len(TASKS), generator=generator, dtype=torch.float64)
    return Share(inputs, targets, tuple(task for task in TASKS if rank == 0 or task not in absent))


def reference(sizes: tuple[int, int], absent: tuple[str, ...]) -> list[float]:
    model, relations = build_model(), RelationWeights(len(TASKS), "entropic")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    strength, limit = 0.0, None
    strengths, penalties, totals = [], 0.0, 0.0
    for step in range(STEPS):
        strengths.append(strength)
        shares = [share_of(step, rank, sizes, absent) for rank in range(2)]
        found = slow_joined_step(model, TASKS, shares, losses_of, relations.matrix(), strength)
        samples = found.samples.diagonal().max().item()
        penalties += samples * slow_penalty(found.distances, relations.matrix()).item()
        losses = [sum(losses_of(model(own.inputs, own.ran), own.targets).values()).item() for own in shares]
        totals += samples * sum(losses) / 2  # as DistributedDataParallel weighs them
        for name, parameter in model.named_parameters():
            parameter.grad = found.gradients[name]
        optimizer.step()
        relations.update(found.distances, strength, observed=found.samples > 0)
        if step % WINDOW == WINDOW - 1:
            limit = 0.2 * totals / penalties if limit is None else limit
            strength = min(0.2 * totals / penalties, limit)
            penalties = totals = 0.0
    return strengths


def one_rank(rank: int, sizes: tuple[int, int], absent: tuple[str, ...]) -> list[float]:
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    regularizer = SaliencyRegularizer(
        model, "heads", strength="auto", share=0.2, metric="l1", relations=RelationWeights(len(TASKS), "entropic"),
        optimizer=optimizer,
    )  # fmt: skip
    strengths = []
    for step in range(STEPS):
        strengths.append(regularizer.current_strength)
        own = share_of(step, rank, sizes, absent)
        losses = losses_of(model(own.inputs, own.ran), own.targets)
        optimizer.zero_grad()
        (sum(losses.values()) + regularizer(losses=losses)).backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()
    return strengths


@pytest.mark.parametrize(("sizes", "absent"), [((4, 4), ()), ((5, 2), ()), ((3, 4), (TASKS[1],)), ((4, 4), TASKS[1:])])
def test_against_loops(sizes: tuple[int, int], absent: tuple[str, ...]) -> None:
    first, second = run_on_two_processes(one_rank, sizes, absent)
    assert first == second
    assert first == pytest.approx(reference(sizes, absent), rel=1e-10)
    assert len(set(first)) >= 2


def without_losses(rank: int) -> tuple[str, str]:
    model = build_model()
    regularizer = SaliencyRegularizer(model, "heads", strength="auto", metric="l1")
    own = share_of(0, rank, (4, 4), ())
    losses = losses_of(model(own.inputs, own.ran), own.targets)
    return error_of(lambda: regularizer(losses=losses if rank == 0 else None))


def test_losses_that_one_process_lacks_are_an_error_in_both() -> None:
    for kind, text in run_on_two_processes(without_losses):
        assert kind == "MissingArgumentError"
        assert "losses=losses" in text


def with_another_share(rank: int) -> tuple[str, str]:
    model = build_model()
    regularizer = SaliencyRegularizer(model, "heads", strength="auto", share=0.1 + rank, metric="l1")
    own = share_of(0, rank, (4, 4), ())
    losses = losses_of(model(own.inputs, own.ran), own.targets)
    return error_of(lambda: regularizer(losses=losses))


def test_shares_have_to_be_the_same() -> None:
    for kind, text in run_on_two_processes(with_another_share):
        assert kind == "ConfigurationError"
        assert "different share: 0.1 on rank 0, 1.1 on rank 1" in text
