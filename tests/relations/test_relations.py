"""Relation weights: each rule against an independent formula, invariants, and state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from saliency_reg import RelationWeights
from saliency_reg.relations.rules import project_to_simplex
from tests.reference.slow import slow_authors_coefficients, slow_simplex_projection

LEARNED = ("entropic", "per_task", "projected", "authors")


def distances_at(step: int, tasks: int = 5, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    raw = torch.rand(tasks, tasks, generator=generator, dtype=torch.float64).triu(1) * size
    return raw + raw.T


def upper(matrix: Tensor) -> Tensor:
    row, column = torch.triu_indices(len(matrix), len(matrix), 1)
    return matrix[row, column]


def assert_valid(matrix: Tensor, mass: float) -> None:
    assert torch.equal(matrix, matrix.T)
    assert (matrix >= 0).all()
    assert (matrix.diagonal() == 0).all()
    assert float(upper(matrix).sum()) == pytest.approx(mass, rel=1e-12)


@pytest.mark.parametrize("rule", LEARNED)
@pytest.mark.parametrize("mass", [1.0, 45.0, 0.3])
def test_weights_stay_valid(rule: str, mass: float) -> None:
    relations = RelationWeights(5, rule, mass=mass)
    torch.testing.assert_close(upper(relations.matrix()), torch.full((10,), mass / 10, dtype=torch.float64))
    for step in range(30):
        relations.update(distances_at(step), strength=0.5)
        assert_valid(relations.matrix(), mass)


@pytest.mark.parametrize("rule", LEARNED)
def test_the_closest_pair_gains_and_the_farthest_loses(rule: str) -> None:
    relations, distances = RelationWeights(4, rule), distances_at(0, 4)
    before = relations.matrix()
    for _ in range(20):
        relations.update(distances)
    change = upper(relations.matrix() - before)
    assert change[upper(distances).argmin()] > 0
    assert change[upper(distances).argmax()] < 0


@pytest.mark.parametrize("rule", LEARNED)
def test_permutation_of_tasks(rule: str) -> None:
    order = torch.tensor([3, 1, 4, 0, 2])
    plain, permuted = RelationWeights(5, rule), RelationWeights(5, rule)
    for step in range(5):
        plain.update(distances_at(step))
        permuted.update(distances_at(step)[order][:, order])
    torch.testing.assert_close(permuted.matrix(), plain.matrix()[order][:, order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("strength", [0.1, 2.0])
def test_authors_follows_the_published_update(strength: float) -> None:
    relations = RelationWeights(5, "authors")
    history = []
    for step in range(100):
        distances = distances_at(step, size=20.0)
        relations.update(distances, strength=strength)
        history.append(distances.tolist())
        expected = torch.tensor(slow_authors_coefficients(history, strength, 1e-3), dtype=torch.float64)
        if step % 9 == 0 or step == 99:
            torch.testing.assert_close(relations.coefficients, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(relations.matrix(), expected / upper(expected).sum(), rtol=1e-9, atol=1e-12)


def test_authors_steps_have_the_sizes_that_were_measured() -> None:
    """0.00064 at the first step, 0.00048 at the fourth, then growing to 0.0032."""
    distances = torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]], dtype=torch.float64)
    for step, expected in {1: 0.00064, 4: 0.00048, 2000: 0.0032}.items():
        relations = RelationWeights(3, "authors")
        relations.updates.fill_(step - 1)
        relations.update(distances, strength=100.0)
        assert float((upper(relations.coefficients) - 1).abs().max()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("rule", ["entropic", "per_task", "projected"])
def test_size_of_saliencies_does_not_matter(rule: str, factor: float) -> None:
    plain, scaled = RelationWeights(5, rule), RelationWeights(5, rule)
    for step in range(10):
        plain.update(distances_at(step))
        scaled.update(distances_at(step) * factor)
    torch.testing.assert_close(scaled.matrix(), plain.matrix(), rtol=1e-10, atol=1e-15)


def test_entropic_is_a_softmax_of_the_bias_corrected_running_mean() -> None:
    relations = RelationWeights(5, "entropic", mass=2.0, temperature=0.4, momentum=0.8)
    total, weight = torch.zeros(10, dtype=torch.float64), 0.0
    for step in range(6):
        relations.update(distances_at(step))
        total, weight = 0.8 * total + 0.2 * upper(distances_at(step)), 0.8 * weight + 0.2
        mean = total / weight
        weights = torch.exp(-mean / (0.4 * mean.mean()))
        torch.testing.assert_close(upper(relations.matrix()), 2.0 * weights / weights.sum())


def test_per_task_is_a_softmax_over_the_other_tasks() -> None:
    relations = RelationWeights(5, "per_task", mass=2.0, temperature=0.4, momentum=0.8)
    total, weight = torch.zeros(5, 5, dtype=torch.float64), 0.0
    for step in range(6):
        relations.update(distances_at(step))
        total, weight = 0.8 * total + 0.2 * distances_at(step), 0.8 * weight + 0.2
    mean = total / weight
    scale = upper(mean).mean()
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        closeness = {j: torch.exp(-mean[i, j] / (0.4 * scale)) for j in range(5) if j != i}
        for j, own in closeness.items():
            expected[i, j] += 2.0 * own / sum(closeness.values()) / 5
            expected[j, i] += 2.0 * own / sum(closeness.values()) / 5
    torch.testing.assert_close(relations.matrix(), expected)


def test_per_task_gives_a_lonely_task_as_much_as_others_have() -> None:
    """One softmax over all pairs leaves it next to nothing."""
    distances = torch.full((5, 5), 1.0)
    distances[4] = distances[:, 4] = 9.0
    distances.fill_diagonal_(0)
    shares = {}
    for rule in ("entropic", "per_task"):
        relations = RelationWeights(5, rule, temperature=0.1)
        relations.update(distances)
        shares[rule] = float(relations.matrix()[4].sum())
    assert shares["per_task"] > 0.19
    assert shares["entropic"] < 1e-6


def test_absolute_scale() -> None:
    relations = RelationWeights(5, "entropic", temperature=0.5, scale=2.0)
    relations.update(distances_at(0))
    weights = torch.exp(-upper(distances_at(0)) / (0.5 * 2.0))
    torch.testing.assert_close(upper(relations.matrix()), weights / weights.sum())


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_distances_give_uniform_weights(value: float) -> None:
    for rule in LEARNED:
        relations = RelationWeights(4, rule)
        for _ in range(5):
            relations.update(torch.full((4, 4), value).fill_diagonal_(0))
        torch.testing.assert_close(upper(relations.matrix()), torch.full((6,), 1 / 6, dtype=torch.float64))


def test_projected_is_a_gradient_step_and_a_projection() -> None:
    relations, weights = RelationWeights(5, "projected", learning_rate=0.3), torch.full((10,), 0.1, dtype=torch.float64)
    for step in range(12):
        pairs = upper(distances_at(step))
        relations.update(distances_at(step), strength=0.5)
        weights = slow_simplex_projection(weights - 0.3 * 0.5 * pairs / pairs.mean(), 1.0)
        torch.testing.assert_close(upper(relations.matrix()), weights, rtol=1e-11, atol=1e-13)
    assert (weights == 0).any()  # the run did reach the boundary


@pytest.mark.parametrize("mass", [1.0, 0.25, 40.0])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("length", [1, 2, 45, 780])
def test_projection_to_the_simplex(length: int, size: float, mass: float) -> None:
    """Optimality conditions, which hold for the exact solution and for nothing else."""
    vector = torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64) * size
    result = project_to_simplex(vector, mass)
    tolerance = 1e-12 * mass
    assert (result >= 0).all()
    assert float(result.sum()) == pytest.approx(mass, abs=tolerance * max(1.0, size**0.5))
    theta = (vector - result)[result > 0]
    assert float(theta.max() - theta.min()) <= 1e-12 * max(size, mass)
    assert (vector[result == 0] <= theta.max() + 1e-12 * max(size, mass)).all()
    if size <= 1:
        torch.testing.assert_close(result, slow_simplex_projection(vector, mass), rtol=0, atol=1e-12 * max(mass, 1))


def test_a_point_of_the_simplex_is_its_own_projection() -> None:
    point = torch.softmax(torch.randn(20, dtype=torch.float64), 0)
    torch.testing.assert_close(project_to_simplex(point), point, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rule", LEARNED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_distances_that_are_not_finite_move_nothing(rule: str, bad: float) -> None:
    relations = RelationWeights(3, rule)
    relations.update(distances_at(0, 3))
    before = copy.deepcopy(relations.state_dict())
    broken = distances_at(1, 3)
    broken[0, 1] = broken[1, 0] = bad
    relations.update(broken)
    for name, value in relations.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("rule", LEARNED)
def test_pairs_that_were_not_observed_keep_their_weight(rule: str) -> None:
    relations = RelationWeights(4, rule, momentum=0.0)
    observed = torch.ones(4, 4, dtype=torch.bool)
    observed[3, :] = observed[:, 3] = False
    distances = distances_at(0, 4)
    distances[3, :] = distances[:, 3] = float("nan")
    before = relations.matrix()
    relations.update(distances, observed=observed)
    after = relations.matrix()
    assert_valid(after, 1.0)
    assert not torch.equal(after[:3, :3], before[:3, :3])
    if rule == "projected":
        torch.testing.assert_close(after[3], before[3])
    if rule == "authors":
        assert torch.equal(relations.coefficients[3, :3], torch.ones(3, dtype=torch.float64))


def test_authors_survives_pairs_that_have_all_died() -> None:
    relations = RelationWeights(3, "authors")
    relations.pair_coefficients.copy_(torch.tensor([0.0, 1.0, 1.0]))
    only_first = torch.zeros(3, 3, dtype=torch.bool)
    only_first[0, 1] = only_first[1, 0] = True
    relations.update(distances_at(0, 3), observed=only_first)
    assert torch.equal(upper(relations.coefficients), torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))


def test_a_pair_that_was_never_seen_counts_as_the_mean_of_the_others() -> None:
    relations = RelationWeights(4, "entropic", temperature=1.0)
    observed = ~torch.eye(4, dtype=torch.bool)
    observed[0, 3] = observed[3, 0] = False
    distances = distances_at(0, 4)
    relations.update(distances, observed=observed)
    filled = distances.clone()
    filled[0, 3] = filled[3, 0] = upper(distances)[[0, 1, 3, 4, 5]].mean()
    expected = RelationWeights(4, "entropic", temperature=1.0)
    expected.update(filled)
    torch.testing.assert_close(relations.matrix(), expected.matrix())


def test_fixed_never_moves() -> None:
    matrix = distances_at(0)
    for mass in (1.0, 7.0):  # as strong as any other rule, whatever the matrix is multiplied by
        relations = RelationWeights(5, "fixed", matrix=matrix, mass=mass)
        relations.update(distances_at(1))
        torch.testing.assert_close(relations.matrix(), mass * matrix / matrix.triu(1).sum(), rtol=1e-14, atol=0)
    uniform = RelationWeights(5, "fixed", mass=20.0).matrix()
    assert_valid(uniform, 20.0)


@pytest.mark.parametrize("rule", [*LEARNED, "fixed"])
def test_state_goes_on_bit_for_bit(rule: str) -> None:
    first, second = RelationWeights(5, rule), RelationWeights(5, rule)
    for step in range(7):
        first.update(distances_at(step))
    state = first.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    second.load_state_dict(state)
    for step in range(7, 14):
        first.update(distances_at(step))
        second.update(distances_at(step))
    assert torch.equal(first.matrix(), second.matrix())


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()])
def test_state_keeps_its_digits_when_formats_change(change) -> None:
    relations = RelationWeights(5, "entropic")
    relations.update(distances_at(0))
    before = relations.matrix()
    change(relations)
    assert torch.equal(relations.matrix(), before)
    assert relations.matrix().dtype == torch.float64


def test_no_parameters() -> None:
    assert list(RelationWeights(3).parameters()) == []
