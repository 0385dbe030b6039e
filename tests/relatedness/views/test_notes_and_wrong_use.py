"""What views say of themselves, and what cannot be views."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saliency_reg import RelationViews
from saliency_reg.errors import ConfigurationError, NonFiniteError, ShapeError, TaskError, WrongTypeError
from saliency_reg.relatedness.views import VIEWS, checked_affinity

from .support import NAN, random_views, with_gaps


def test_nothing_to_say() -> None:
    assert random_views(4).notes == ()
    assert random_views(4, skill=None).notes == ()
    assert random_views(4, skill=torch.full((4,), NAN)).notes == ()
    assert random_views(4).chance_note is None


def test_chance_level() -> None:
    views = random_views(4, skill=torch.tensor([0.3, 0.0, NAN, -0.1]))
    assert views.at_chance == ("task 1", "task 3")
    assert views.chance_note == "At chance level, no better than a constant guess: task 1, task 3 (2 of 3 tasks)."
    assert views.notes == (
        f"{views.chance_note} What the model shows of these tasks is mostly noise: labels alone tell more.",
    )
    views = random_views(4, skill=torch.tensor([0.0, -0.1, NAN, -0.1]))
    assert views.chance_note == "The model is at chance level: it predicts no task better than a constant guess."
    assert views.subset(["task 2", "task 0"]).at_chance == ("task 0",)
    only = random_views(3, parts=0, skill=torch.zeros(3), matrices={"tag": torch.zeros(3, 3)})
    assert only.notes[0].endswith("train longer first.")


def test_pairs_that_were_never_seen_together() -> None:
    counts = torch.full((5, 5), 9)
    counts[0, 1] = counts[1, 0] = counts[2, 3] = counts[3, 2] = 0
    counts[4] = counts[:, 4] = 0
    views = with_gaps(random_views(5, common_labels=counts), [(4, other) for other in range(5)])
    assert views.notes == (
        "No label was seen of task 4.",
        "2 pairs were never seen together in one sample: task 0 and task 1, task 2 and task 3.",
    )
    counts[4] = counts[:, 4] = 9
    gaps = with_gaps(random_views(5, common_labels=counts), [(4, other) for other in range(5)], ["label_correlation"])
    assert gaps.notes[-1] == "label_correlation knows nothing of task 4."


def test_matrices_are_in_the_order_of_all_views_and_in_float64() -> None:
    views = RelationViews(
        ["a", "b"],
        {"tag": torch.ones(2, 2), "gradient_cosine": torch.eye(2, requires_grad=True)},
        torch.ones(2, 2),
        skill=torch.ones(2),
    )
    assert views.tasks == ("a", "b")
    assert [*views] == ["gradient_cosine", "tag"] == [kind.key for kind in views.kinds]
    assert views["gradient_cosine"].dtype == views.skill.dtype == torch.float64
    assert not views["gradient_cosine"].requires_grad
    assert views.common_labels.dtype == torch.int64
    assert "tag" in views
    assert "error_kappa" not in views
    with pytest.raises(ConfigurationError, match="unknown view 'error_kappa'. Choose one of 'gradient_cosine', 'tag'"):
        views["error_kappa"]
    with pytest.raises(ConfigurationError, match="unknown view"):
        views.affinity("cosine")
    assert views != random_views(2)


GOOD = {"tasks": ("a", "b", "c"), "matrices": {"tag": torch.zeros(3, 3)}, "common_labels": torch.ones(3, 3)}
UNEVEN = torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"tasks": "abc"}, WrongTypeError, "tasks must be a list of names"),
        ({"tasks": ("a",)}, TaskError, "need at least 2"),
        ({"tasks": ("a", "b", "a")}, TaskError, "more than once"),
        ({"matrices": torch.zeros(3, 3)}, WrongTypeError, r"matrices must be \{view: \[T, T\]\}, found Tensor"),
        ({"matrices": {"cosine": torch.zeros(3, 3)}}, ConfigurationError, r"unknown views \['cosine'\]. The views are"),
        ({"matrices": {"tag": [[0.0]]}}, WrongTypeError, r"matrices\['tag'\] must be a tensor, found list"),
        ({"matrices": {"tag": torch.zeros(3, 3, dtype=torch.cfloat)}}, WrongTypeError, "must be real"),
        ({"matrices": {"tag": torch.zeros(2, 2)}}, ShapeError, r"\[T, T\] = \[3, 3\] for 3 tasks, found \[2, 2\]"),
        ({"matrices": {"tag": torch.full((3, 3), torch.inf)}}, NonFiniteError, "is infinite for 'a' and 'a'. Pass NaN"),
        (
            {"matrices": {"gradient_cosine": 2 * torch.eye(3)}},
            ConfigurationError,
            r"must be in \[-1, 1\], found entries from 0 to 2",
        ),
        (
            {"matrices": {"saliency_distance": -torch.eye(3)}},
            ConfigurationError,
            r"must be in \[0, inf\], found entries from -1 to 0",
        ),
        (
            {"matrices": {"label_correlation": UNEVEN}},
            ConfigurationError,
            "must be symmetric, and is not for 'a' and 'b'",
        ),
        ({"common_labels": -torch.ones(3, 3)}, ConfigurationError, "whole numbers >= 0"),
        ({"common_labels": UNEVEN}, ConfigurationError, "whole numbers >= 0 and symmetric"),
        ({"common_labels": torch.ones(3)}, ShapeError, r"common_labels must be \[T, T\]"),
        ({"trajectory": {"tag": torch.zeros(3, 3)}}, ShapeError, r"\[S, T, T\] = \[S, 3, 3\] for 3 tasks, found"),
        ({"trajectory": {"error_kappa": torch.zeros(2, 3, 3)}}, ConfigurationError, "not among the matrices"),
        ({"skill": torch.ones(2)}, ShapeError, r"skill must be \[T\] = \[3\]"),
    ],
)
def test_what_cannot_be_views(change: dict[str, Any], error: type[Exception], text: str) -> None:
    RelationViews(**GOOD)
    with pytest.raises(error, match=text):
        RelationViews(**{**GOOD, **change})


def test_rounding_is_allowed_and_does_not_leave_the_range() -> None:
    cosine = torch.eye(3) + 1e-6
    cosine[0, 1] += 1e-7
    views = RelationViews(("a", "b", "c"), {"gradient_cosine": cosine}, torch.ones(3, 3))
    affinity = views.affinity("gradient_cosine")
    assert affinity.max() == 1.0
    assert torch.equal(affinity, affinity.T)


def test_a_trajectory_of_no_parts_is_none() -> None:
    assert RelationViews(**GOOD, trajectory={"tag": torch.zeros(0, 3, 3)}).trajectory == {}


def test_checked_affinity() -> None:
    affinity = random_views(3).affinity("tag")
    assert torch.equal(checked_affinity(affinity), affinity)
    assert torch.equal(checked_affinity(affinity.float().double(), ("a", "b", "c")), affinity.float().double())
    for wrong, error, text in (
        ([[1.0]], WrongTypeError, "affinity must be a tensor"),
        (torch.tensor(1.0), ShapeError, r"affinity must be \[T, T\]"),
        (torch.ones(2, 3), ShapeError, r"affinity must be \[T, T\]"),
        (2 * affinity, ConfigurationError, r"affinity must be in \[0, 1\]"),
        (UNEVEN, ConfigurationError, "affinity must be symmetric, and is not for '0' and '1'"),
        (affinity * NAN, NonFiniteError, "affinity knows nothing of '0', '1', '2' with any other task. Pass a number"),
    ):
        with pytest.raises(error, match=text):
            checked_affinity(wrong)
    with pytest.raises(ShapeError, match=r"\[2, 2\] for 2 tasks"):
        checked_affinity(affinity, ("a", "b"))


def test_all_kinds_have_a_label_and_a_range() -> None:
    assert all(kind.key == key and kind.label and kind.lowest < kind.highest for key, kind in VIEWS.items())
    assert [key for key, kind in VIEWS.items() if kind.closer == "smaller"] == ["saliency_distance"]
    assert [key for key, kind in VIEWS.items() if not kind.symmetric] == ["tag"]
