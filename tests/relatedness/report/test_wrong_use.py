"""What cannot be used is refused in words that say what to do, and leaves model and report as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from saliency_reg import (
    AlreadyAttachedError,
    CaptureError,
    ConfigurationError,
    FeatureSurgery,
    NonFiniteError,
    ReaderError,
    RelationReport,
    SaliencyRegularizer,
    ShapeError,
    TaskError,
    WrongTypeError,
    relation_report,
)

from .models import CASES, TASKS, Net, attach, build, data, mlp


def reported(case: str = "heads", **options: Any) -> tuple[Net, RelationReport, Any]:
    model = build(case)
    source = attach("surgery", model, case)
    return model, relation_report(source, **options), source


def test_what_it_looks_at() -> None:
    model = build("heads")
    with pytest.raises(WrongTypeError, match="strength=0"):
        relation_report(model)
    with pytest.raises(CaptureError, match="attached to no model"):
        relation_report(SaliencyRegularizer(None, tasks=TASKS, strength=1.0))
    two = nn.ModuleDict({"backbone": nn.Linear(5, 6), "heads": nn.ModuleDict({"a": mlp(1), "b": mlp(1)})})
    with pytest.raises(TaskError, match="at least 3"):
        relation_report(FeatureSurgery(two, heads="heads"))
    source = attach("surgery", model, "heads")
    report = relation_report(source)
    with pytest.raises(AlreadyAttachedError, match="another report"):
        relation_report(source)
    source.remove()
    with pytest.raises(CaptureError, match="removed"):
        report.update(torch.zeros(7, 4))
    with pytest.raises(CaptureError, match="attached to no model"):
        relation_report(source)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kinds": {"fifth": "binary"}}, TaskError, "fifth"),
        ({"kinds": "ordinal"}, ConfigurationError, "binary"),
        ({"kinds": ["binary"]}, TaskError, "4 tasks"),
        ({"loss": {"first": 3}}, WrongTypeError, "function"),
        ({"views": ["cosine"]}, ConfigurationError, "gradient_cosine"),
        ({"views": ["relation_weights"]}, ConfigurationError, "SaliencyRegularizer"),
        ({"every": 0}, ConfigurationError, "every"),
        ({"tag_every": 1.5}, WrongTypeError, "tag_every"),
        ({"tag_step": 0}, ConfigurationError, "tag_step"),
        ({"decay": 1.1}, ConfigurationError, "decay"),
        ({"points": -1}, ConfigurationError, "points"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = build("heads")
    source = attach("surgery", model, "heads")
    with pytest.raises(error, match=match):
        relation_report(source, **options)
    relation_report(source)


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (lambda y: y[:, :3], ShapeError, r"\[B, 4\]"),
        (lambda y: y[:5], ShapeError, "7 samples"),
        (lambda y: {"fifth": y[:, 0]}, TaskError, "fifth"),
        (lambda y: [y[:, 0]], TaskError, "4 tasks"),
        (lambda y: {"first": "yes"}, WrongTypeError, "first"),
        (lambda y: {"first": y}, ShapeError, "one for each sample"),
        (lambda y: {"first": y[:, 0] + 0.5}, ConfigurationError, "'number'"),
        (lambda y: {"third": y[:, 2] + 3}, ShapeError, "0 to 2"),
        (lambda y: {"third": y[:, 2] + 0.5}, ShapeError, "whole numbers"),
        (lambda y: {"second": y[:, 1] / 0}, NonFiniteError, "infinite"),
        (lambda y: None, WrongTypeError, "labels must be"),
    ],
)
def test_labels(labels: Any, error: type[Exception], match: str) -> None:
    model, report, _ = reported()
    x, y = data("heads", 0)
    model(x)
    report.update(y)
    before = {name: value.clone() for name, value in report.state_dict().items() if name != "calls"}
    outputs = model(x)
    with pytest.raises(error, match=match):
        report.update(labels(y))
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(-7), report.state_dict()[name].nan_to_num(-7)), name
    sum(output.sum() for output in outputs.values()).backward()


def test_whole_numbers_of_minus_one_are_asked_about() -> None:
    model, report, _ = reported("linear columns")
    x, y = data("linear columns", 0)
    model(x)
    with pytest.raises(ConfigurationError, match="-100"):
        report.update({"first": 2 * y[:, 0].nan_to_num(0).long() - 1})


@pytest.mark.parametrize(("task", "kind"), [("first", "class"), ("third", "binary"), ("fourth", "number")])
def test_kinds_that_do_not_fit_the_outputs(task: str, kind: str) -> None:
    model, report, _ = reported(kinds={task: kind})
    x, y = data("heads", 0)
    model(x)
    with pytest.raises(ConfigurationError, match=task):
        report.update(y)


def test_when_it_is_called() -> None:
    model, report, _ = reported()
    x, y = data("heads", 0)
    with pytest.raises(CaptureError, match="not run a forward"):
        report.update(y)
    with pytest.raises(CaptureError, match="nothing was gathered"):
        report.views()
    with torch.no_grad():
        model(x)
    with pytest.raises(CaptureError, match="without gradients"):
        report.update(y)
    model(x)
    report.update(y)
    with pytest.raises(CaptureError, match="looked at already"):
        report.update(y)
    outputs = model(x)
    sum(output.sum() for output in outputs.values()).backward()
    with pytest.raises(CaptureError, match="between the model's forward and loss.backward"):
        report.update(y)
    report.remove()
    with pytest.raises(CaptureError, match="removed"):
        report.update(y)
    assert report.views().common_labels[0, 0] > 0


def test_a_regularizer_that_is_off() -> None:
    model = build("heads")
    source = attach("regularizer", model, "heads")
    report = relation_report(source)
    source.enabled = False
    model(data("heads", 0)[0])
    with pytest.raises(CaptureError, match="enabled"):
        report.update(data("heads", 0)[1])


def test_dense_outputs_are_refused() -> None:
    model = build("map")
    model.heads["first"] = nn.Conv2d(4, 2, 1).double()
    report = relation_report(FeatureSurgery(model, heads="heads"))
    model(data("map", 0)[0])
    with pytest.raises(ShapeError, match="Pool dense outputs"):
        report.update(data("map", 0)[1])


def test_backward_hooks_of_others_are_refused_where_gradients_are_taken() -> None:
    model, report, source = reported()
    handle = model.heads["second"][0].register_full_backward_hook(lambda *_: None)
    model(data("heads", 0)[0])
    with pytest.raises(ReaderError, match="heads.second"):
        report.update(data("heads", 0)[1])
    report.remove()
    report = relation_report(source, views=["error_kappa", "label_correlation"])
    model(data("heads", 0)[0])
    report.update(data("heads", 0)[1])
    handle.remove()


def test_outputs_that_are_not_finite_are_left_out_and_told_once() -> None:
    model, report, _ = reported(tag_every=1)
    x, y = data("heads", 0)
    for _ in range(2):
        model(x)
        report.update(y)
    before = report.views()
    model.heads["second"][2].register_forward_hook(lambda module, args, output: output * torch.nan)
    model(x)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        report.update(y)
    model(x)
    report.update(y)
    after = report.views()
    torch.testing.assert_close(after.matrices["gradient_cosine"][1], before.matrices["gradient_cosine"][1])
    for name, matrix in after.matrices.items():
        assert torch.equal(matrix.isfinite(), before.matrices[name].isfinite()), name


def test_constant_labels_are_told_once() -> None:
    model, report, _ = reported()
    x, y = data("heads", 0)
    y[:, 0] = 1
    model(x)
    report.update(y)
    with pytest.warns(UserWarning, match=r"all labels of \['first'\]"):
        views = report.views()
    assert views.matrices["label_correlation"][0].isnan().all()
    report.views()
    assert CASES["heads"].kinds[0] == "binary"


def test_a_report_that_is_gone_does_not_blind_the_next() -> None:
    model, report, source = reported()
    report.remove()
    report = relation_report(source)  # the first one is collected here
    x, labels = data("heads", 0)
    model(x)
    report.update(labels)
    assert report.views().matrices["tag"].isfinite().all()
    with pytest.raises(AlreadyAttachedError):
        relation_report(source)


def test_an_infinite_label_leaves_nothing_behind() -> None:
    model, report, _ = reported()
    x, labels = data("heads", 0)
    bad = labels.clone()
    bad[0, list(CASES["heads"].kinds).index("number")] = torch.inf
    model(x)
    with pytest.raises(NonFiniteError):
        report.update(bad)
    other = relation_report(attach("surgery", again := build("heads"), "heads"))
    for one, own in ((model, report), (again, other)):
        for update in range(1, 4):
            x, labels = data("heads", update)
            one(x)
            own.update(labels)
    assert report.views()["label_correlation"].isfinite().equal(other.views()["label_correlation"].isfinite())
    report.load_state_dict(report.state_dict())


def test_pairs_without_common_labels_have_no_gradients_to_compare() -> None:
    model, report, _ = reported()
    x, labels = data("heads", 0)
    labels[:4, 0] = labels[4:, 1] = torch.nan
    model(x)
    report.update(labels)
    views = report.views()
    for view in ("gradient_cosine", "tag"):
        assert views[view][0, 1].isnan()
        assert views[view][1, 0].isnan()
        assert views[view][0, 2].isfinite()
