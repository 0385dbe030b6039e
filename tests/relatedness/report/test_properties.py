"""What has to come out where it is known, and what stays when the form of the training changes."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, SaliencyRegularizer, relation_report

from .models import CASES, attach, both, build, changed, data

NINE = [f"{name} {copy}" for copy in range(3) for name in ("one", "two", "three")]


class Duplicates(nn.Module):
    """Three tasks, of each of which there are three heads with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.heads = nn.ModuleDict(
            {name.replace(" ", "_"): nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1)) for name in NINE}
        )
        heads = list(self.heads.values())
        for place, head in enumerate(heads):
            head.load_state_dict(heads[place % 3].state_dict())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.backbone(x)
        return {name: head(feature).squeeze(1) for name, head in self.heads.items()}


def test_duplicates_of_three_tasks_are_found() -> None:
    torch.manual_seed(1)
    model = Duplicates().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    regularizer = SaliencyRegularizer(model, heads="heads", optimizer=optimizer, strength=0.01)
    report = relation_report(regularizer, tag_every=2)
    for _ in range(30):
        x = torch.randn(32, 6, dtype=torch.float64)
        labels = (x[:, :3] > 0).double().repeat(1, 3)
        outputs = model(x)
        losses = [
            nn.functional.binary_cross_entropy_with_logits(output, label)
            for output, label in zip(outputs.values(), labels.unbind(1))
        ]
        loss = sum(losses) + regularizer(losses=losses)
        report.update(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    views = report.views()
    same = (torch.arange(9).unsqueeze(1) - torch.arange(9)) % 3 == 0
    alike = {"saliency_distance": 0.0, "gradient_cosine": 1.0, "error_cooccurrence": 1.0, "error_kappa": 1.0}
    for name, value in {**alike, "label_correlation": 1.0}.items():
        torch.testing.assert_close(views.matrices[name][same], torch.full((27,), value).double(), rtol=0, atol=1e-10)
        others = views.matrices[name][~same]
        assert others.min() > 0.05 if name == "saliency_distance" else others.max() < 0.95, name
    gains = views.matrices["tag"]
    weights = views.matrices["relation_weights"]
    away = ~torch.eye(9, dtype=torch.bool)
    for row in range(9):
        assert gains[row][same[row]].min() > gains[row][~same[row]].max()
        assert weights[row][same[row] & away[row]].min() > weights[row][~same[row]].max()
    assert (views.skill > 0.1).all()
    assert views.common_labels.unique().tolist() == [30 * 32]


def test_tag_tends_to_what_the_gradients_say() -> None:
    """For a small step the gain is ``step |A| <g_i, g_j> / (|g_j| L_i)``: its signs are those of the cosines."""
    found = {}
    for step in (1e-3, 1e-5):
        model = build("heads")
        report = relation_report(
            attach("surgery", model, "heads"), kinds=CASES["heads"].kinds, tag_every=1, tag_step=step
        )
        x, labels = data("heads", 0)
        model(x)
        report.update(labels)
        found[step] = report.views().matrices
    large, small = (found[step]["tag"] / step for step in found)
    torch.testing.assert_close(large, small, rtol=0.02, atol=1e-4)
    assert torch.equal(small.sign(), found[1e-5]["gradient_cosine"].sign())


def test_scales_of_losses_do_not_matter() -> None:
    found = []
    for factor in (1.0, 1000.0):
        model = build("heads")
        loss = {"second": lambda output, label, factor=factor: factor * (output - label) ** 2}
        source = attach("surgery", model, "heads")
        report = relation_report(source, kinds=CASES["heads"].kinds, loss=loss, tag_every=1)
        for update in range(3):
            x, labels = data("heads", update)
            model(x)
            report.update(labels)
        found.append(report.views().matrices)
    for name, matrix in found[0].items():
        torch.testing.assert_close(found[1][name], matrix, rtol=0, atol=1e-10, equal_nan=True, msg=name)


def test_a_task_that_is_always_absent_is_unknown() -> None:
    model = build("heads")
    report = relation_report(attach("surgery", model, "heads"), tag_every=1)
    for update in range(3):
        x, labels = data("heads", update)
        labels[:, 3] = torch.nan
        model(x)
        report.update(labels)
    views = report.views()
    for name, matrix in views.matrices.items():
        if name != "saliency_distance":  # which needs no labels
            assert matrix[3].isnan().all(), name
            assert matrix[:, 3].isnan().all(), name
            assert matrix[:2, :2].isfinite().all(), name
    assert views.common_labels[3].sum() == 0


def test_heads_that_did_not_run_and_come_later() -> None:
    """A head with classes that runs for the first time in the third forward: tables make room for it."""
    model = build("heads")
    whole = dict(model.heads.items())
    report = relation_report(attach("surgery", model, "heads"), tag_every=1)
    for update in range(5):
        x, labels = data("heads", update)
        ran = list(whole) if update > 1 else [task for task in whole if task != "third"]
        model.from_feature = lambda feature, ran=ran: {task: whole[task](feature) for task in ran}
        model(x)
        report.update(labels)
    views = report.views()
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for update in range(5):
        known = (~data("heads", update)[1].isnan()).long()
        known[:, 2] *= update > 1
        expected += known.T @ known
    assert torch.equal(views.common_labels, expected)
    assert views.matrices["gradient_cosine"].isfinite().all()
    assert views.matrices["tag"].isfinite().all()


def test_the_trajectory_has_evenly_spread_points() -> None:
    model = build("linear columns")
    report = relation_report(attach("surgery", model, "linear columns"), points=4, views=["gradient_cosine"])
    ends = []
    for update in range(23):
        x, labels = data("linear columns", update, 40)
        model(x)
        report.update(labels)
        changed(model, update)
        ends.append(report.views().matrices["gradient_cosine"])
    points = report.views().trajectory["gradient_cosine"]
    places = [next(place for place, end in enumerate(ends) if torch.equal(end, point)) for point in points]
    assert len(points) in (2, 3, 4)
    assert len({after - before for before, after in pairwise(places)}) == 1
    assert list(report.views().matrices) == ["gradient_cosine"]


def test_every_so_many_updates() -> None:
    model = build("heads")
    report = relation_report(attach("surgery", model, "heads"), kinds=CASES["heads"].kinds, every=2)
    for update in range(5):
        x, labels = data("heads", update)
        model(x)
        report.update(labels if update % 2 == 0 else None)
    few, _, _ = both("heads", "surgery", 0)
    known = sum(((~data("heads", update)[1].isnan()).long() for update in (0, 2, 4)), start=torch.zeros(7, 4).long())
    assert report.views().common_labels.diagonal().tolist() == known.sum(0).tolist()
    assert few.trajectory.number == 0


def test_mixed_precision_is_near_to_double() -> None:
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        model = build("heads")
        model = model if dtype == torch.float64 else model.float()
        report = relation_report(attach("surgery", model, "heads"), kinds=CASES["heads"].kinds, tag_every=1)
        for update in range(3):
            x, labels = data("heads", update, 64)
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                model(x.to(next(model.parameters()).dtype))
            report.update(labels)
        found.append(report.views().matrices)
    for name in ("gradient_cosine", "tag", "saliency_distance"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=0.05, atol=0.02 if name != "tag" else 5e-4)


def test_a_head_that_cannot_be_run_again_is_told_once() -> None:
    class Counting(nn.Module):
        """Returns something else each time."""

        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) * self.calls

    model = build("heads")
    model.heads["second"] = Counting().double()
    report = relation_report(FeatureSurgery(model, heads="heads"), tag_every=1)
    model(data("heads", 0)[0])
    with pytest.warns(UserWarning, match=r"heads.second'\] do not return their outputs again"):
        report.update(data("heads", 0)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(data("heads", 1)[0])
        report.update(data("heads", 0)[1])
    gains = report.views().matrices["tag"]
    assert gains[1].isnan().all()
    assert gains[[0, 2, 3]].isfinite().all()
