"""Normalised spectral clustering (Shi and Malik 2000; von Luxburg 2007) of an affinity."""

from __future__ import annotations

import torch
from torch import Tensor

#: Starts of k-means. A handful of tasks costs nothing; with this many the best one hardly depends on the seed.
RESTARTS = 100


def spectral_partitions(affinity: Tensor, groups: int, *, seed: int) -> list[list[list[int]]]:
    """Return the different partitions that the restarts of spectral clustering end in, that of least inertia first.

    As scikit-learn's ``SpectralClustering(affinity="precomputed", assign_labels="kmeans")``: rows of the first eigenvectors
    of the normalised Laplacian, divided by the roots of the degrees; the diagonal of the affinity plays no part.

    Args:
        affinity: ``[T, T]`` float64, symmetric, in [0, 1].
        groups: from 1 to T; every partition has exactly this many.
        seed: of the starts of k-means.
    """
    labels, inertia = k_means(spectral_embedding(affinity, groups), groups, seed=seed)
    order = inertia.argsort(stable=True).tolist()
    found: dict[str, list[list[int]]] = {}
    for restart in order:
        partition = partition_of(labels[restart].tolist())
        found.setdefault(repr(partition), partition)
    return list(found.values())


def spectral_embedding(affinity: Tensor, dimensions: int) -> Tensor:
    """Return the eigenvectors ``[T, dimensions]`` of least eigenvalue of the normalised Laplacian, over the root degrees."""
    others = affinity - affinity.diagonal().diag()
    degree = others.sum(dim=1)
    alone = degree == 0  # its own component of the graph: eigenvalue 0
    root = torch.where(alone, 1.0, degree.sqrt())
    laplacian = torch.diag((~alone).to(affinity.dtype)) - others / root.outer(root)
    vectors: Tensor = torch.linalg.eigh((laplacian + laplacian.T) / 2).eigenvectors
    return vectors[:, :dimensions] / root.unsqueeze(1)


def k_means(points: Tensor, groups: int, *, seed: int, restarts: int = RESTARTS) -> tuple[Tensor, Tensor]:
    """Return labels ``[restarts, T]`` and inertias ``[restarts]`` of k-means from k-means++ starts; no group is empty."""
    generator = torch.Generator("cpu").manual_seed(seed)
    centres = points[_starts(points, groups, restarts, generator)]
    previous = None
    for _ in range(300):
        distances = _squared_distances(points.expand(restarts, -1, -1), centres)  # [restarts, T, groups]
        labels = _fill_empty_groups(distances.argmin(dim=-1), distances)
        member = torch.nn.functional.one_hot(labels, groups).to(points.dtype)
        centres = member.transpose(1, 2) @ points / member.sum(dim=1).unsqueeze(-1)
        if previous is not None and torch.equal(labels, previous):
            break
        previous = labels
    inertia = (
        (points - centres.gather(1, labels.unsqueeze(-1).expand(-1, -1, points.shape[1]))).square().sum(dim=(1, 2))
    )
    return labels, inertia


def _starts(points: Tensor, groups: int, restarts: int, generator: torch.Generator) -> Tensor:
    """Return ``[restarts, groups]`` numbers of points, far ones more likely (k-means++)."""
    distances = _squared_distances(points, points)
    chosen = [torch.randint(len(points), (restarts,), generator=generator, device="cpu")]
    nearest = distances[chosen[0]]
    for _ in range(groups - 1):
        # Where all points lie on those chosen any point will do; the group that stays empty is filled later.
        weights = torch.where(nearest.sum(dim=1, keepdim=True) > 0, nearest, 1.0)
        chosen.append(torch.multinomial(weights, 1, generator=generator).squeeze(1))
        nearest = torch.minimum(nearest, distances[chosen[-1]])
    return torch.stack(chosen, dim=1)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    # Not by products, which would leave rounding where points are equal.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").square()


def _fill_empty_groups(labels: Tensor, distances: Tensor) -> Tensor:
    """Give each empty group the point that is farthest from its centre and not alone."""
    groups = distances.shape[-1]
    own = distances.gather(2, labels.unsqueeze(-1)).squeeze(-1)
    sizes = torch.nn.functional.one_hot(labels, groups).sum(dim=1)
    for row in (sizes == 0).any(dim=1).nonzero().flatten().tolist():
        counts = sizes[row]
        for empty in (counts == 0).nonzero().flatten().tolist():
            farthest = int(torch.where(counts[labels[row]] > 1, own[row], -1.0).argmax())
            counts[labels[row, farthest]] -= 1
            counts[empty] += 1
            labels[row, farthest] = empty
    return labels


def partition_of(labels: list[int]) -> list[list[int]]:
    """Return the groups of equal labels, by their first member."""
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return list(groups.values())
