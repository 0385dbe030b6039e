"""MRN and MTRL: values against dense products, covariances against the objectives that they minimise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saliency_reg.head_penalties.task_covariance import covariance_of, gramian, initial_variance, precision_of

from .support import Heads, first_weights, make

pytestmark = pytest.mark.usefixtures("float64")


def attached(kind: str, outputs: int = 2, inputs: int = 3, tasks: str = "abc", **options: object) -> tuple:
    model = Heads(lambda task: nn.Linear(inputs, outputs), tasks)
    penalty, optimizer = make(model, kind, 0.6, **{"update_steps": 1, **options})
    return model, penalty, optimizer


def random_covariance(size: int) -> Tensor:
    root = torch.randn(size, size + 2)
    return root @ root.T


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_value_of_mrn_is_that_of_the_dense_kronecker_product(outputs: int) -> None:
    model, penalty, optimizer = attached("mrn", outputs)
    optimizer.step()
    assert (penalty.relations.abs() < 1).sum() == 6
    for covariance in (penalty.covariance, random_covariance(3)):
        penalty.load_state_dict({**penalty.state_dict(), "covariance": covariance})
        dense = np.kron(np.kron(covariance.numpy(), np.eye(outputs)), np.eye(3))
        vector = first_weights(model).flatten().numpy()
        expected = 0.6 / 2 * vector @ np.linalg.solve(dense, vector)
        assert float(penalty().detach()) == pytest.approx(expected, rel=1e-12)


def test_mrn_begins_as_a_weight_decay() -> None:
    model, penalty, _ = attached("mrn")
    penalty().backward()
    for head in model.heads.values():
        torch.testing.assert_close(head.weight.grad, 0.6 * head.weight.detach())
    assert torch.equal(penalty.relations, torch.eye(3))


@pytest.mark.parametrize("kind", ["mrn", "mtrl"])
def test_gradients_are_finite_differences(kind: str) -> None:
    model, penalty, optimizer = attached(kind, ridge=0.1)
    optimizer.step()
    assert torch.autograd.gradcheck(lambda *_: penalty(), tuple(head.weight for head in model.heads.values()))


def test_mrn_finds_the_most_likely_covariance() -> None:
    """Of the log posterior over S and the scale ``a`` of ``a S``, which a fixed trace leaves out: the best for this W."""
    model, penalty, optimizer = attached("mrn", shrinkage=0.0)
    optimizer.step()
    weights = first_weights(model)
    tasks, width = weights.shape

    def posterior(covariance: Tensor) -> float:
        q = float((weights * torch.linalg.solve(covariance, weights)).sum())
        scale = q / weights.numel()
        return q / scale + weights.numel() * math.log(scale) + width * float(torch.logdet(covariance))

    best = posterior(penalty.covariance)
    assert best < posterior(torch.eye(tasks)) - 0.1
    for _ in range(20):
        assert best < posterior(random_covariance(tasks))
        assert best < posterior(penalty.covariance + 0.01 * random_covariance(tasks))
    assert float(penalty.covariance.trace()) == pytest.approx(3)
    torch.testing.assert_close(penalty.covariance, 3 * weights @ weights.T / weights.square().sum())


def test_mtrl_is_the_squared_nuclear_norm_and_no_covariance_is_better() -> None:
    model, penalty, optimizer = attached("mtrl", shrinkage=0.0)
    weights = first_weights(model)
    assert float(penalty().detach()) == pytest.approx(0.6 * 3 * float(weights.square().sum()))  # at I / T
    optimizer.step()
    nuclear = float(torch.linalg.matrix_norm(weights, "nuc"))
    assert float(penalty().detach()) == pytest.approx(0.6 * nuclear**2, rel=1e-12)
    assert float(penalty.covariance.trace()) == pytest.approx(1)
    for _ in range(20):
        other = random_covariance(3)
        other = other / other.trace()
        assert float((weights * torch.linalg.solve(other, weights)).sum()) > nuclear**2


@pytest.mark.parametrize("kind", ["mrn", "mtrl"])
def test_shrinkage_is_towards_the_identity_and_keeps_the_trace(kind: str) -> None:
    gram = gramian(torch.randn(4, 7))
    plain, shrunk = (covariance_of(gram, kind, shrinkage) for shrinkage in (0.0, 0.3))
    mean = initial_variance(kind, 4)
    torch.testing.assert_close(shrunk, 0.7 * plain + 0.3 * mean * torch.eye(4))
    torch.testing.assert_close(precision_of(shrunk) @ shrunk, torch.eye(4))


@pytest.mark.parametrize("kind", ["mrn", "mtrl"])
def test_more_tasks_than_weights_and_equal_tasks_keep_it_invertible(kind: str) -> None:
    for weights in (torch.randn(9, 4), torch.ones(3, 5)):
        covariance = covariance_of(gramian(weights), kind, 0.0)
        values = torch.linalg.eigvalsh(covariance)
        assert values.min() > 0.5e-3 * values.mean()
        assert torch.isfinite(precision_of(covariance)).all()
    torch.testing.assert_close(covariance[0, 1] / covariance[0, 0], torch.tensor(1.0), rtol=1e-2, atol=0)


def test_weights_of_zero_and_weights_that_are_not_finite_leave_it() -> None:
    model, penalty, optimizer = attached("mrn")
    optimizer.step()
    before = penalty.covariance.clone()
    for value in (math.nan, 0.0):
        with torch.no_grad():
            for head in model.heads.values():
                head.weight.fill_(value)
        optimizer.step()
        assert torch.equal(penalty.covariance, before)
    assert int(penalty.steps) == 3


def test_tasks_that_agree_are_found_related() -> None:
    """a and b have the same labels, c those of neither."""
    model, penalty, optimizer = attached("mrn", 1, 8)
    x = torch.randn(50, 8)
    first, second = torch.randn(2, 8)
    targets = {"a": x @ first, "b": x @ first, "c": x @ (second - (second @ first) / (first @ first) * first)}
    for _ in range(100):
        optimizer.zero_grad()
        outputs = model(x)
        loss = sum((outputs[task][:, 0] - target).square().mean() for task, target in targets.items())
        (loss + penalty()).backward()
        optimizer.step()
    relations = penalty.relations
    assert relations[0, 1] > 0.8
    assert relations[:2, 2].abs().max() < 0.3
    assert torch.equal(relations, relations.T)
    assert relations.diagonal().eq(1).all()


def test_it_moves_in_every_so_many_steps_and_to_the_weights_behind_the_step() -> None:
    model, penalty, optimizer = attached("mtrl", update_steps=3)
    for step in range(1, 7):
        before = penalty.covariance.clone()
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
        assert torch.equal(penalty.covariance, before) == (step % 3 != 0)
        if step % 3 == 0:
            assert torch.equal(penalty.covariance, covariance_of(gramian(first_weights(model)), "mtrl", 0.1))


def test_it_needs_no_more_than_float32_of_the_weights_and_is_itself_float64() -> None:
    torch.set_default_dtype(torch.float32)
    model = Heads(lambda task: nn.Linear(3, 2)).to(torch.bfloat16)
    penalty, optimizer = make(model, "mrn", update_steps=1)
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        value = penalty()
    assert value.dtype == torch.float32
    weights = first_weights(model).double()
    expected = 0.05 * (weights * torch.linalg.solve(penalty.covariance, weights)).sum()
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-5)
    value.backward()
    assert penalty.to(torch.float16).covariance.dtype == torch.float64
