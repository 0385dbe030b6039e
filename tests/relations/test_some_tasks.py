"""Steps of relation weights by the pairs of some tasks: those of all pairs."""

from __future__ import annotations

import copy
import math
import pickle
import random

import pytest
import torch
from torch import Tensor

from saliency_reg import RelationWeights
from saliency_reg.errors import ShapeError, TaskError
from saliency_reg.relations import rules
from saliency_reg.relations.partition_sum import PartitionSum
from tests.support.many_tasks import RULES, SAMPLE, TASKS, relations_of

Pair = tuple[int, int]


def step_of(number: int, tasks: int = TASKS, sample: int = SAMPLE) -> tuple[list[int], Tensor, Tensor]:
    """Some tasks, the distances among them, and which of these were seen."""
    generator = torch.Generator().manual_seed(number)
    chosen = sorted(torch.randperm(tasks, generator=generator)[:sample].tolist())
    # The mean drifts by a third each few steps, and a few pairs are far away.
    size = 1.5 ** (number // 4 % 5)
    distances = torch.rand(sample, sample, generator=generator, dtype=torch.float64).pow(4).mul(size).triu(1)
    observed = (torch.rand(sample, sample, generator=generator) > 0.1).triu(1)
    if number % 7 == 3:
        distances[0, 1] = math.nan
        observed[0, 1] = True
    return chosen, distances + distances.T, observed | observed.T


class SlowRelations:
    """All pairs, in Python floats."""

    def __init__(self, own: RelationWeights) -> None:
        self.own = own
        self.pairs = [(i, j) for i in range(own.num_tasks) for j in range(i + 1, own.num_tasks)]
        start = {"authors": 1.0}.get(own.rule, own.mass / len(self.pairs))
        self.state = dict.fromkeys(self.pairs, start)
        self.totals: dict[Pair, tuple[float, float]] = {}
        self.updates = 0

    def update(self, chosen: list[int], distances: Tensor, observed: Tensor, strength: float) -> None:
        own = self.own
        seen = {
            (task, chosen[j]): float(distances[i, j])
            for i, task in enumerate(chosen)
            for j in range(i + 1, len(chosen))
            if observed[i, j]
        }
        if not all(map(math.isfinite, seen.values())):
            return
        self.updates += 1
        before = {pair: self.state[pair] for pair in seen}
        if own.rule in ("entropic", "per_task"):
            for pair, distance in seen.items():
                total, weight = self.totals.get(pair, (0.0, 0.0))
                self.totals[pair] = (
                    own.momentum * total + (1 - own.momentum) * distance,
                    own.momentum * weight + 1 - own.momentum,
                )
        elif own.rule == "projected":
            mean = math.fsum(seen.values()) / len(seen)
            goal = {pair: before[pair] - own.learning_rate * strength * seen[pair] / mean for pair in seen}
            mass = math.fsum(before.values())
            low, high = min(goal.values()) - mass, max(goal.values())
            for _ in range(200):
                middle = (low + high) / 2
                if math.fsum(max(one - middle, 0) for one in goal.values()) > mass:
                    low = middle
                else:
                    high = middle
            self.state.update({pair: max(one - (low + high) / 2, 0) for pair, one in goal.items()})
        elif own.rule == "authors":
            total = math.fsum(before.values())
            product = math.fsum(before[pair] * seen[pair] for pair in seen)
            rate = own.learning_rate * math.sqrt(1 - 0.999 ** (3 * self.updates)) / (1 - 0.9 ** (3 * self.updates))
            for pair, distance in seen.items():
                gradient = strength * (distance / total - product / total**2)
                moved = before[pair] - rate * 0.1 * gradient / (math.sqrt(0.001 * gradient**2) + 1e-7)
                self.state[pair] = max(moved, 0.0)

    def matrix(self) -> Tensor:
        weights = self.state
        if self.own.rule == "authors":
            total = math.fsum(weights.values())
            weights = {pair: self.own.mass * one / total for pair, one in weights.items()}
        if self.own.rule in ("entropic", "per_task"):
            means = {pair: total / weight for pair, (total, weight) in self.totals.items()}
            mean = math.fsum(means.values()) / max(len(means), 1)
            unit = self.own.temperature * ((mean or 1.0) if isinstance(self.own.scale, str) else self.own.scale)
            exponents = {pair: -means.get(pair, mean) / unit for pair in self.pairs}
            largest = max(exponents.values())
            weights = {pair: math.exp(one - largest) for pair, one in exponents.items()}
            total = math.fsum(weights.values())
            if self.own.rule == "entropic":
                weights = {pair: self.own.mass * one / total for pair, one in weights.items()}
            else:
                size = self.own.num_tasks
                sums = [math.fsum(one for pair, one in weights.items() if task in pair) for task in range(size)]
                weights = {
                    (i, j): self.own.mass * (one / sums[i] + one / sums[j]) / size for (i, j), one in weights.items()
                }
        matrix = torch.zeros(self.own.num_tasks, self.own.num_tasks, dtype=torch.float64)
        for (i, j), weight in weights.items():
            matrix[i, j] = matrix[j, i] = weight
        return matrix


@pytest.mark.parametrize("case", RULES)
def test_steps_by_some_tasks_are_those_of_all_pairs(case: str) -> None:
    relations, slow = relations_of(case), SlowRelations(relations_of(case))
    for number in range(15):
        chosen, distances, observed = step_of(number)
        if number % 6 == 0:
            expected = slow.matrix()
            torch.testing.assert_close(relations.matrix(), expected, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(
            relations.among(chosen), relations.matrix()[chosen][:, chosen], rtol=1e-12, atol=1e-30
        )
        relations.update(distances, 0.5, observed=observed, tasks=chosen)
        slow.update(chosen, distances, observed, 0.5)
    torch.testing.assert_close(relations.matrix(), slow.matrix(), rtol=1e-11, atol=1e-14)
    assert int(relations.updates) == slow.updates == 13
    assert case == "fixed" or relations.matrix().unique().numel() > 4


@pytest.mark.parametrize("case", RULES)
def test_the_order_of_the_tasks_is_that_of_the_matrix(case: str) -> None:
    relations, turned = relations_of(case), relations_of(case)
    for number in range(3):
        chosen, distances, observed = step_of(number)
        order = random.Random(number).sample(range(SAMPLE), SAMPLE)
        shuffled = [chosen[place] for place in order]
        relations.update(distances, observed=observed, tasks=chosen)
        turned.update(distances[order][:, order], observed=observed[order][:, order], tasks=shuffled)
        torch.testing.assert_close(turned.among(shuffled), relations.among(chosen)[order][:, order], rtol=1e-12, atol=0)
    torch.testing.assert_close(turned.matrix(), relations.matrix(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", ["entropic", "entropic, cold", "entropic, its own scale"])
def test_the_sum_depends_on_the_state_alone(case: str) -> None:
    """To the bit, so that a resumed run goes on as the uninterrupted one; and the way of few is the one that was taken."""
    relations, rebuilt = relations_of(case), 0
    for number in range(20):
        chosen, distances, observed = step_of(number)
        known = relations._sum
        found = relations.among(chosen)
        assert isinstance(relations._sum, PartitionSum)
        rebuilt += known is not relations._sum
        fresh = relations_of(case)
        fresh.load_state_dict(relations.state_dict())
        for other in (fresh, copy.deepcopy(relations), pickle.loads(pickle.dumps(relations))):
            assert other._sum is None
            assert torch.equal(other.among(chosen), found)
        relations.update(distances, observed=observed, tasks=chosen)
    assert rebuilt == 1


@pytest.mark.parametrize("write", ["load", "in place", "replaced", "all pairs"])
def test_a_state_that_others_wrote_counts(write: str) -> None:
    relations, other = relations_of("entropic"), relations_of("entropic")
    for number in range(4):
        for one, shift in ((relations, 0), (other, 50)):
            chosen, distances, observed = step_of(number + shift)
            one.among(chosen)
            one.update(distances, observed=observed, tasks=chosen)
    if write == "load":
        relations.load_state_dict(other.state_dict())
    elif write == "in place":
        relations.running_distances.copy_(other.running_distances)
        relations.running_weights.copy_(other.running_weights)
    elif write == "replaced":
        relations.running_distances, relations.running_weights = other.running_distances, other.running_weights
    else:
        relations.update(torch.rand(TASKS, TASKS).triu(1).double())
    torch.testing.assert_close(relations.among(chosen), relations.matrix()[chosen][:, chosen], rtol=1e-12, atol=0)


def test_distances_that_are_all_zero_and_a_single_task() -> None:
    relations = relations_of("entropic")
    for tasks in ([], [3], [3, 8]):
        relations.update(torch.zeros(len(tasks), len(tasks)), tasks=tasks)
        assert relations.among(tasks).shape == (len(tasks), len(tasks))
    assert int(relations.updates) == 1
    assert float(relations.among([3, 8])[0, 1]) == pytest.approx(2.0 / 4950)
    assert int(relations_of("projected").updates) == 0


def test_a_rule_that_looks_at_all_pairs_is_given_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closest(rules.Rule):
        def update(self, own: rules.RuleState, pairs: rules.PairDistances) -> None:
            assert len(pairs.values) == len(pairs.seen) == len(own.pair_weights)
            own.pair_weights.copy_(torch.where(pairs.seen, pairs.values, own.pair_weights))

    monkeypatch.setitem(rules.RULES, "closest", Closest())
    relations, whole = RelationWeights(TASKS, "closest"), RelationWeights(TASKS, "closest")
    chosen, distances, observed = step_of(0)
    relations.update(distances, observed=observed, tasks=chosen)
    at = torch.tensor(chosen)
    all_distances, all_observed = torch.zeros(TASKS, TASKS).double(), torch.zeros(TASKS, TASKS, dtype=torch.bool)
    all_distances[at.unsqueeze(1), at], all_observed[at.unsqueeze(1), at] = distances, observed
    whole.update(all_distances, observed=all_observed)
    assert torch.equal(relations.matrix(), whole.matrix())
    assert torch.equal(relations.among(chosen), whole.matrix()[chosen][:, chosen])


@pytest.mark.parametrize("tasks", [[0, 0], [0, TASKS], [-1, 2]])
def test_wrong_tasks(tasks: list[int]) -> None:
    with pytest.raises(TaskError, match=f"tasks must be distinct indices below {TASKS}, found"):
        relations_of("entropic").update(torch.zeros(2, 2), tasks=tasks)
    with pytest.raises(ShapeError, match=r"distances must be a tensor \[3, 3\], found \[2, 2\]"):
        relations_of("entropic").update(torch.zeros(2, 2), tasks=[1, 2, 3])
