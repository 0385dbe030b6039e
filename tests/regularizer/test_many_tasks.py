"""Many tasks of which each step compares a few: the figures are those of all pairs, at the price of a few."""

from __future__ import annotations

import copy
import math
import pickle
import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saliency_reg import RelationWeights, SaliencyRegularizer
from saliency_reg.errors import ShapeError, TaskError
from saliency_reg.integrations.shared.report_figures import figures_of
from saliency_reg.regularizer import penalty as penalty_module
from saliency_reg.relations import rules
from saliency_reg.relations.partition_sum import PartitionSum

TASKS, SAMPLE = 100, 14
RULES = {
    "entropic": {"mass": 2.0, "temperature": 0.4},
    "entropic, cold": {"temperature": 0.03, "momentum": 0.5},
    "entropic, hot": {"temperature": 3.0, "momentum": 0.0},
    "entropic, its own scale": {"scale": 0.7},
    "entropic, out of range": {"scale": 1e-3},
    "entropic, colder than one centre allows": {"temperature": 1e-3},
    "projected": {"learning_rate": 0.3},
    "authors": {"learning_rate": 0.05},
    "fixed": {"mass": 3.0},
}
Pair = tuple[int, int]


def relations_of(case: str, tasks: int = TASKS) -> RelationWeights:
    return RelationWeights(tasks, case.split(",")[0], **RULES[case])


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
        if own.rule == "entropic":
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
        if self.own.rule == "entropic":
            means = {pair: total / weight for pair, (total, weight) in self.totals.items()}
            mean = math.fsum(means.values()) / max(len(means), 1)
            unit = self.own.temperature * ((mean or 1.0) if isinstance(self.own.scale, str) else self.own.scale)
            exponents = {pair: -means.get(pair, mean) / unit for pair in self.pairs}
            largest = max(exponents.values())
            weights = {pair: math.exp(one - largest) for pair, one in exponents.items()}
            total = math.fsum(weights.values())
            weights = {pair: self.own.mass * one / total for pair, one in weights.items()}
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


# The whole way


class Run:
    """A model of ``tasks`` columns, and its regularizer with a sample of them."""

    def __init__(self, tasks: int, case: str = "entropic", sample: int | None = 10, **options: object) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, tasks)).double()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        arguments = {
            "heads": "2",
            "strength": 0.5,
            "max_tasks_per_step": sample,
            "relations": relations_of(case, tasks),
        }
        self.regularizer = SaliencyRegularizer(
            self.net, **{**arguments, "optimizer": self.optimizer, "metric": "sqeuclidean", **options}
        )

    def call(self, number: int, rows: slice = slice(None)) -> Tensor:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64)[rows]
        loss = self.net(x).square().mean()
        penalty = self.regularizer(losses=loss)
        (penalty + loss).backward()
        return penalty.detach()

    def steps(self, numbers: range, calls: int = 1) -> list[Tensor]:
        found = []
        for number in numbers:
            self.optimizer.zero_grad()
            found += [self.call(10 * number + call) for call in range(calls)]
            self.optimizer.step()
        return found


@pytest.mark.parametrize("case", RULES)
def test_a_sampled_run_is_the_one_that_deals_with_all_pairs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"warmup_steps": 3, "start_step": 1}
    few = Run(150, case, **options)
    penalties = few.steps(range(5), 3)
    monkeypatch.setattr(penalty_module, "ALL_PAIRS", 1000)
    every = Run(150, case, **options)
    torch.testing.assert_close(penalties, every.steps(range(5), 3), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(few.net.state_dict(), every.net.state_dict(), rtol=1e-11, atol=1e-13)
    state, expected = few.regularizer.state_dict(), every.regularizer.state_dict()
    torch.testing.assert_close(dict(state), dict(expected), rtol=1e-11, atol=1e-13)
    found, whole = few.regularizer.report, every.regularizer.report
    torch.testing.assert_close(found.distances, whole.distances, rtol=1e-10, atol=1e-13, equal_nan=True)
    assert found.present == whole.present
    assert len(found.present) == 10
    known = ~found.relations.isnan()
    assert int(known.sum()) == 100
    torch.testing.assert_close(found.relations[known], whole.relations[known], rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", ["entropic", "projected", "authors", "fixed"])
def test_resumed_between_two_calls(case: str) -> None:
    run = Run(150, case)
    run.steps(range(5), 2)
    run.optimizer.zero_grad()
    run.call(1000)
    again = Run(150, case)
    again.net.load_state_dict(run.net.state_dict())
    again.regularizer.load_state_dict(copy.deepcopy(run.regularizer.state_dict()))
    for one, other in zip(run.net.parameters(), again.net.parameters()):
        other.grad = one.grad.clone()
    for one in (run, again):
        one.call(1001)
        one.optimizer.step()
    assert torch.equal(torch.stack(run.steps(range(5, 9), 2)), torch.stack(again.steps(range(5, 9), 2)))
    for name, value in run.regularizer.state_dict().items():
        assert torch.equal(value, again.regularizer.state_dict()[name]), name
    assert not run.regularizer.pending.samples.any()
    assert not run.regularizer.pending.distances.any()


@pytest.mark.parametrize("sample", [4, 10])
@pytest.mark.parametrize("case", ["projected", "authors", "entropic"])
def test_resumed_between_two_steps(case: str, sample: int) -> None:
    """Sums over all pairs, most of them zeros, would round in another way than those over the pairs that were seen."""
    run = Run(150, case, sample)
    run.steps(range(3), 2)
    again = Run(150, case, sample)
    again.net.load_state_dict(copy.deepcopy(run.net.state_dict()))
    again.regularizer.load_state_dict(copy.deepcopy(run.regularizer.state_dict()))
    for number in range(3, 10):
        assert torch.equal(*(torch.stack(one.steps(range(number, number + 1), 2)) for one in (run, again))), number
        assert torch.equal(run.regularizer.relations.matrix(), again.regularizer.relations.matrix()), number


class Separate(nn.Module):
    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 8)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(tasks))

    def forward(self, x: Tensor, ran: list[int]) -> list[Tensor]:
        feature = self.backbone(x)
        return [self.heads[task](feature) for task in ran]


@pytest.mark.parametrize("sample", [None, 5])
def test_heads_that_did_not_run(sample: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        net, found = Separate(140).double(), []
        regularizer = SaliencyRegularizer(net, heads="heads", max_tasks_per_step=sample, strength=2.0)
        for number in range(5):
            ran = random.Random(number).sample(range(140), 1 if number == 2 else 9)
            outputs = net(torch.randn(3, 5, generator=torch.Generator().manual_seed(number)).double(), ran)
            penalty = regularizer(losses=sum(output.mean() for output in outputs))
            found += [penalty, *(torch.autograd.grad(penalty, net.backbone.weight) if number != 2 else ())]
            assert len(regularizer.report.present) == min(len(ran), sample or 9)
            regularizer.step()
        return found, regularizer.relations.matrix()

    few = run()
    monkeypatch.setattr(penalty_module, "ALL_PAIRS", 1000)
    torch.testing.assert_close(few, run(), rtol=1e-11, atol=1e-14)


def test_with_few_tasks_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the limit all pairs are dealt with, and to the bit."""
    run = Run(40)
    monkeypatch.setattr(penalty_module, "ALL_PAIRS", 1000)
    assert torch.equal(torch.stack(run.steps(range(4), 2)), torch.stack(Run(40).steps(range(4), 2)))
    assert not run.regularizer.report.relations.isnan().any()


def test_the_mean_over_all_samples_is_the_penalty_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalty_module, "ALL_PAIRS", 0)
    monkeypatch.setattr(rules, "MANY_PAIRS", 0)
    whole = Run(5, sample=None)
    whole.steps(range(2))
    sampled = Run(5, sample=2)
    sampled.net.load_state_dict(whole.net.state_dict())
    state = {name: value for name, value in whole.regularizer.state_dict().items() if name.startswith("relations.")}
    sampled.regularizer.load_state_dict(state, strict=False)
    found: dict[tuple[str, ...], Tensor] = {}
    for _ in range(90):
        penalty = sampled.call(7)
        found[sampled.regularizer.report.present] = penalty
    assert len(found) == 10
    torch.testing.assert_close(sum(found.values()) / 10, whole.call(7), rtol=1e-12, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that was made: not a view of another one, nor one that was written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves
        given = {one.untyped_storage().data_ptr() for one in flat((args, kwargs)) if isinstance(one, Tensor)}
        for one in flat(result):
            made = isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given
            if made and one.numel() > self.numel:
                self.numel, self.what = one.numel(), str(func)
        return result


@pytest.mark.parametrize("case", ["entropic", "entropic, its own scale", "projected", "authors", "fixed"])
def test_no_matrix_of_all_tasks_is_made(case: str) -> None:
    tasks = 400
    run = Run(tasks, case)
    run.steps(range(1), 2)
    with Largest() as largest:
        run.steps(range(1, 4), 2)
        assert run.regularizer.report.share > 0
    assert 0 < largest.numel < tasks * tasks / 8, largest.what
    with Largest() as largest:
        assert run.regularizer.report.distances.shape == (tasks, tasks)
    assert largest.numel == tasks * tasks


def test_the_report_of_a_sample() -> None:
    run = Run(150)
    run.net(torch.randn(6, 5).double())
    run.regularizer(losses=torch.tensor(2.0))
    report = run.regularizer.report
    again = pickle.loads(pickle.dumps(report))
    assert report.distances is report.distances
    assert report.samples.tolist() == [6.0 * (task in report.present) for task in report.tasks]
    by_hand = 150 * 149 / 90 * 0.5 * (report.distances * report.relations).nan_to_num(0.0).triu(1).sum()
    torch.testing.assert_close(report.penalty, by_hand)
    for name in ("samples", "distances", "relations"):
        torch.testing.assert_close(getattr(again, name), getattr(report, name), rtol=0, atol=0, equal_nan=True)
    assert len(report.to_dict()["relations"]) == 150
    assert "relations=tensor" in repr(report)
    figures = figures_of(report, 3, "srdml")
    assert figures["srdml/relation_max"] == float(report.relations.nan_to_num(0.0).max())
    assert len([name for name in figures if name.startswith("srdml/distance/")]) == 3
    with pytest.raises(AttributeError, match="no attribute 'figures'"):
        report.figures  # noqa: B018
