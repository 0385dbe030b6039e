"""Each view equals a slow double loop, in float64, whatever the heads are and whoever has the hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saliency_reg import relation_report, task_saliencies
from tests.reference.slow import slow_distances

from .models import CASES, TASKS, both, build, changed, data

VIEWS = ("gradient_cosine", "error_cooccurrence", "error_kappa", "label_correlation", "tag")


def assert_equal(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, equal_nan=True, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_views_equal_loops(case: str) -> None:
    report, slow, _ = both(case, "surgery", 7, tag_every=3, decay=0.9)
    views = report.views()
    for name in VIEWS:
        assert_equal(views.matrices[name], getattr(slow, name)(), name)
    assert torch.equal(views.common_labels, slow.common_labels())
    assert views.matrices["tag"].isfinite().all()
    assert views.matrices["gradient_cosine"].isfinite().all()


@pytest.mark.parametrize("kind", ["regularizer", "regularizer with surgery", "gradnorm", "rep_mtl"])
def test_whoever_has_the_hooks(kind: str) -> None:
    report, slow, source = both("heads", kind, 5, tag_every=2)
    views = report.views()
    for name in VIEWS:
        assert_equal(views.matrices[name], getattr(slow, name)(), name)
    assert ("relation_weights" in views.matrices) == kind.startswith("regularizer")
    if kind.startswith("regularizer"):
        assert_equal(views.matrices["saliency_distance"], slow.saliency_distance(), "distance")
        assert_equal(views.matrices["relation_weights"], source.relations.matrix(), "weights")


@pytest.mark.parametrize("case", ["heads", "linear heads", "linear columns", "columns", "map"])
def test_distances_without_a_regularizer(case: str) -> None:
    report, slow, _ = both(case, "surgery", 4)
    for step in slow.steps:
        feature = step.feature.clone().requires_grad_()
        saliencies = task_saliencies(dict(zip(TASKS, step.heads(feature))), feature)
        step.distances = slow_distances(list(saliencies.detach()), "cosine", "mean")
    assert_equal(report.views().matrices["saliency_distance"], slow.saliency_distance(), "distance")


@pytest.mark.parametrize("first", [True, False])
def test_before_or_after_the_regularizer(first: bool) -> None:
    """Distances of a call that comes after the update are taken up later."""
    from .models import attach

    model = build("heads")
    source = attach("regularizer", model, "heads")
    report = relation_report(source, kinds=CASES["heads"].kinds)
    for update in range(3):
        x, labels = data("heads", update)
        model(x)
        if first:
            report.update(labels)
        source()
        if not first:
            report.update(labels)
        changed(model, update)
    _, slow, _ = both("heads", "regularizer", 3)
    views = report.views()
    assert_equal(views.matrices["saliency_distance"], slow.saliency_distance(), "distance")
    assert_equal(views.matrices["gradient_cosine"], slow.gradient_cosine(), "cosine")


def test_labels_come_in_many_forms() -> None:
    """A matrix, a mapping of what there is, whole numbers with -100, and classes below 0 mean the same."""
    from .models import attach

    found = []
    for form in range(3):
        model = build("heads")
        report = relation_report(attach("surgery", model, "heads"), kinds=CASES["heads"].kinds)
        for update in range(4):
            x, labels = data("heads", update)
            model(x)
            columns = dict(zip(TASKS, labels.unbind(1)))
            if form == 1:
                columns = {task: column for task, column in columns.items() if not column.isnan().all()}
                columns["third"] = columns.get("third", labels[:, 2]).nan_to_num(-1).long()
                columns["first"] = columns["first"].nan_to_num(-100).int()
            elif form == 2:
                columns["fourth"] = columns["fourth"].nan_to_num(-3.0).unsqueeze(1)
            report.update(labels if form == 0 else columns)
            changed(model, update)
        found.append(report.views())
    for views in found[1:]:
        for name, matrix in views.matrices.items():
            torch.testing.assert_close(matrix, found[0].matrices[name], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(views.common_labels, found[0].common_labels)


def test_a_loss_of_ones_own() -> None:
    """What the kinds do is done by a function that says the same; another one gives other gradients."""
    from torch.nn import functional

    from .models import attach

    def squared(output: Tensor, label: Tensor) -> Tensor:
        return (output - label) ** 2

    losses = [
        {},
        {"first": lambda o, y: functional.binary_cross_entropy_with_logits(o, y, reduction="none"), "second": squared},
        {"third": lambda o, y: functional.cross_entropy(o, y.long(), reduction="none")},
        {"first": squared},
    ]
    found = []
    for loss in losses:
        model = build("heads")
        report = relation_report(attach("surgery", model, "heads"), kinds=CASES["heads"].kinds, loss=loss, tag_every=2)
        for update in range(4):
            x, labels = data("heads", update)
            model(x)
            report.update(labels)
        found.append(report.views())
    for views in found[1:3]:
        for name in VIEWS:
            assert_equal(views.matrices[name], found[0].matrices[name], name)
    assert not torch.allclose(found[3].matrices["gradient_cosine"], found[0].matrices["gradient_cosine"])
    assert found[1].skill.isnan().tolist() == [True, True, False, False]


def test_skill_is_one_minus_loss_over_that_of_the_best_constant() -> None:
    report, slow, _ = both("heads", "surgery", 6, decay=1.0)
    expected = []
    for task, kind in enumerate(slow.kinds):
        losses = [float(value) for step in slow.steps if (value := slow._loss(step, step.feature, task)) is not None]
        counts = [sum(row[task] is not None for row in step.labels) for step in slow.steps]
        counts = [count for count in counts if count]
        mean = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
        labels = torch.tensor([x for x, _ in slow.pairs(task, task)])
        if kind == "number":
            best = labels.var(correction=0)
        else:
            shares = labels.unique(return_counts=True)[1] / len(labels)
            best = -(shares * shares.log()).sum()
        expected.append(1 - mean / float(best))
    torch.testing.assert_close(report.views().skill, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
