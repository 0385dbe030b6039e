"""A training that is stopped and goes on has the same report to the bit; what does not fit is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from saliency_reg import CaptureError, RelationReport, StateMismatchError, relation_report

from .models import CASES, attach, build, changed, data


def go_on(report: RelationReport, model: torch.nn.Module, source: object, updates: range) -> None:
    for update in updates:
        x, labels = data("heads", update)
        model(x)
        source()
        report.update(labels)
        changed(model, update)


@pytest.mark.parametrize("kinds", [None, CASES["heads"].kinds])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_resumed_report_is_the_same_to_the_bit(kinds: tuple[str, ...] | None, at: int) -> None:
    options = {"kinds": kinds, "tag_every": 2, "points": 4}
    model = build("heads")
    source = attach("regularizer", model, "heads")
    report = relation_report(source, **options)
    go_on(report, model, source, range(at))
    file = io.BytesIO()
    torch.save([report.state_dict(), source.state_dict(), model.state_dict()], file)
    go_on(report, model, source, range(at, 9))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = build("heads")
    other_source = attach("regularizer", other, "heads")
    resumed = relation_report(other_source, **options)
    for one, state in zip((resumed, other_source, other), saved):
        one.load_state_dict(state)
    go_on(resumed, other, other_source, range(at, 9))
    first, second = report.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(-7), second[name].nan_to_num(-7)), name
    one, two = report.views(), resumed.views()
    for name, matrix in one.matrices.items():
        torch.testing.assert_close(two.matrices[name], matrix, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(two.trajectory[name], one.trajectory[name], rtol=0, atol=0, equal_nan=True)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = build("heads")
    source = attach("regularizer", model, "heads")
    report = relation_report(source)
    go_on(report, model, source, range(2))
    before = {name: value.clone() for name, value in report.state_dict().items()}
    columns = build("linear columns")
    with pytest.raises(StateMismatchError, match="saved for the tasks"):
        report.load_state_dict({**before, "task_names": before["task_names"][:-1]})
    for name in ("tables.sums", "running.cosine", "trajectory.kept"):
        with pytest.raises(StateMismatchError):
            report.load_state_dict({**before, name: before[name][:-1]})
    with pytest.raises(StateMismatchError, match="lacks"):
        report.load_state_dict(attach("surgery", columns, "linear columns").state_dict())
    for name, value in report.state_dict().items():
        assert torch.equal(value.nan_to_num(-7), before[name].nan_to_num(-7)), name


def test_a_copy_belongs_to_no_model() -> None:
    model = build("heads")
    source = attach("regularizer", model, "heads")
    report = relation_report(source)
    go_on(report, model, source, range(3))
    for twin in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert torch.equal(twin.views().common_labels, report.views().common_labels)
        with pytest.raises(CaptureError, match="copy"):
            twin.update(data("heads", 0)[1])
    go_on(report, model, source, range(3, 4))


def test_it_is_no_part_of_others_and_keeps_its_precision() -> None:
    model = build("heads")
    source = attach("regularizer", model, "heads")
    names = set(source.state_dict())
    report = relation_report(source)
    go_on(report, model, source, range(1))
    assert set(source.state_dict()) == names
    assert not list(report.parameters())
    assert not any("_source" in name or "relations" in name for name in report.state_dict())
    report.half()
    assert report.running.get_buffer("cosine").dtype == torch.float64
