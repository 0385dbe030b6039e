"""Groups of tasks whose factors are alike (directive ``similarity``), or as unlike as can be (``variance``)."""

from __future__ import annotations

from torch import Tensor

from ..groups import average_linkage

DIRECTIVES = ("similarity", "variance")


def clusters_below(similarities: Tensor, theta: float) -> list[list[int]]:
    """Return the clusters of average linkage on ``1 - similarity`` that merge below a distance, by their first members.

    Args:
        similarities: ``[T, T]``, symmetric.
        theta: of 0 merges nothing, not even what is equal.
    """
    size = len(similarities)
    clusters = {one: [one] for one in range(size)}
    for merge, (low, high, distance, _) in enumerate(average_linkage(similarities).tolist()):
        if distance >= theta:  # of average linkage, no later one is smaller
            break
        clusters[size + merge] = clusters.pop(int(low)) + clusters.pop(int(high))
    return sorted(sorted(cluster) for cluster in clusters.values())


def spread_out(distances: Tensor, clusters: list[list[int]]) -> list[list[int]]:
    """Return as many groups as there are clusters, with the members of each cluster in different groups as far as possible.

    Groups are of nearly equal size, and distances within them as large as swaps of two members of one cluster make them.

    Args:
        distances: ``[T, T]``, symmetric.
        clusters: of numbers, each in one.

    Returns:
        Groups of numbers, each in order, in the order of their first members; none is empty.
    """
    groups: list[list[int]] = [[] for _ in clusters]
    place: dict[int, int] = {}
    for cluster in sorted(clusters, key=len, reverse=True):  # sorted is stable
        own = [0] * len(groups)
        left = list(cluster)
        while left:
            open_to = min((own[g], len(groups[g])) for g in range(len(groups)))
            free = [g for g in range(len(groups)) if (own[g], len(groups[g])) == open_to]
            gains = {(one, g): _sum(distances, one, groups[g]) for one in left for g in free}
            one, g = max(gains, key=lambda choice: gains[choice])
            groups[g].append(one)
            place[one], own[g] = g, own[g] + 1
            left.remove(one)
    _swap(distances, clusters, groups, place)
    return sorted(sorted(group) for group in groups)


def _swap(distances: Tensor, clusters: list[list[int]], groups: list[list[int]], place: dict[int, int]) -> None:
    """Swap members of one cluster between groups, as long as that adds to the distances within groups."""
    pairs = [(a, b) for cluster in clusters for n, a in enumerate(cluster) for b in cluster[n + 1 :]]
    better = True
    while better:
        better = False
        for a, b in pairs:
            first, second = groups[place[a]], groups[place[b]]
            if first is second:
                continue
            now = _sum(distances, a, first) + _sum(distances, b, second)
            then = _sum(distances, a, second) + _sum(distances, b, first) - 2 * float(distances[a, b])
            if then > now + 1e-9:  # rounding, by which it would swap for ever
                first[first.index(a)], second[second.index(b)] = b, a
                place[a], place[b], better = place[b], place[a], True


def _sum(distances: Tensor, one: int, group: list[int]) -> float:
    return float(distances[one][group].sum()) - (float(distances[one, one]) if one in group else 0.0)


def medoid(distances: Tensor, group: list[int]) -> int:
    """Return the member with the smallest distances to the others; of equal ones the first."""
    sums = distances[group][:, group].sum(1)
    return group[int((sums <= sums.min() + 1e-9).nonzero()[0])]
