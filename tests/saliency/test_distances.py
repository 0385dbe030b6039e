"""Distances: reference, properties, and behaviour at points where naive formulas break."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saliency_reg import task_distances
from saliency_reg.saliency import distances
from saliency_reg.saliency.distances import METRICS
from tests.reference.slow import slow_distances

REDUCTIONS = ("mean", "sum")


def random_saliencies(tasks: int = 4, samples: int = 3, channels: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, samples, channels, generator=generator, dtype=torch.float64)


def assert_symmetric_with_zero_diagonal(distances: Tensor) -> None:
    assert torch.equal(distances, distances.T)
    assert torch.equal(distances.diagonal(), torch.zeros(len(distances), dtype=distances.dtype))
    assert (distances >= 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_equals_loops(metric: str, reduction: str) -> None:
    saliencies = random_saliencies().requires_grad_()
    found = task_distances(saliencies, metric=metric, reduction=reduction)
    expected = slow_distances([list(task) for task in saliencies], metric, reduction)
    assert_symmetric_with_zero_diagonal(found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    weights = torch.rand(4, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad((found * weights).sum(), saliencies)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), saliencies)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric: str) -> None:
    saliencies = random_saliencies(3, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: task_distances(s, metric=metric), saliencies)


@pytest.mark.parametrize("metric", METRICS)
def test_permutation_of_tasks_permutes_the_matrix(metric: str) -> None:
    saliencies, order = random_saliencies(), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        task_distances(saliencies[order], metric=metric), task_distances(saliencies, metric=metric)[order][:, order]
    )


@pytest.mark.parametrize(
    ("metric", "power"), [("l1", 1), ("l2", 1), ("sqeuclidean", 2), ("cosine", 0), ("sqchordal", 0)]
)
@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e3])
def test_scaling(metric: str, power: int, factor: float) -> None:
    saliencies = random_saliencies()
    expected = task_distances(saliencies, metric=metric) * factor**power
    torch.testing.assert_close(task_distances(saliencies * factor, metric=metric), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_batch_split(metric: str) -> None:
    saliencies = random_saliencies(samples=6)
    whole = task_distances(saliencies, metric=metric, reduction="sum")
    parts = [task_distances(part, metric=metric, reduction="sum") for part in saliencies.split([2, 4], dim=1)]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    torch.testing.assert_close(task_distances(saliencies, metric=metric), whole / 6)


@pytest.mark.parametrize("metric", METRICS)
def test_zero_and_equal_saliencies_have_distance_zero_and_finite_gradients(metric: str) -> None:
    same = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    saliencies = torch.stack([zero, zero, same, same])[:, None].requires_grad_()
    distances = task_distances(saliencies, metric=metric)
    assert distances[0, 1] == 0
    assert distances[2, 3].detach() < 1e-15
    if metric in ("cosine", "sqchordal"):
        assert distances[0, 2] == 1
    distances.sum().backward()
    assert saliencies.grad is not None
    assert torch.isfinite(saliencies.grad).all()
    assert saliencies.grad.abs().max() < 100


def test_sqchordal_relates_opposites_and_multiples() -> None:
    base = random_saliencies(1, 3, 5)[0]
    distances = task_distances(torch.stack([base, -base, 2 * base]), metric="sqchordal")
    assert distances.max() < 1e-14
    assert task_distances(torch.stack([base, -base]), metric="cosine")[0, 1] == pytest.approx(2.0)


@pytest.mark.parametrize("metric", METRICS)
def test_close_tasks_with_a_large_common_part_keep_their_digits(metric: str) -> None:
    """In float32, against float64 on the same numbers."""
    torch.manual_seed(0)
    # Without centring, squared distances of 1e-8 of the squared norms would be rounding error.
    common = 1.0 if metric in ("cosine", "sqchordal") else 1e4
    saliencies = (common * torch.randn(1, 3, 50) + torch.randn(5, 3, 50) * (1e-2 if common == 1 else 1)).float()
    exact = task_distances(saliencies.double(), metric=metric)
    found = task_distances(saliencies, metric=metric).double()
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    assert ((found - exact).abs() / exact.clamp(min=1e-30))[off_diagonal].max() < 1e-3


@pytest.mark.parametrize("metric", ["cosine", "sqchordal"])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_angles_of_tiny_and_huge_saliencies(metric: str, size: float) -> None:
    saliencies = random_saliencies().float()
    torch.testing.assert_close(
        task_distances(saliencies * size, metric=metric), task_distances(saliencies, metric=metric)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_sixteen_bits_are_computed_in_float32(metric: str, dtype: torch.dtype) -> None:
    saliencies = random_saliencies().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = task_distances(saliencies, metric=metric)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, task_distances(saliencies.float(), metric=metric), rtol=0, atol=0)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_reduced_matmul_precision_does_not_reach_the_distances(metric: str) -> None:
    saliencies = (torch.randn(1, 3, 50) + 1e-2 * torch.randn(5, 3, 50)).float()
    exact = task_distances(saliencies.double(), metric=metric)
    torch.set_float32_matmul_precision("medium")
    try:
        found = task_distances(saliencies, metric=metric)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-9)


def test_more_than_one_axis_after_the_batch_is_flattened() -> None:
    saliencies = torch.randn(3, 2, 4, 5, 6)
    torch.testing.assert_close(task_distances(saliencies), task_distances(saliencies.flatten(2)))


@pytest.mark.parametrize("by_columns", [True, False])
def test_both_ways_of_l1_distances(by_columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a CPU, over more columns than are taken at a time, and that of a GPU."""
    monkeypatch.setattr(distances, "_by_columns", lambda x: by_columns)
    monkeypatch.setattr(distances, "_ENTRIES", 1000)
    saliencies = torch.randn(3, 2, 700, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 3, dtype=torch.float64)
    found, wanted = task_distances(saliencies), slow_distances([list(task) for task in saliencies], "l1", "mean")
    torch.testing.assert_close(found, wanted)
    (ours,) = torch.autograd.grad((found * weights).sum(), saliencies)
    (theirs,) = torch.autograd.grad((wanted * weights).sum(), saliencies)
    torch.testing.assert_close(ours, theirs)
