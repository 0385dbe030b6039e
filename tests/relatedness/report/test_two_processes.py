"""Two gloo processes have the views of one process with the joined batch: also where tasks, labels or heads are absent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import CaptureError, ConfigurationError, relation_report
from tests.support.two_processes import run_on_two_processes

from .models import CASES, attach, both, build, changed, data

RUNS = [
    ("heads", "regularizer"),
    ("linear columns", "surgery"),
    ("map", "gradnorm"),
    ("heads", "regularizer with surgery"),
]
#: Samples of the first process in each update, of 7; in the second update, one of them has none.
SPLITS = (3, 7, 2, 4)
OPTIONS = {"tag_every": 2, "decay": 0.9}


def joined_views(rank: int) -> list[dict[str, Tensor | None]]:
    found = []
    for case, kind in RUNS:
        model = build(case)
        source = attach(kind, DistributedDataParallel(model, find_unused_parameters=True), case)
        report = relation_report(source, kinds=CASES[case].kinds if case != "linear columns" else None, **OPTIONS)
        for update, split in enumerate(SPLITS):
            x, labels = data(case, update)
            part = slice(0, split) if rank == 0 else slice(split, None)
            model(x[part])
            if kind.startswith("regularizer"):
                source()
            report.update(labels[part])
            changed(model, update)
        views = report.views()
        found.append({**views.matrices, "common": views.common_labels, "skill": views.skill})
        source.remove()
    return found


def apart(rank: int) -> tuple[Tensor, Tensor, str]:
    """A process without heads, then one whose labels cannot be used."""
    model = build("heads")
    source = attach("surgery", model, "heads")
    report = relation_report(source, tag_every=1)
    x, labels = data("heads", 0)
    feature = model.backbone(x)
    if rank == 0:
        model.from_feature(feature)
        report.update(labels)
    else:
        model.forward = model.backbone.forward
        model(x)
        report.update({})
    views = report.views()
    model = build("linear columns")
    report = relation_report(attach("surgery", model, "linear columns"))
    x, labels = data("linear columns", 0)
    model(x)
    report.update(labels)
    model(x)
    message = ""
    try:
        report.update(labels if rank == 0 else labels + 0.5)
    except (CaptureError, ConfigurationError) as error:
        message = str(error)
    return views.matrices["gradient_cosine"], views.matrices["tag"], message


def everything(rank: int) -> tuple[list[dict[str, Tensor | None]], tuple[Tensor, Tensor, str]]:
    return joined_views(rank), apart(rank)


def test_two_processes_are_one_with_the_joined_batch() -> None:
    (first, alone), (second, elsewhere) = run_on_two_processes(everything, timeout=400.0)
    for (case, kind), one, other in zip(RUNS, first, second):
        report, slow, _ = both(case, kind, len(SPLITS), **OPTIONS)
        views = report.views()
        expected = {**views.matrices, "common": views.common_labels, "skill": views.skill}
        for name, matrix in expected.items():
            torch.testing.assert_close(one[name], matrix, rtol=0, atol=1e-10, equal_nan=True, msg=f"{case} {name}")
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=0, equal_nan=True, msg=f"{case} {name}")
        for name in ("gradient_cosine", "error_kappa", "tag"):
            torch.testing.assert_close(one[name], getattr(slow, name)(), rtol=0, atol=1e-10, equal_nan=True)
    assert torch.equal(alone[0], elsewhere[0])
    assert alone[0].isfinite().all()
    assert torch.equal(alone[1], elsewhere[1])
    assert alone[1].isfinite().all()
    assert "another process" in alone[2]
    assert "taken for a binary one" in elsewhere[2]
