"""Which tensor is differentiated where heads read copies, ran before, or ran several times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.errors import CaptureError
from tests.support.zoo import Reverse

from .two_heads import Net, by_hand, found, rows

pytestmark = pytest.mark.usefixtures("float64")


def test_heads_that_read_copies() -> None:
    def copies(m: Any, x: Tensor) -> Any:
        feature = m.body(x)
        return [head(feature.clone()) for head in m.heads]

    def again(m: Any, x: Tensor) -> Any:
        return [head(m.body(x)) for head in m.heads]

    model, x = Net(rows), torch.randn(5, 3)
    expected = by_hand(model(x), model.meant)
    for between in (copies, again):
        model.between = between
        assert found(model, x) == pytest.approx([expected] * 3, abs=1e-12)
    model.between = lambda m, x: [head(m.body(x + place)) for place, head in enumerate(m.heads)]
    with pytest.raises(CaptureError, match="do not read the same tensor"):
        found(model, x)


@pytest.mark.parametrize("key", ["3", 3, "-1"])
def test_digit_keys_of_mappings(key: Any) -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Any:
            return {"other": x, key: self.layer(x)}

    def levels(m: Any, x: Tensor) -> Any:
        m.meant = m.enc(x)[key]
        return m.all(m.meant.tanh())

    model, x = Net(levels), torch.randn(5, 3)
    model.enc = Levels()
    expected = by_hand(model(x), model.meant)
    for surgery in (False, True):
        assert found(model, x, surgery=surgery, feature=f"enc:output.{key}") == pytest.approx([expected] * 3, abs=1e-12)
    model.enc.layer.requires_grad_(False)  # then it is replaced in the mapping
    assert found(model, x, feature=f"enc:output.{key}") == pytest.approx([expected] * 3, abs=1e-12)


def test_a_feature_under_no_grad() -> None:
    def probe(m: Any, x: Tensor) -> Any:
        with torch.no_grad():
            feature = m.body(x)
        return m.all(feature)

    model, x = Net(probe), torch.randn(5, 3)
    with pytest.raises(CaptureError, match=r"ran under no_grad.*Leave feature= out"):
        found(model, x, feature="body")
    assert min(found(model, x)) > 0

    def teacher(m: Any, x: Tensor) -> Any:  # the same module beside it
        m.meant = feature = m.body(x)
        with torch.no_grad():
            m.body(x + 1)
        return m.all(feature)

    model.between = teacher
    assert found(model, x, feature="body") == pytest.approx([by_hand(model(x), model.meant)] * 3, abs=1e-12)


def test_several_forwards_before_one_call() -> None:
    model, x = Net(rows), torch.randn(5, 3)
    regularizer = SaliencyRegularizer(model, heads="heads", strength=0.1, metric="l1")
    model(x)
    model(x)
    with pytest.warns(UserWarning, match=r"2 forwards ran before this call.*after each forward"):
        regularizer()
    model(x)
    model(x)
    regularizer()  # told once


@pytest.mark.parametrize("alone", [0, 1])
def test_parts_called_one_by_one_after_a_head_ran_alone(alone: int) -> None:
    model, x = Net(rows), torch.randn(5, 3)
    regularizer = SaliencyRegularizer(model, heads="heads", strength=1.0, metric="l1")
    model.heads[alone](model.body(x * 2))
    feature = model.body(x)
    outputs = [head(feature) for head in model.heads]
    assert regularizer().item() == pytest.approx(by_hand(outputs, feature), abs=1e-12)
    for scale, head in enumerate(model.heads, 1):
        head(feature * scale)
    with pytest.raises(CaptureError, match="do not read the same tensor"):
        regularizer()


def test_a_list_of_axes_under_surgery() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 5, 1)
            self.head = nn.Sequential(nn.Conv1d(5, 4, 1), nn.Tanh(), nn.Conv1d(4, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)).tanh())

    penalties = []
    for options in ({}, {"surgery": PCGrad()}):
        torch.manual_seed(0)
        model = Maps()
        regularizer = SaliencyRegularizer(
            model,
            heads="head",
            tasks=list("abc"),
            feature=["second", "first"],
            channel_axis=[1, 1],
            strength=1.0,
            **{"metric": "l1", **options},
        )
        loss = model(torch.randn(5, 3, 6)).square().mean()
        penalties.append(regularizer())
        (loss + penalties[-1]).backward()
    assert penalties[0].item() == pytest.approx(penalties[1].item(), abs=1e-12)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_one_tensor_named_twice_under_surgery(strength: float) -> None:
    def drop(m: Any, x: Tensor) -> Any:
        return m.all(m.drop(m.body(x)))

    model, x = Net(drop).eval(), torch.randn(5, 3)
    model.drop = nn.Dropout(0.5).eval()
    gradients, penalties = [], []
    for surgery in (None, lambda gramian: torch.ones(2)):
        model.zero_grad()
        with SaliencyRegularizer(
            model, heads="heads", feature=["body", "drop"], surgery=surgery, strength=strength, metric="l1"
        ) as regularizer:
            outputs = model(x)
            penalties.append(regularizer())
            (sum(output.square().mean() for output in outputs) + penalties[-1]).backward()
        gradients.append(model.body.weight.grad.clone())
    assert penalties[0].item() == pytest.approx(penalties[1].item(), abs=1e-12)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_tensors_without_a_saliency() -> None:
    texts = torch.nested.nested_tensor([torch.randn(3, 3), torch.randn(5, 3)], layout=torch.jagged)
    for feature in (None, "body"):
        with pytest.raises(CaptureError, match=r"nested \(jagged\).*Pad the batch"):
            found(Net(rows), texts, feature=feature)
    for feature in (None, "turn"):
        model = Net(lambda m, x: m.all(m.turn(torch.complex(m.body(x), m.body(x)))), [Real(), Real()])
        model.turn = nn.Tanh()
        with pytest.raises(CaptureError, match="is complex"):
            found(model, torch.randn(5, 3), feature=feature)


class Real(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.abs())


@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.parametrize("on_the_way", [Reverse.apply, lambda x: x.view_as(x)], ids=["reversed", "a view"])
def test_a_named_output_is_not_what_heads_make_of_its_memory(on_the_way: Any, surgery: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"backbone": nn.Linear(3, 4), "heads": nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])})
    options: dict[str, Any] = {"surgery": PCGrad()} if surgery else {}
    regularizer = SaliencyRegularizer(
        model, "heads", feature="backbone", strength=1.0, custom_backward="ignore", **{"metric": "l1", **options}
    )
    feature = on_the_way(model["backbone"](torch.randn(5, 3)))
    for head in model["heads"]:
        head(feature)
    rows = [head.weight[0] for head in model["heads"]]
    sign = -1 if on_the_way == Reverse.apply else 1
    extractor, found = regularizer._extractor, []
    extract = extractor.extract
    extractor.extract = lambda *args, **kwargs: found.append(extract(*args, **kwargs)) or found[0]
    torch.testing.assert_close(regularizer(), (rows[0] - rows[1]).abs().sum())
    torch.testing.assert_close(found[0].values[:, 0], sign * torch.stack(rows))
