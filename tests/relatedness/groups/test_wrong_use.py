"""Errors that say what was found and what to pass."""

from __future__ import annotations

import pytest
import torch

from saliency_reg import best_groups, check_grouping, errors, group_stability, task_groups
from saliency_reg.relatedness.groups import branch_affinity, choose_partition, separation_cost

GOOD = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, 0.4], [0.2, 0.4, 1.0]])
NAMES = ["cat", "dog", "ship"]


def changed(row: int, column: int, value: float, *, both: bool = True) -> torch.Tensor:
    matrix = GOOD.clone()
    matrix[row, column] = value
    if both:
        matrix[column, row] = value
    return matrix


@pytest.mark.parametrize(
    ("affinity", "error", "text"),
    [
        (changed(0, 2, float("nan")), errors.NonFiniteError, r"\(cat, ship\)"),
        (changed(1, 1, float("inf")), errors.NonFiniteError, r"\(dog, dog\)"),
        (changed(0, 1, -0.2), errors.ConfigurationError, r"-0.2 to 1, outside for \(cat, dog\)"),
        (changed(2, 2, 1.5), errors.ConfigurationError, r"outside for \(ship, ship\)"),
        (changed(1, 2, 0.9, both=False), errors.ConfigurationError, r"symmetric; it is not for \(dog, ship\)"),
        (torch.ones(3, 2), errors.ShapeError, r"\[T, T\], found \[3, 2\]"),
        (torch.ones(3), errors.ShapeError, r"\[T, T\], found \[3\]"),
        ("saliency", errors.WrongTypeError, "found str"),
        (None, errors.WrongTypeError, "found NoneType"),
    ],
)
def test_affinities(affinity: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        task_groups(affinity, NAMES, 2)


def test_rounding_is_forgiven() -> None:
    noisy = (GOOD + 1e-7 * torch.tensor([[1.0, 2.0, -1.0], [-1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])).float()
    assert task_groups(noisy, NAMES, 2) == task_groups(GOOD, NAMES, 2)


@pytest.mark.parametrize("function", [best_groups, task_groups])
@pytest.mark.parametrize(
    ("size", "tasks", "text"),
    [
        (2, ["a", "b"], "found 2 task.s.; grouping needs at least 3"),
        (3, ["a", "b"], "found 2 task names for a matrix of 3"),
        (3, ["a", "b", "a"], r"\['a'\] occur more than once"),
    ],
)
def test_tasks(function, size: int, tasks: list[str], text: str) -> None:
    with pytest.raises(errors.TaskError, match=text):
        function(torch.eye(size), tasks, groups=2)


@pytest.mark.parametrize("function", [best_groups, task_groups])
@pytest.mark.parametrize("groups", [0, -1, 4])
def test_numbers_of_groups(function, groups: int) -> None:
    with pytest.raises(errors.ConfigurationError, match=f"from 1 to the number of tasks, 3; found {groups}"):
        function(GOOD, NAMES, groups=groups)


@pytest.mark.parametrize("function", [best_groups, task_groups])
@pytest.mark.parametrize("groups", [2.0, True, "2"])
def test_numbers_that_are_none(function, groups: object) -> None:
    with pytest.raises(errors.WrongTypeError, match="whole number"):
        function(GOOD, NAMES, groups=groups)


def test_gains() -> None:
    with pytest.raises(errors.NonFiniteError, match=r"gains .* \(cat, ship\)\."):
        best_groups(changed(0, 2, float("nan"), both=False), NAMES, groups=2)
    with pytest.raises(errors.ConfigurationError, match="found 13 tasks.* up to 12.*task_groups"):
        best_groups(torch.eye(13), groups=2)
    with pytest.raises(errors.ShapeError, match=r"alone must have the shape \[T\] = \[3\], found \[2\]"):
        best_groups(GOOD, groups=2, alone=[0.0, 1.0])
    with pytest.raises(errors.NonFiniteError, match="alone must be finite"):
        best_groups(GOOD, groups=2, alone=[0.0, 1.0, float("nan")])
    with pytest.raises(errors.WrongTypeError, match="alone must be 3 numbers, found str"):
        best_groups(GOOD, groups=2, alone="abc")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "ward"}, "'spectral' or 'average', found 'ward'"),
        ({"groups": 2, "group_cost": 0.1}, "groups and group_cost each decide"),
        ({"groups": 2, "distance": 0.1, "method": "average"}, "groups and distance each decide"),
        ({"distance": 0.1}, "Pass method='average'"),
        ({"distance": -0.1, "method": "average"}, "distance must be 0 or a positive number, found -0.1"),
        ({"group_cost": float("nan")}, "group_cost must be 0 or a positive number, found nan"),
    ],
)
def test_options(options: dict[str, object], text: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=text):
        task_groups(GOOD, NAMES, **options)


@pytest.mark.parametrize(
    ("groups", "error", "text"),
    [
        ([["cat", "dog"]], errors.TaskError, r"no group has the tasks \['ship'\]"),
        ([["cat", "dog"], ["dog", "ship"]], errors.TaskError, r"\['dog'\] are in several groups"),
        ([["cat", "dog"], ["ship", "truck"]], errors.TaskError, r"names \['truck'\], which are not tasks"),
        ([["cat", "cat", "dog"], ["ship"]], errors.TaskError, "names a task twice"),
        ([["cat", "dog", "ship"], []], errors.TaskError, "without tasks"),
        ([["cat", "dog"], "ship"], errors.WrongTypeError, r"found 'ship'. Pass \['ship'\]"),
        ("cat", errors.WrongTypeError, "list of lists"),
        (3, errors.WrongTypeError, "list of lists"),
    ],
)
def test_groupings(groups: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        check_grouping(groups, NAMES)


def test_groupings_that_are_right() -> None:
    assert check_grouping(({"ship"}, ["dog", "cat"]), NAMES) == (("ship",), ("cat", "dog"))
    both = [["cat", "dog"], ["dog", "ship"]]
    assert check_grouping(both, NAMES, overlap=True) == (("cat", "dog"), ("dog", "ship"))
    with pytest.raises(errors.TaskError, match="the same group occurs twice"):
        check_grouping([["cat", "dog"], ["dog", "cat"], ["ship"]], NAMES, overlap=True)


def test_stability() -> None:
    with pytest.raises(errors.TaskError, match=r"found 1 grouping.* at least 2"):
        group_stability([[("a", "b"), ("c",)]])
    with pytest.raises(errors.TaskError, match=r"no group has the tasks \['c'\]"):
        group_stability([[("a", "b"), ("c",)], [("a", "b")]])
    with pytest.raises(errors.WrongTypeError, match=r"found 'ab'"):
        group_stability([["ab", "c"], ["ab", "c"]])


def test_partitions_of_branches() -> None:
    fine = {"branch_cost": 0.1, "separation_weight": 1.0, "largest": 2, "seed": 0}
    for name, value in (("branch_cost", -1.0), ("separation_weight", float("inf")), ("largest", 0)):
        with pytest.raises(errors.ConfigurationError, match=name):
            choose_partition(GOOD, **{**fine, name: value})
    with pytest.raises(errors.ConfigurationError, match="branch_affinity must be symmetric"):
        choose_partition(changed(0, 1, 0.9, both=False), **fine)
    for branches in ([[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2], []], [[0, 1], [3]]):
        with pytest.raises(errors.TaskError, match="each of the 3 tasks once"):
            branch_affinity(GOOD, branches)
    assert separation_cost(GOOD, [[0, 1, 2]]) == pytest.approx(1 - (0.2 + 0.4 + 0.2) / 3)


def test_the_default_device_and_graphs_play_no_part() -> None:
    matrix = GOOD.clone().requires_grad_()
    calls = (
        lambda: best_groups(matrix, groups=2),
        lambda: best_groups(matrix, groups=2, overlap=False, alone=[0.0, 0.0, 0.0]),
        lambda: task_groups(matrix, groups=2),
        lambda: task_groups(matrix),
        lambda: task_groups(matrix, method="average"),
        lambda: group_stability([[("a", "b"), ("c",)], [("a",), ("b", "c")]]).adjusted_rand,
    )
    expected = [call() for call in calls]
    with torch.device("meta"):
        assert [call() for call in calls] == expected
