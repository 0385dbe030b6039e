"""PCGrad as a weighting, Gramians, and what other weightings may be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from saliency_reg import PCGrad, SurgeryReport
from saliency_reg.distributed import Ranks
from saliency_reg.surgery import check_weighting, gramian, gramian_of, task_weights, weighted_sum
from tests.reference.slow_surgery import textbook_pcgrad


def random_gradients(tasks: int, seed: int, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(tasks)]


@pytest.mark.parametrize("tasks", [2, 3, 7, 20])
def test_pcgrad_equals_the_textbook(tasks: int) -> None:
    weighting = PCGrad(seed=5)
    conflicts = 0
    for call in range(10):
        gradients = random_gradients(tasks, call)
        found = gramian_of(gradients)
        conflicts += int((found < 0).sum())
        wanted = textbook_pcgrad(gradients, weighting.order(tasks, call))
        torch.testing.assert_close(weighted_sum(gradients, weighting(found)), wanted, rtol=1e-10, atol=1e-10)
    assert conflicts > 0
    assert int(weighting.calls) == 10


def test_two_tasks_equal_torchjd() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(20):
        found = gramian_of(random_gradients(2, seed))
        torch.testing.assert_close(PCGrad()(found), aggregation.PCGradWeighting()(found))


def test_the_order_is_a_function_of_seed_and_call() -> None:
    first, second = PCGrad(3), PCGrad(3)
    gradients = gramian_of(random_gradients(6, 0))
    for _ in range(3):
        torch.randn(5)  # somebody else's draws
        assert torch.equal(first(gradients), second(gradients))
    assert torch.equal(first.order(6), second.order(6, 3))
    orders = {tuple(first.order(6, call).flatten().tolist()) for call in range(20)}
    assert len(orders) == 20
    assert not torch.equal(PCGrad(4).order(6, 0), first.order(6, 0))
    for row, others in enumerate(first.order(6)):
        assert sorted([row, *others.tolist()]) == list(range(6))
    resumed = PCGrad(3)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(resumed(gradients), first(gradients))
    copied = copy.deepcopy(first)
    assert torch.equal(copied(gradients), first(gradients))


def test_every_order_is_equally_likely() -> None:
    weighting = PCGrad()
    counts: dict[tuple[int, ...], int] = {}
    for call in range(3000):
        order = tuple(weighting.order(4, call)[1].tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(400 < count < 600 for count in counts.values())


def test_properties() -> None:
    gradients = random_gradients(5, 1)
    found = gramian_of(gradients)
    torch.testing.assert_close(PCGrad()(found), PCGrad()(1e8 * found))  # a loss scale changes nothing
    agreeing = found.abs()
    torch.testing.assert_close(PCGrad()(agreeing), torch.ones(5, dtype=torch.float64), rtol=0, atol=0)
    with_zero = gramian_of([*gradients[:4], torch.zeros(4, dtype=torch.float64)])
    assert bool(torch.isfinite(PCGrad()(with_zero)).all())
    assert PCGrad()(torch.zeros(3, 3)).tolist() == [1.0, 1.0, 1.0]
    assert not bool(torch.isfinite(PCGrad()(torch.full((3, 3), torch.nan))).any())


def test_a_weighting_that_wants_a_jacobian() -> None:
    """Its Gramian is that of what it is called with."""
    base = pytest.importorskip("torchjd.aggregation._aggregator_bases")

    class Jacobian(torch.nn.Module):
        def forward(self, matrix: Tensor) -> Tensor:
            return (matrix @ matrix.T).sum(0)

    class Aggregator(base.WeightedAggregator):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__(Jacobian())

    found = gramian_of(random_gradients(4, 2))
    torch.testing.assert_close(task_weights(check_weighting(Aggregator(), 4), found, Ranks()), found.sum(0))


def test_a_gramian_that_is_not_finite_is_not_shown_to_a_solver() -> None:
    def solver(found: Tensor) -> Tensor:
        assert bool(torch.isfinite(found).all())
        return torch.ones(len(found))

    assert bool(torch.isnan(task_weights(solver, torch.full((2, 2), torch.inf), Ranks())).all())


@pytest.mark.parametrize("chunk", [1, 7, 2**22])
def test_gramian_and_sum_by_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gramian, "_CHUNK", chunk)
    gradients: list[Tensor | None] = [*random_gradients(3, 0, 10)]
    gradients.insert(1, None)
    flat = torch.stack([torch.zeros(10, dtype=torch.float64) if g is None else g for g in gradients])
    torch.testing.assert_close(gramian_of(gradients), flat @ flat.T)
    weights = torch.tensor([2.0, 5.0, -1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(weighted_sum(gradients, weights), weights @ flat)


def test_products_of_16_bit_gradients_do_not_overflow() -> None:
    gradients = [torch.full((100,), 300.0, dtype=torch.float16), torch.full((100,), -300.0, dtype=torch.float16)]
    assert gramian_of(gradients).tolist() == [[9e6, -9e6], [-9e6, 9e6]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gramian_of(gradients).tolist() == [[9e6, -9e6], [-9e6, 9e6]]
    assert weighted_sum(gradients, torch.tensor([1.0, 0.5])).tolist() == [150.0] * 100


def test_products_are_never_taken_in_reduced_precision() -> None:
    gradients = [torch.tensor([1.0, 1e-4]), torch.tensor([-1.0, 1.0])]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(gramian_of(gradients)[0, 1].item(), -0.9999, rtol=1e-6, atol=0)
        torch.testing.assert_close(weighted_sum(gradients, torch.tensor([1.0, 1.0]))[1].item(), 1.0001)
    finally:
        torch.set_float32_matmul_precision(before)


def test_report() -> None:
    gradients = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]), torch.zeros(2)]
    report = SurgeryReport.of(("a", "b", "c"), gramian_of(gradients), torch.ones(3, dtype=torch.float64))
    assert report.conflicts == 1.0
    assert report.cosines[0, 1].item() == pytest.approx(-(0.5**0.5))
    assert bool(torch.isnan(report.cosines[2]).all())
    plain = report.to_dict()
    assert plain["norms"] == {"a": 1.0, "b": pytest.approx(2**0.5), "c": 0.0}
    assert SurgeryReport.of(("a",), torch.ones(1, 1), torch.ones(1)).conflicts != 0  # NaN: there is no pair
