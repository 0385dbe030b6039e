"""Agreement of groupings."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from saliency_reg import best_groups, group_stability

from .support import set_partitions


def named(groups: list[list[int]]) -> list[tuple[str, ...]]:
    return [tuple("abcdefgh"[i] for i in group) for group in groups]


def test_adjusted_rand_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    every = list(set_partitions(4))
    for first, second in combinations(every, 2):
        labels = [
            [next(n for n, group in enumerate(groups) if i in group) for i in range(4)] for groups in (first, second)
        ]
        found = group_stability([named(first), named(second)])
        assert found.adjusted_rand == pytest.approx(metrics.adjusted_rand_score(*labels), abs=1e-12)


def test_mean_over_pairs_and_share_of_groupings() -> None:
    groupings = [named([[0, 1], [2, 3]]), named([[0, 1, 2], [3]]), named([[0], [1], [2], [3]])]
    found = group_stability(groupings, tasks=list("abcd"))
    pairs = [group_stability([first, second]).adjusted_rand for first, second in combinations(groupings, 2)]
    assert found.adjusted_rand == pytest.approx(sum(pairs) / 3)
    expected = torch.eye(4, dtype=torch.float64)
    for i, j, times in ((0, 1, 2), (0, 2, 1), (1, 2, 1), (2, 3, 1)):
        expected[i, j] = expected[j, i] = times / 3
    torch.testing.assert_close(found.together, expected)
    assert found.tasks == ("a", "b", "c", "d")


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1], [2, 3]]])
def test_equal_groupings_agree(groups: list[list[int]]) -> None:
    other = [group[::-1] for group in groups[::-1]]
    assert group_stability([named(groups), named(other), named(groups)]).adjusted_rand == 1.0


def test_order_of_tasks_is_that_asked_for() -> None:
    found = group_stability([[("a", "b"), ("c",)]] * 2, tasks=["c", "a", "b"])
    assert found.tasks == ("c", "a", "b")
    assert found.together.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_overlapping_groups_agree_by_their_pairs() -> None:
    gains = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    found = [
        best_groups(gains + 0.3 * noise * torch.ones(7).outer(torch.arange(7.0)), groups=3).groups for noise in (0, 1)
    ]
    agreement = group_stability(found)
    assert agreement.adjusted_rand < 1.0
    pairs = [
        [any({i, j} <= set(group) for group in groups) for i, j in combinations(map(str, range(7)), 2)]
        for groups in found
    ]
    share = sum(a == b for a, b in zip(*pairs)) / 21
    p, q = (sum(some) / 21 for some in pairs)
    chance = p * q + (1 - p) * (1 - q)
    assert agreement.adjusted_rand == pytest.approx((share - chance) / (1 - chance))
