"""Relations of tasks that come and go: kept for the others, begun where the rule begins for the new ones."""

from __future__ import annotations

from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from saliency_reg import RelationWeights
from saliency_reg.relations import PendingDistances

RULES = ("entropic", "per_task", "projected", "authors", "fixed")
#: Rules under which the ratio of any two weights is kept, and not only of those of one task.
WITH_RATIOS = ("entropic", "projected", "authors", "fixed")


def distances(tasks: int, seed: int) -> Tensor:
    half = torch.rand(tasks, tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu(1)
    return half + half.T


def built(rule: str, tasks: int = 4, **options: Any) -> RelationWeights:
    matrix = distances(tasks, 99) if rule == "fixed" else None
    return RelationWeights(tasks, rule, mass=2.0, matrix=matrix, learning_rate=0.05, **options)


def moved(relations: RelationWeights, seeds: range) -> RelationWeights:
    for seed in seeds:
        relations.update(distances(relations.num_tasks, seed), 1.0)
    return relations


def state(relations: RelationWeights) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in relations.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def slow_start(relations: RelationWeights) -> Tensor:
    """What the weights are with one more task that nobody has seen, pair by pair."""
    tasks, mass = relations.num_tasks, relations.mass
    before = relations.matrix()
    old = list(combinations(range(tasks), 2))
    new = [(task, tasks) for task in range(tasks)]
    raw: dict[tuple[int, int], float] = {}
    if relations.rule in ("projected", "authors", "fixed"):
        mean = sum(float(before[pair]) for pair in old) / len(old)
        raw = {**{pair: float(before[pair]) for pair in old}, **dict.fromkeys(new, mean)}
    else:
        logits = dict(zip(old, relations_logits(relations)))
        logits.update(dict.fromkeys(new, sum(logits.values()) / len(old)))
        if relations.rule == "entropic":
            raw = {pair: float(torch.exp(torch.tensor(logits[pair], dtype=torch.float64))) for pair in logits}
        else:
            for i, j in logits:
                for one in (i, j):
                    rest = [logits[min(one, k), max(one, k)] for k in range(tasks + 1) if k != one]
                    share = torch.tensor([logits[i, j], *rest], dtype=torch.float64).exp()
                    raw[i, j] = raw.get((i, j), 0.0) + float(share[0] / share[1:].sum())
    matrix = torch.zeros(tasks + 1, tasks + 1, dtype=torch.float64)
    for (i, j), value in raw.items():
        matrix[i, j] = matrix[j, i] = mass * value / sum(raw.values())
    return matrix


def relations_logits(relations: RelationWeights) -> list[float]:
    seen = relations.running_distances / relations.running_weights
    scale = seen.mean() if relations.scale in ("auto", "mean") else relations.scale
    return (-seen / (relations.temperature * scale)).tolist()


@pytest.mark.parametrize("rule", RULES)
def test_a_new_task_begins_where_the_rule_begins(rule: str) -> None:
    relations = moved(built(rule), range(5))
    expected, before = slow_start(relations), relations.matrix()
    updates = relations.updates.clone()
    relations.change_tasks([0, 1, 2, 3, None])
    found = relations.matrix()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert float(found.triu(1).sum()) == pytest.approx(2.0, abs=1e-12)
    assert torch.equal(relations.updates, updates)
    if rule in WITH_RATIOS:
        torch.testing.assert_close(found[:4, :4] / found[0, 1], before / before[0, 1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [0, 5])
def test_a_task_that_comes_and_goes_leaves_no_trace(rule: str, steps: int) -> None:
    relations = moved(built(rule), range(steps))
    before = state(relations)
    relations.change_tasks([0, 1, 2, 3, None])
    relations.change_tasks([0, 1, 2, 3, 4, None])
    relations.change_tasks([0, 1, 2, 3, 4])
    relations.change_tasks([0, 1, 2, 3])
    assert_same(state(relations), before)
    assert relations.num_tasks == 4
    # And it goes on as if nothing had been.
    assert_same(state(moved(relations, range(10, 12))), state(moved(moved(built(rule), range(steps)), range(10, 12))))


@pytest.mark.parametrize("rule", RULES)
def test_ratios_are_kept_when_a_task_goes(rule: str) -> None:
    relations = moved(built(rule, scale=1.0), range(5))
    before = relations.matrix()
    relations.change_tasks([0, 2, 3])
    found, kept = relations.matrix(), before[[0, 2, 3]][:, [0, 2, 3]]
    assert float(found.triu(1).sum()) == pytest.approx(2.0, abs=1e-12)
    if rule in WITH_RATIOS:
        torch.testing.assert_close(found / found[0, 1], kept / kept[0, 1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", ["entropic", "per_task"])
def test_without_a_task_it_is_as_if_it_had_never_been_there(rule: str) -> None:
    relations, never = built(rule), built(rule, 3)
    for seed in range(5):
        whole = distances(4, seed)
        relations.update(whole)
        never.update(whole[[0, 1, 3]][:, [0, 1, 3]])
    relations.change_tasks([0, 1, 3])
    assert_same(state(relations), state(never))
    # And with one that comes, as if its pairs had never been seen.
    seen = torch.ones(4, 4, dtype=torch.bool)
    seen[3] = seen[:, 3] = False
    late, unseen = built(rule, 3), built(rule)
    for seed in range(5):
        whole = distances(4, seed)
        late.update(whole[:3, :3])
        unseen.update(whole, observed=seen)
    late.change_tasks([0, 1, 2, None])
    assert_same(state(late), state(unseen))


@pytest.mark.parametrize("rule", RULES)
def test_tasks_may_come_in_any_order(rule: str) -> None:
    for order in permutations(range(4)):
        relations = moved(built(rule), range(3))
        expected = relations.matrix()[list(order)][:, list(order)]
        relations.change_tasks(order)
        torch.testing.assert_close(relations.matrix(), expected, rtol=1e-15, atol=1e-15)
    one, other = moved(built(rule), range(3)), moved(built(rule), range(3))
    one.change_tasks([0, 1, 2, 3, None])
    other.change_tasks([0, 1, None, 2, 3])
    order = [0, 1, 3, 4, 2]
    torch.testing.assert_close(one.matrix(), other.matrix()[order][:, order], rtol=1e-14, atol=1e-14)


def test_where_no_weight_is_left_all_begin_anew() -> None:
    for rule, name in (("projected", "pair_weights"), ("authors", "pair_coefficients")):
        relations = built(rule, 3)
        relations.get_buffer(name)[:] = torch.tensor([1.0, 0.0, 0.0])  # all on the pair (0, 1)
        relations.change_tasks([0, 2])
        assert relations.matrix().tolist() == [[0, 2], [2, 0]]


def test_after_a_move_the_way_back_is_no_undoing() -> None:
    relations = moved(built("projected"), range(3))
    relations.change_tasks([0, 1, 2, 3, None])
    moved(relations, range(20, 22))
    kept = relations.matrix()[:4, :4]
    relations.change_tasks([0, 1, 2, 3])
    torch.testing.assert_close(relations.matrix(), 2 * kept / kept.triu(1).sum(), rtol=1e-13, atol=1e-13)


def test_very_many_tasks() -> None:
    relations, tasks = RelationWeights(150, "entropic"), list(range(20))
    relations.update(distances(20, 1), tasks=tasks)
    relations.among(tasks)  # by the sum that is kept
    relations.change_tasks([*range(150), None])
    expected = relations.matrix()
    torch.testing.assert_close(relations.among([3, 150, 7]), expected[[3, 150, 7]][:, [3, 150, 7]])


@pytest.mark.parametrize("after_loading", [False, True])
@pytest.mark.parametrize("tasks", [4, 140])
def test_pending_distances(tasks: int, after_loading: bool) -> None:
    pending = PendingDistances(tasks, "mean")
    pending.change_tasks([*range(tasks), None])
    assert not pending.any
    some = [0, 2, 3]
    pending.add(distances(3, 5), torch.full((3, 3), 2.0), some)
    if after_loading:
        pending.load_state_dict({name: value.clone() for name, value in pending.state_dict().items()})
    pending.change_tasks([task for task in range(tasks + 1) if task != 2])
    assert pending.any
    found, seen, among = pending.take()
    place = {task: index for index, task in enumerate(among)}
    assert float(found[place[0], place[2]]) == float(distances(3, 5)[0, 2])  # of 0 and what was 3
    assert seen.sum() == 4
    assert not pending.any
