"""The best set of groups, against brute force and the published optima."""

from __future__ import annotations

import pytest
import torch

from saliency_reg import best_groups

from .support import best_cover, mean_of_best, published, score, set_partitions, subsets


def gains_of(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("most", "expected", "groups"),
    [
        (1, 0.1293, {("segmentation", "depth", "normals", "keypoints", "edges")}),
        (2, 0.3217, {("segmentation", "depth", "normals"), ("keypoints", "edges")}),
        (3, 0.3487, {("segmentation", "depth"), ("depth", "normals"), ("keypoints", "edges")}),
    ],
)
def test_taskonomy_as_published(most: int, expected: float, groups: set[tuple[str, ...]]) -> None:
    tasks, gains = published("taskonomy")
    found = best_groups(gains, tasks, groups=most)
    assert set(found.groups) == groups
    assert round(found.score, 4) == expected
    assert found.score == pytest.approx(best_cover(gains, most), abs=1e-12)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_celeba_is_the_best_of_all_covers(most: int) -> None:
    tasks, gains = published("celeba")
    size = len(tasks)
    every = subsets(size)
    rows = gains.tolist()
    table = torch.full((len(every), size), -1e9, dtype=torch.float64)
    for number, group in enumerate(every):
        for task in group:
            table[number, task] = score(rows, group, task, [-1e6] * size)
    best = -float("inf")
    if most == 1:
        best = float(table[-1].mean())
    # A task without a group pulls the mean far below any cover.
    for first in range(len(every) if most > 1 else 0):
        pair = torch.maximum(table[first], table[first:])
        if most == 2:
            best = max(best, float(pair.mean(dim=1).max()))
        # Of three groups one has the first task; the others are any two.
        elif 0 in every[first]:
            pair = torch.maximum(table[first], table)
            for second in range(len(every)):
                best = max(best, float(torch.maximum(pair[second], table[second:]).mean(dim=1).max()))
    found = best_groups(gains, tasks, groups=most)
    assert found.score == pytest.approx(best, abs=1e-10)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("size", "most"), [(3, 3), (4, 1), (4, 2), (4, 4), (5, 2), (5, 3), (6, 2)])
def test_equals_brute_force_over_covers(size: int, most: int, seed: int) -> None:
    gains = gains_of(size, seed)
    found = best_groups(gains, groups=most)
    assert found.score == pytest.approx(best_cover(gains, most), abs=1e-12)
    places = [[int(name) for name in group] for group in found.groups]
    assert mean_of_best(gains.tolist(), places, [-1e6] * size) == pytest.approx(found.score, abs=1e-12)
    assert len(places) <= most


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "most"), [(4, 3), (6, 2), (7, 4), (8, 3), (8, 8)])
@pytest.mark.parametrize("singles", [False, True])
def test_without_overlap_equals_brute_force_over_set_partitions(size: int, most: int, seed: int, singles: bool) -> None:
    gains = gains_of(size, seed)
    alone = torch.randn(size, generator=torch.Generator().manual_seed(99 + seed), dtype=torch.float64)
    own = alone.tolist() if singles else [-1e6] * size
    rows = gains.tolist()
    best = max(mean_of_best(rows, groups, own) for groups in set_partitions(size) if len(groups) <= most)
    found = best_groups(gains, groups=most, overlap=False, alone=alone if singles else None)
    assert found.score == pytest.approx(best, abs=1e-12)
    assert sorted(int(name) for group in found.groups for name in group) == list(range(size))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "most"), [(7, 3), (8, 4)])
def test_equals_brute_force_over_set_partitions_into_readers(size: int, most: int, seed: int) -> None:
    """Tasks read from one group form a class; each class takes the best of all groups that contain it."""
    gains = gains_of(size, seed).tolist()
    every = [frozenset(group) for group in subsets(size)]
    table = {(group, task): score(gains, list(group), task, [-1e6] * size) for group in every for task in group}
    value = {some: max(sum(table[group, task] for task in some) for group in every if group >= some) for some in every}
    best = max(
        sum(value[frozenset(group)] for group in groups) for groups in set_partitions(size) if len(groups) <= most
    )
    assert best_groups(gains, groups=most).score == pytest.approx(best / size, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_tasks_alone_have_gains_of_their_own(seed: int) -> None:
    gains = gains_of(5, seed)
    alone = torch.linspace(-0.5, 1.0, 5, dtype=torch.float64)
    found = best_groups(gains, groups=3, alone=alone)
    assert found.score == pytest.approx(best_cover(gains, 3, alone.tolist()), abs=1e-12)


def test_a_task_that_only_loses_is_alone_where_that_is_better() -> None:
    gains = torch.tensor([[0.0, 1.0, -5.0], [1.0, 0.0, -5.0], [-5.0, -5.0, 0.0]])
    assert best_groups(gains, groups=2, alone=torch.zeros(3)).groups == (("0", "1"), ("2",))
    without = best_groups(gains, groups=2)
    assert all(len(group) > 1 for group in without.groups)
    assert without.gains["2"] == -5.0


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_order_scale_and_diagonal_play_no_part(seed: int, overlap: bool) -> None:
    gains = gains_of(7, seed)
    names = list("abcdefg")
    found = best_groups(gains, names, groups=3, overlap=overlap)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    changed = 1e-6 * gains + torch.diag(torch.full((7,), float("nan"), dtype=torch.float64))
    permuted = best_groups(changed[order][:, order], [names[i] for i in order.tolist()], groups=3, overlap=overlap)
    assert {frozenset(group) for group in permuted.groups} == {frozenset(group) for group in found.groups}
    assert permuted.score == pytest.approx(1e-6 * found.score, rel=1e-12)


def test_more_groups_are_never_worse_and_overlap_never_hurts() -> None:
    gains = gains_of(9, 0)
    scores = [best_groups(gains, groups=most).score for most in range(1, 10)]
    apart = [best_groups(gains, groups=most, overlap=False).score for most in range(1, 10)]
    assert scores == sorted(scores)
    assert apart == sorted(apart)
    assert all(some >= less - 1e-12 for some, less in zip(scores, apart))


def test_of_equal_choices_the_fewest_groups() -> None:
    assert best_groups(torch.full((6, 6), 0.1), groups=4).groups == (tuple("012345"),)


@pytest.mark.parametrize("overlap", [True, False])
def test_duplicates_of_three_tasks_are_three_groups(overlap: bool) -> None:
    kind = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    gains = (kind.unsqueeze(1) == kind).to(torch.float64) - 0.1
    assert best_groups(gains, groups=5, overlap=overlap).groups == (tuple("0369"), tuple("147"), tuple("258"))


def test_each_task_is_read_from_its_best_group() -> None:
    gains = gains_of(8, 5)
    names = list("abcdefgh")
    found = best_groups(gains, names, groups=4)
    rows = gains.tolist()
    for task, group in found.assignment.items():
        assert task in group
        own = names.index(task)
        scores = {g: score(rows, [names.index(n) for n in g], own, [-1e6] * 8) for g in found.groups if task in g}
        assert scores[group] == max(scores.values())
        assert found.gains[task] == pytest.approx(scores[group], abs=1e-12)
    assert set(found.assignment.values()) == set(found.groups)
    assert found.score == pytest.approx(sum(found.gains.values()) / 8, abs=1e-12)


def test_twelve_tasks_are_searched() -> None:
    kind = torch.arange(12) % 4
    gains = (kind.unsqueeze(1) == kind).to(torch.float64) + 0.01 * gains_of(12, 1).clamp(-1, 1)
    found = best_groups(gains, groups=4, overlap=False)
    assert len(found.groups) == 4
    assert {frozenset(int(n) % 4 for n in group) for group in found.groups} == {frozenset({k}) for k in range(4)}
