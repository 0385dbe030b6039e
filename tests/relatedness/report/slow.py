"""The views written down as plainly as possible: loops over updates, samples and pairs of tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Heads = Callable[[Tensor], Sequence[Tensor]]


@dataclass
class Step:
    """One update: the feature map, what makes the outputs of all tasks of it, and labels, ``None`` where missing."""

    feature: Tensor
    heads: Heads
    labels: list[list[float | None]]  # [B][T]
    distances: Tensor | None = None


def loss_of(kind: str, output: Tensor, label: float) -> Tensor:
    if kind == "binary":
        p = 1 / (1 + torch.exp(-output))
        return -(label * torch.log(p) + (1 - label) * torch.log(1 - p))
    if kind == "number":
        return (output - label) ** 2
    return -torch.log(torch.exp(output[int(label)]) / torch.exp(output).sum())


def margin_of(kind: str, output: Tensor, label: float) -> float:
    if kind == "binary":
        return abs(label - 1 / (1 + math.exp(-float(output))))
    if kind == "number":
        return abs(label - float(output))
    return 1 - float(torch.exp(output[int(label)]) / torch.exp(output).sum())


@dataclass
class SlowReport:
    kinds: Sequence[str]
    decay: float = 0.99
    tag_every: int = 10
    tag_step: float = 0.01
    steps: list[Step] = field(default_factory=list)

    def _loss(self, step: Step, feature: Tensor, task: int) -> Tensor | None:
        outputs = step.heads(feature)[task]
        if not feature.requires_grad:
            outputs = outputs.detach()
        found = [
            loss_of(self.kinds[task], outputs[b].squeeze() if self.kinds[task] != "class" else outputs[b], row[task])
            for b, row in enumerate(step.labels)
            if row[task] is not None
        ]
        return torch.stack(found).mean() if found else None

    def _gradient(self, step: Step, task: int) -> Tensor | None:
        feature = step.feature.detach().clone().requires_grad_()
        loss = self._loss(step, feature, task)
        return None if loss is None else torch.autograd.grad(loss, feature)[0].reshape(-1)

    def _mean(self, values: Sequence[float | None], weights: Sequence[float] | None = None) -> float:
        """Of the latest, ``decay`` to the power of how long ago."""
        total = weight = 0.0
        for age, value in enumerate(reversed(values)):
            if value is not None and math.isfinite(value):
                total += self.decay**age * value
                weight += self.decay**age
        return total / weight if weight else math.nan

    def _matrix(self, entry: Callable[[int, int], float]) -> Tensor:
        size = range(len(self.kinds))
        return torch.tensor([[entry(i, j) for j in size] for i in size], dtype=torch.float64)

    def gradient_cosine(self) -> Tensor:
        gradients = [[self._gradient(step, task) for task in range(len(self.kinds))] for step in self.steps]

        def entry(i: int, j: int) -> float:
            pairs = [(own[i], own[j]) for own in gradients]
            return self._mean(
                [None if a is None or b is None else float(a @ b / a.norm() / b.norm()) for a, b in pairs]
            )

        return self._matrix(entry)

    def tag(self) -> Tensor:
        taken = self.steps[:: self.tag_every]

        def entry(i: int, j: int) -> float:
            found: list[float | None] = []
            for step in taken:
                gradient, before = self._gradient(step, j), self._loss(step, step.feature.detach(), i)
                if gradient is None or before is None:
                    found.append(None)
                    continue
                feature = step.feature.detach()
                eta = self.tag_step * feature.norm() / gradient.norm()
                after = self._loss(step, feature - eta * gradient.view(feature.shape), i)
                found.append(1 - float((after / before).detach()))
            return self._mean(found)

        return self._matrix(entry)

    def saliency_distance(self) -> Tensor:
        return self._matrix(lambda i, j: self._mean([float(step.distances[i, j]) for step in self.steps]))

    def hardness(self) -> list[list[list[bool | None]]]:
        """``[update][B][T]``: whether a sample is hard, by the mean margin before its batch."""
        found, sums, counts = [], [0.0] * len(self.kinds), [0.0] * len(self.kinds)
        for step in self.steps:
            outputs = [output.detach() for output in step.heads(step.feature.detach())]
            rows: list[list[bool | None]] = []
            margins = [
                [
                    None
                    if label is None
                    else margin_of(
                        self.kinds[t], outputs[t][b].squeeze() if self.kinds[t] != "class" else outputs[t][b], label
                    )
                    for t, label in enumerate(row)
                ]
                for b, row in enumerate(step.labels)
            ]
            for row in margins:
                rows.append(
                    [
                        None if margin is None or counts[t] == 0 else margin >= sums[t] / counts[t]
                        for t, margin in enumerate(row)
                    ]
                )
            for t in range(len(self.kinds)):
                here = [row[t] for row in margins if row[t] is not None]
                sums[t] = self.decay * sums[t] + sum(here)
                counts[t] = self.decay * counts[t] + len(here)
            found.append(rows)
        return found

    def _counts(self, i: int, j: int) -> list[float]:
        """Both hard, both easy, i alone, j alone."""
        found = [0.0] * 4
        for age, rows in enumerate(reversed(self.hardness())):
            for row in rows:
                if row[i] is not None and row[j] is not None:
                    place = 0 if row[i] and row[j] else 1 if not (row[i] or row[j]) else 2 if row[i] else 3
                    found[place] += self.decay**age
        return found

    def error_cooccurrence(self) -> Tensor:
        def entry(i: int, j: int) -> float:
            counts = self._counts(i, j)
            return (counts[0] + counts[1]) / sum(counts) if sum(counts) else math.nan

        return self._matrix(entry)

    def error_kappa(self) -> Tensor:
        def entry(i: int, j: int) -> float:
            counts = self._counts(i, j)
            total = sum(counts)
            if not total:
                return math.nan
            if i == j:
                return 1.0
            p, q = (counts[0] + counts[2]) / total, (counts[0] + counts[3]) / total
            chance = p * q + (1 - p) * (1 - q)
            return ((counts[0] + counts[1]) / total - chance) / (1 - chance) if chance < 1 else math.nan

        return self._matrix(entry)

    def pairs(self, i: int, j: int) -> list[tuple[float, float]]:
        rows = [row for step in self.steps for row in step.labels]
        return [(row[i], row[j]) for row in rows if row[i] is not None and row[j] is not None]

    def common_labels(self) -> Tensor:
        return self._matrix(lambda i, j: len(self.pairs(i, j))).long()

    def label_correlation(self) -> Tensor:
        def entry(i: int, j: int) -> float:
            pairs, kinds = self.pairs(i, j), {self.kinds[i], self.kinds[j]}
            if len(pairs) < 2:
                return math.nan
            if "class" not in kinds:
                return pearson(pairs)
            if "number" not in kinds:
                return cramer(pairs)
            return epsilon(pairs if self.kinds[i] == "class" else [(b, a) for a, b in pairs])

        return self._matrix(entry)


def pearson(pairs: Sequence[tuple[float, float]]) -> float:
    n = len(pairs)
    mean_x, mean_y = sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n
    xy = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    xx, yy = sum((x - mean_x) ** 2 for x, _ in pairs), sum((y - mean_y) ** 2 for _, y in pairs)
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan


def cramer(pairs: Sequence[tuple[float, float]]) -> float:
    n, xs, ys = len(pairs), sorted({x for x, _ in pairs}), sorted({y for _, y in pairs})
    r, c = len(xs), len(ys)
    if r < 2 or c < 2:
        return math.nan
    chi2 = 0.0
    for x in xs:
        for y in ys:
            expected = sum(a == x for a, _ in pairs) * sum(b == y for _, b in pairs) / n
            chi2 += (sum(pair == (x, y) for pair in pairs) - expected) ** 2 / expected
    phi2 = max(0.0, chi2 / n - (r - 1) * (c - 1) / (n - 1))
    least = min(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
    return min(1.0, math.sqrt(phi2 / least)) if least > 0 else math.nan


def epsilon(pairs: Sequence[tuple[float, float]]) -> float:
    """Of (class, number)."""
    n, classes = len(pairs), sorted({x for x, _ in pairs})
    mean = sum(y for _, y in pairs) / n
    whole = sum((y - mean) ** 2 for _, y in pairs)
    within = 0.0
    for one in classes:
        own = [y for x, y in pairs if x == one]
        within += sum((y - sum(own) / len(own)) ** 2 for y in own)
    if len(classes) < 2 or n <= len(classes) or whole == 0:
        return math.nan
    return math.sqrt(max(0.0, 1 - within / whole * (n - 1) / (n - len(classes))))
