"""Models whose heads, feature maps and outputs are not the plain ones: the views are those of the slow loops, or NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, SaliencyRegularizer, relation_report

from .models import BINARY, TASKS, changed, mlp, rows
from .slow import SlowReport, Step

OPTIONS = {"tag_every": 2, "decay": 0.9}


class Form(nn.Module):
    """A model in two parts: up to the feature map, and from there."""

    def __init__(self, make: Callable[[], nn.Module] = lambda: mlp(1)) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: make() for task in TASKS})

    def forward(self, x: Tensor) -> Any:
        return self.from_feature(self.backbone(x))

    def from_feature(self, feature: Any) -> Sequence[Tensor]:
        return [head(feature) for head in self.heads.values()]


class Frozen(Form):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)


class Copies(Form):
    """Each head reads a copy."""

    def from_feature(self, feature: Tensor) -> Sequence[Tensor]:
        return [head(feature.clone()) for head in self.heads.values()]


class Flattening(Form):
    """Each head reads a view of its own of a map, and returns more than the output."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = mlp(1)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": self.layer(x), "hidden": x}

    def __init__(self) -> None:
        super().__init__(self.Head)

    def forward(self, x: Tensor) -> Any:
        return self.from_feature(self.backbone(x).view(-1, 2, 3))

    def from_feature(self, feature: Tensor) -> Sequence[Tensor]:
        return [head(feature.reshape(-1, 6))["logits"] for head in self.heads.values()]


class Towers(Form):
    """A head is two modules."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(4, 1))
        self.towers = nn.ModuleDict({task: nn.Sequential(nn.Linear(6, 4), nn.Tanh()) for task in TASKS})

    def from_feature(self, feature: Tensor) -> Sequence[Tensor]:
        return [head(tower(feature)) for head, tower in zip(self.heads.values(), self.towers.values())]


class TwoMaps(Form):
    """Heads read two maps, one of them by name."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = mlp(1), mlp(1, 3)

        def forward(self, x: Tensor, *, early: Tensor) -> Tensor:
            return self.first(x) + self.second(early)

    def __init__(self) -> None:
        super().__init__(self.Head)
        self.early = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.from_feature(torch.cat([self.backbone(x), self.early(x)], 1), self.backbone(x), self.early(x))

    def from_feature(self, both: Tensor, late: Tensor | None = None, early: Tensor | None = None) -> Sequence[Tensor]:
        late, early = (both[:, :6], both[:, 6:]) if late is None else (late, early)
        return [head(late, early=early) for head in self.heads.values()]


FORMS: dict[str, tuple[type[Form], dict[str, Any]]] = {
    "plain": (Form, {}),
    "named": (Form, {"feature": "backbone"}),
    "frozen": (Frozen, {}),
    "copies": (Copies, {}),
    "flattening": (Flattening, {"output": "logits"}),
    "towers": (Towers, {"heads": {task: [f"towers.{task}", f"heads.{task}"] for task in TASKS}}),
    "two maps": (TwoMaps, {"feature": ["backbone", "early"]}),
}


def data(update: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(update)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    labels = (x[:, :4] > 0).double()
    return x, labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.2, torch.nan)


def feature_of(model: Form, x: Tensor) -> Tensor:
    if isinstance(model, TwoMaps):
        return torch.cat([model.backbone(x), model.early(x)], 1).detach()
    return model.backbone(x).detach()


@pytest.mark.parametrize("source", ["strength", "no strength", "surgery"])
@pytest.mark.parametrize("form", FORMS)
def test_views_equal_loops(form: str, source: str) -> None:
    make, options = FORMS[form]
    if form == "copies" and source == "surgery":
        pytest.skip("surgery refuses it")
    torch.manual_seed(2)
    model = make().double()
    arguments = {"heads": "heads", **options}
    if source == "surgery":
        attached: Any = FeatureSurgery(model, **arguments)
    else:
        attached = SaliencyRegularizer(model, strength=0.1 if source == "strength" else 0.0, **arguments)
    report = relation_report(attached, **OPTIONS)
    slow = SlowReport(BINARY, decay=0.9, tag_every=2)
    for update in range(4):
        x, labels = data(update)
        model(x)
        report.update(labels)
        if source != "surgery":
            attached()
        twin = make().double()
        twin.load_state_dict(model.state_dict())
        slow.steps.append(Step(feature_of(model, x), twin.from_feature, rows(labels)))
        changed(model, update)
    views = report.views()
    for name in ("gradient_cosine", "error_kappa", "label_correlation", "tag"):
        torch.testing.assert_close(
            views.matrices[name], getattr(slow, name)(), rtol=0, atol=1e-10, equal_nan=True, msg=name
        )
    assert views.matrices["tag"].isfinite().all()
    assert views.matrices["saliency_distance"].isfinite().all()


class Chained(Form):
    """A head also reads what another one has returned."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 1)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.layer(torch.cat([x, other], 1)).tanh()

    def __init__(self) -> None:
        super().__init__()
        self.heads["second"] = self.Head()

    def from_feature(self, feature: Tensor) -> Sequence[Tensor]:
        first = self.heads["first"](feature)
        return [
            first,
            self.heads["second"](feature, first),
            *(self.heads[task](feature) for task in ("third", "fourth")),
        ]


@pytest.mark.parametrize("source", ["strength", "no strength"])
def test_heads_that_read_others(source: str) -> None:
    """Gradients go through both; what a step does for the reading one is not known, and told."""
    torch.manual_seed(2)
    model = Chained().double()
    attached = SaliencyRegularizer(model, heads="heads", strength=0.1 if source == "strength" else 0.0)
    report = relation_report(attached, **OPTIONS)
    slow = SlowReport(BINARY, decay=0.9, tag_every=2)
    for update in range(3):
        x, labels = data(update)
        model(x)
        if update:
            report.update(labels)
        else:
            with pytest.warns(UserWarning, match="heads that read outputs of others"):
                report.update(labels)
        attached()
        twin = Chained().double()
        twin.load_state_dict(model.state_dict())
        slow.steps.append(Step(feature_of(model, x), twin.from_feature, rows(labels)))
        changed(model, update)
    views = report.views()
    torch.testing.assert_close(views.matrices["gradient_cosine"], slow.gradient_cosine(), rtol=0, atol=1e-10)
    gains, expected = views.matrices["tag"], slow.tag()
    assert gains[1].isnan().all()
    torch.testing.assert_close(gains[[0, 2, 3]], expected[[0, 2, 3]], rtol=0, atol=1e-10)


def test_a_feature_map_that_heads_do_not_read_themselves() -> None:
    """Gradients are those at the map that was named; a step there is not followed."""
    torch.manual_seed(2)
    model = Form().double()
    attached = SaliencyRegularizer(model, heads="heads", feature="backbone.0", strength=0.1)
    report = relation_report(attached, **OPTIONS)
    slow = SlowReport(BINARY, decay=0.9, tag_every=2)
    x, labels = data(0)
    model(x)
    with pytest.warns(UserWarning, match="Name as feature= what the heads are called with"):
        report.update(labels)
    attached()
    twin = Form().double()
    twin.load_state_dict(model.state_dict())
    feature = model.backbone[0](x).detach()
    slow.steps.append(Step(feature, lambda map: twin.from_feature(twin.backbone[1](map)), rows(labels)))
    views = report.views()
    torch.testing.assert_close(views.matrices["gradient_cosine"], slow.gradient_cosine(), rtol=0, atol=1e-10)
    assert views.matrices["tag"].isnan().all()
