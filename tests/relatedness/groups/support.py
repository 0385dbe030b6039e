"""Obviously right, slow references, and matrices to compare on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from pathlib import Path

import torch
from torch import Tensor

Groups = Sequence[Sequence[int]]


def published(name: str) -> tuple[list[str], Tensor]:
    """Task names and gains of a published matrix."""
    content = json.loads((Path(__file__).parent / "data" / f"tag_{name}.json").read_text(encoding="utf-8"))
    return content["tasks"], torch.tensor(content["gains"], dtype=torch.float64)


def set_partitions(size: int) -> Iterator[list[list[int]]]:
    """All partitions of the numbers below ``size``."""

    def extend(item: int, groups: list[list[int]]) -> Iterator[list[list[int]]]:
        if item == size:
            yield [list(group) for group in groups]
            return
        for group in groups:
            group.append(item)
            yield from extend(item + 1, groups)
            group.pop()
        yield from extend(item + 1, [*groups, [item]])

    return extend(0, [])


def subsets(size: int) -> list[tuple[int, ...]]:
    """All non-empty sets of the numbers below ``size``."""
    return list(chain.from_iterable(combinations(range(size), count) for count in range(1, size + 1)))


def score(gains: list[list[float]], group: Sequence[int], task: int, alone: Sequence[float]) -> float:
    others = [other for other in group if other != task]
    return sum(gains[task][other] for other in others) / len(others) if others else alone[task]


def mean_of_best(gains: list[list[float]], groups: Groups, alone: Sequence[float]) -> float:
    """TAG's objective: mean over tasks of the score in their best group."""
    size = len(gains)
    best = [max(score(gains, group, task, alone) for group in groups if task in group) for task in range(size)]
    return sum(best) / size


def best_cover(gains: Tensor, most: int, alone: Sequence[float] | None = None) -> float:
    """The largest objective over all sets of at most ``most`` groups that have all tasks, one by one."""
    size, rows = len(gains), gains.tolist()
    covers = (
        groups
        for count in range(1, most + 1)
        for groups in combinations(subsets(size), count)
        if len(set().union(*groups)) == size
    )
    return max(mean_of_best(rows, groups, alone or [-1e6] * size) for groups in covers)


def lu_cost(affinity: list[list[float]], groups: Groups, branch_cost: float, weight: float) -> float:
    """``L^l`` of Lu et al., sum by sum."""
    separation = 0.0
    for group in groups:
        closeness = sum(min(affinity[k][other] for other in group) for k in group) / len(group)
        separation += 1.0 - closeness
    return (len(groups) - 1) * branch_cost + weight * separation / len(groups)


def random_affinity(size: int, seed: int, *, spread: float = 4.0) -> Tensor:
    """Affinities of random points; 1 on the diagonal."""
    points = torch.rand(size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.exp(-spread * torch.cdist(points, points).square())


def random_symmetric(size: int, seed: int) -> Tensor:
    """Affinities without any structure; 1 on the diagonal."""
    half = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((half + half.T) / 2).fill_diagonal_(1.0)


def duplicates(copies: Sequence[int], seed: int) -> tuple[Tensor, set[frozenset[int]]]:
    """An affinity of duplicates of distinct tasks, in random order, and the groups of duplicates."""
    generator = torch.Generator().manual_seed(seed)
    between = torch.rand(len(copies), len(copies), generator=generator, dtype=torch.float64) * 0.6
    between = ((between + between.T) / 2).fill_diagonal_(1.0)
    kind = torch.repeat_interleave(torch.arange(len(copies)), torch.tensor(copies))
    kind = kind[torch.randperm(len(kind), generator=generator)]
    groups = {frozenset((kind == number).nonzero().flatten().tolist()) for number in range(len(copies))}
    return between[kind][:, kind], groups


def as_sets(groups: Sequence[Sequence[str]]) -> set[frozenset[int]]:
    return {frozenset(int(name) for name in group) for group in groups}
