"""Growth along an affinity: which columns it makes, in one process and two."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import (
    BranchingModel,
    BranchingRound,
    ConfigurationError,
    NonFiniteError,
    SaliencyRegError,
    ShapeError,
    TaskError,
    WrongTypeError,
    branch,
)
from tests.relatedness.groups.support import lu_cost, random_affinity, set_partitions
from tests.support.two_processes import run_on_two_processes

from .models import TASKS, branching

#: Tasks 0, 2, 5 are close, and so are 1, 4 and 3, 6; of these three, the last two are closer.
BLOCKS = [[0, 2, 5], [1, 4], [3, 6]]
NAMES = tuple(f"task{number}" for number in range(7))


#: At the top three columns (0.2) beat two (0.1 + 0.2 for what differs); below, two (0.25 + 0.2) beat three (0.5) and one (0.8).
SETTINGS = {"branch_cost": [0.25, 0.25, 0.1], "separation_weight": 1.0}


def block_affinity() -> Tensor:
    affinity = torch.full((7, 7), 0.2)
    affinity[[[1], [4], [3], [6]], [1, 4, 3, 6]] = 0.6
    for block in BLOCKS:
        affinity[torch.tensor(block)[:, None], block] = 1.0
    return affinity


def named(columns: list[list[int]], names: tuple[str, ...] = NAMES) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names[task] for task in column) for column in columns)


def grown(model: BranchingModel, affinity: Tensor, **options: Any) -> list[BranchingRound]:
    rounds = [branch(model, affinity, **options)]
    while not rounds[-1].over:
        rounds.append(branch(model, affinity, **options))
    return rounds


def slow_growth(affinity: list[list[float]], costs: list[float], weight: float) -> list[list[list[int]]]:
    """The columns of all stages, from the input up: of all set partitions at each stage, the first of least cost."""
    tasks = range(len(affinity))
    branches, columns = [[task] for task in tasks], []
    for cost in reversed(costs):
        between = []
        for one in branches:
            row = []
            for other in branches:
                there = sum(min(affinity[i][j] for j in other) for i in one) / len(one)
                back = sum(min(affinity[j][i] for i in one) for j in other) / len(other)
                row.append((there + back) / 2)
            between.append(row)
        every = sorted(set_partitions(len(branches)), key=len)
        best = min(every, key=lambda groups: lu_cost(between, groups, cost, weight))
        branches = sorted(sorted(task for number in group for task in branches[number]) for group in best)
        columns.append(branches)
        if len(branches) == 1:
            break
    columns += [[[*tasks]]] * (len(costs) - len(columns))
    return columns[::-1]


def test_blocks_of_tasks_become_columns() -> None:
    model, x = branching(tasks=NAMES)
    model.eval()
    before = model(x)
    optimizer = torch.optim.Adam(model.parameters())
    rounds = grown(model, block_affinity(), optimizer=optimizer, **SETTINGS)
    assert rounds == [
        BranchingRound("5", named(BLOCKS), split=True, over=False),
        BranchingRound("2", named([[0, 2, 5], [1, 3, 4, 6]]), split=True, over=False),
        BranchingRound("0", named([[0, 2, 5], [1, 3, 4, 6]]), split=True, over=True),
    ]
    assert model.partitions == tuple(one.columns for one in rounds[::-1])
    after = model(x)
    assert all(torch.equal(before[task], after[task]) for task in NAMES)
    known = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    assert known == [id(parameter) for parameter in model.parameters()]
    again = branch(model, block_affinity())
    assert again == BranchingRound("0", model.partitions[0], split=False, over=True)


def test_growth_ends_where_one_column_is_cheapest() -> None:
    model, _ = branching(tasks=NAMES)
    rounds = grown(model, block_affinity(), branch_cost=[9.0, 0.25, 0.1], separation_weight=1.0)
    assert [one.split for one in rounds] == [True, True, False]
    assert rounds[-1] == BranchingRound("0", (NAMES,), split=False, over=True)


def test_poolings_make_columns_dear() -> None:
    model, _ = branching("nested", tasks=NAMES)
    assert model.poolings_above == (3, 2, 1)
    rounds = grown(model, block_affinity(), branch_cost=0.08, separation_weight=1.0)  # 0.16, 0.32, 0.64 a column
    assert [len(one.columns) for one in rounds] == [3, 2, 1]
    model, _ = branching("plain", tasks=NAMES)
    rounds = grown(model, block_affinity(), branch_cost=0.08, separation_weight=1.0)
    assert [len(one.columns) for one in rounds] == [3, 3, 3]


@pytest.mark.parametrize("tasks", [3, 5, 6])
def test_as_brute_force_over_all_set_partitions(tasks: int) -> None:
    names = NAMES[:tasks]
    equal = 0
    for seed in range(12):
        affinity = random_affinity(tasks, seed)
        model, _ = branching(seed=seed, tasks=names)
        costs = [0.08, 0.04, 0.02]
        rounds = grown(model, affinity, branch_cost=costs, separation_weight=1.0)
        expected = slow_growth(affinity.tolist(), costs, 1.0)
        equal += model.partitions == tuple(named(columns, names) for columns in expected)
        assert rounds[-1].over
        columns = [[names.index(task) for task in column] for column in model.partitions[-1]]
        found, least = (lu_cost(affinity.tolist(), one, costs[-1], 1.0) for one in (columns, expected[-1]))
        assert found >= least - 1e-10
        for below, above in pairwise(model.partitions):
            assert all(any(set(column) <= set(other) for other in below) for column in above)
    assert equal >= {3: 12, 5: 10, 6: 8}[tasks]  # the clustering is spectral


def test_no_more_columns_than_the_largest_number() -> None:
    model, _ = branching(tasks=NAMES)
    assert len(branch(model, block_affinity(), branch_cost=0.0, largest=2).columns) == 2


def test_rows_in_another_order() -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1)).tolist()
    model, _ = branching(tasks=NAMES)
    shuffled = block_affinity()[order][:, order]
    found = branch(model, shuffled, tasks=[NAMES[task] for task in order], **SETTINGS)
    assert found.columns == named(BLOCKS)


class TestRefused:
    def broken(self, place: tuple[int, int], value: float) -> Tensor:
        affinity = block_affinity()
        affinity[place] = value
        return affinity

    def test_affinities(self) -> None:
        model, _ = branching(tasks=NAMES)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        wrong: list[tuple[Any, type[SaliencyRegError], str]] = [
            (self.broken((1, 2), 0.9), ConfigurationError, "symmetric.*(task1, task2)"),
            (self.broken((3, 3), 1.2), ConfigurationError, "in [0, 1].*(task3, task3)"),
            (self.broken((0, 1), float("nan")), NonFiniteError, "(task0, task1)"),
            (torch.ones(6, 6), TaskError, "affinity is of 6 tasks"),
            (torch.ones(7, 6), ShapeError, "[T, T]"),
            ("tag", WrongTypeError, "[T, T]"),
        ]
        for affinity, error, words in wrong:
            with pytest.raises(error) as caught:
                branch(model, affinity)
            for part in words.split(".*"):
                assert part in str(caught.value)
        with pytest.raises(TaskError, match="those of the model are"):
            branch(model, block_affinity(), tasks=[f"t{number}" for number in range(7)])
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert len(before) == len(after)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"branch_cost": -1.0}, "branch_cost"),
            ({"branch_cost": [0.1, 0.1]}, "2 numbers for the 3 stages"),
            ({"separation_weight": float("nan")}, "separation_weight"),
            ({"largest": 0}, "largest"),
            ({"seed": 0.5}, "seed"),
            ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)}, "no parameter of this model"),
        ],
    )
    def test_options(self, options: dict[str, Any], words: str) -> None:
        model, _ = branching(tasks=NAMES)
        with pytest.raises(SaliencyRegError, match=words):
            branch(model, block_affinity(), **options)
        assert {len(columns) for columns in model.stages} == {1}

    def test_models(self) -> None:
        with pytest.raises(WrongTypeError, match="BranchingModel, found Linear.*\\.module"):
            branch(nn.Linear(2, 2), block_affinity())


def train_and_split(rank: int) -> tuple[list[tuple[str, str]], Any, dict[str, Tensor], str]:
    model, x = branching(tasks=TASKS)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    affinity = torch.tensor([[1.0, 0.9, 0.1, 0.1], [0.9, 1.0, 0.1, 0.1], [0.1, 0.1, 1.0, 0.9], [0.1, 0.1, 0.9, 1.0]])
    x = x + rank
    errors = []
    other = affinity[[0, 2, 1, 3]][:, [0, 2, 1, 3]]
    bad = torch.full((4, 4), float("nan"))
    settings = {"branch_cost": 0.25, "separation_weight": 1.0}
    for attempt in (
        lambda: branch(wrapped, affinity, **settings),
        lambda: branch(model, other if rank else affinity, **settings),
        lambda: branch(model, bad if rank else affinity, **settings),
    ):
        try:
            attempt()
        except SaliencyRegError as error:
            errors.append((type(error).__name__, str(error)))
    untouched = [len(columns) for columns in model.stages]
    for _ in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            sum(output.square().mean() for output in wrapped(x).values()).backward()
            optimizer.step()
        branch(model, affinity, optimizer=optimizer, **settings)
        wrapped = DistributedDataParallel(model)
    sum(output.square().mean() for output in wrapped(x).values()).backward()
    optimizer.step()
    weights = {name: value for name, value in model.state_dict().items() if "running" not in name}
    return errors, untouched, weights, model.describe()


def test_two_processes_split_alike_or_not_at_all() -> None:
    first, second = run_on_two_processes(train_and_split, timeout=240.0)
    assert first[1] == second[1] == [1, 1, 1]
    for rank, (errors, *_) in enumerate((first, second)):
        assert [kind for kind, _ in errors] == [
            "WrongTypeError",
            "ConfigurationError",
            "NonFiniteError" if rank else "ConfigurationError",
        ]
        assert "found DistributedDataParallel" in errors[0][1]
        assert "[[0, 1], [2, 3]] on rank 0, [[0, 2], [1, 3]] on rank 1" in errors[1][1]
    assert "an error on rank 1" in first[0][2][1]
    assert first[3] == second[3]
    assert "2      first, second | third, fourth" in first[3]
    assert first[2].keys() == second[2].keys()
    for name, value in first[2].items():
        assert torch.equal(value, second[2][name]), name
