"""Finding the heads in models as people write them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from saliency_reg.errors import HeadNotFoundError


class Attributes(nn.Module):
    """Heads as attributes, and a backbone with a ModuleList of blocks, which are no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.smiling_head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        self.young_head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.smiling_head(x), self.young_head(x)


class Dictionary(nn.Module):
    def __init__(self, name: str = "decoders") -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.name = name
        setattr(self, name, nn.ModuleDict({task: nn.Linear(4, 1) for task in ("depth", "normal", "edge")}))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.encoder(x)
        return {task: head(feature) for task, head in getattr(self, self.name).items()}


class PerTask(nn.Module):
    """A module per task, each with a head inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        for task in ("a", "b"):
            setattr(self, task, nn.ModuleDict({"norm": nn.Identity(), "out": nn.Linear(4, 1)}))

    def forward(self, x: Tensor) -> list[Tensor]:
        feature = self.shared(x)
        return [getattr(self, task)["out"](getattr(self, task)["norm"](feature)) for task in ("a", "b")]


def works(model: nn.Module, *args: object, **options: object) -> tuple[str, ...]:
    x = torch.randn(3, 4)
    with SaliencyRegularizer(model, *args, strength=1.0, **{"metric": "l1", **options}) as regularizer:
        model(x)
        assert regularizer() > 0
        return regularizer.tasks


@pytest.mark.parametrize(
    ("model", "heads", "options", "tasks"),
    [
        (Attributes(), None, {}, ("smiling_head", "young_head")),
        (Attributes(), ["smiling_head", "young_head"], {}, ("smiling_head", "young_head")),
        (Attributes(), "*_head", {"tasks": ["smiling", "young"]}, ("smiling", "young")),
        (Attributes(), {"old": "young_head", "smile": "smiling_head"}, {}, ("old", "smile")),
        (Dictionary(), None, {}, ("depth", "normal", "edge")),
        (Dictionary("outs"), None, {}, ("depth", "normal", "edge")),
        (Dictionary(), "decoders", {}, ("depth", "normal", "edge")),
        (Dictionary(), "decoders.*", {}, ("depth", "normal", "edge")),
        (Dictionary(), ["edge", "depth"], {}, ("edge", "depth")),
        (Dictionary(), ["decoders.depth", "decoders.edge"], {}, ("depth", "edge")),
        (PerTask(), "*.out", {}, ("a", "b")),
        (PerTask(), ["a.out", "b.out"], {}, ("a", "b")),
        (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)), "2", {}, ("0", "1", "2", "3", "4")),
        (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), None, {"tasks": list("xyz")}, ("x", "y", "z")),
    ],
)
def test_heads_are_found(model: nn.Module, heads: object, options: dict, tasks: tuple[str, ...]) -> None:
    assert works(model, heads, **options) == tasks


class MaskedAutoencoder(nn.Module):
    """Parts of one decoder are no heads, and neither are the branches of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.branch1, self.branch2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder_embed, self.decoder_norm = nn.Linear(4, 4), nn.LayerNorm(4)


def test_parts_of_a_backbone_are_not_taken_for_heads() -> None:
    with pytest.raises(HeadNotFoundError):
        SaliencyRegularizer(MaskedAutoencoder(), strength=0.1, metric="l1")


def test_modules() -> None:
    model = Dictionary()
    assert works(model, model.decoders) == ("depth", "normal", "edge")
    chosen = [model.decoders["edge"], model.decoders["depth"]]
    assert works(model, chosen) == ("edge", "depth")


def test_heads_outside_of_the_model() -> None:
    backbone, heads = nn.Linear(4, 4), [nn.Linear(4, 1), nn.Linear(4, 1)]
    regularizer = SaliencyRegularizer(backbone, heads, tasks=["a", "b"], strength=1.0, metric="l1")
    for _ in range(2):
        feature = backbone(torch.randn(3, 4))
        for head in heads:
            head(feature)
        assert regularizer() > 0


def test_heads_that_flatten_on_their_own_share_the_feature() -> None:
    model = Dictionary()
    regularizer = SaliencyRegularizer(model, "decoders", strength=1.0, metric="l1")
    feature = model.encoder(torch.randn(3, 2, 4)[:, :1])
    for head in model.decoders.values():
        head(feature.flatten(1))
    assert regularizer() > 0


@pytest.mark.parametrize("feature", ["encoder", "encoder:output"])
def test_a_named_feature_that_the_heads_read_directly(feature: str) -> None:
    assert works(Dictionary(), "decoders", feature=feature) == ("depth", "normal", "edge")


def test_the_input_of_a_module_as_feature() -> None:
    """The saliency at the input of the last block and at the output of the one before are the same."""
    torch.manual_seed(0)
    model, x, found = Attributes(), torch.randn(3, 4), []
    for feature in ("blocks.2:input", "blocks.1"):
        with SaliencyRegularizer(model, feature=feature, strength=1.0, metric="l1") as regularizer:
            model(x)
            found.append(regularizer())
    assert found[0] > 0
    hidden = torch.relu(model.blocks[1](torch.relu(model.blocks[0](x)))).detach().requires_grad_()
    last = torch.relu(model.blocks[2](hidden))
    by_hand = SaliencyRegularizer(None, tasks=["a", "b"], strength=1.0, metric="l1")(
        outputs=[model.smiling_head(last), model.young_head(last)], features=hidden
    )
    torch.testing.assert_close(found[0], by_hand)
    assert found[1] != found[0]  # before the ReLU


def test_an_in_place_operation_between_the_feature_and_the_heads() -> None:
    class InPlaceTrunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(4, 4)
            self.heads = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(2)])

        def forward(self, x: Tensor) -> list[Tensor]:
            feature = torch.relu_(self.backbone(x))
            return [head(feature) for head in self.heads]

    torch.manual_seed(0)
    model, x = InPlaceTrunk(), torch.randn(5, 4)
    regularizer = SaliencyRegularizer(model, "heads", feature="backbone", strength=1.0, metric="l1")
    model(x)
    penalty = regularizer()
    before_relu = model.backbone(x)
    read = before_relu.relu()
    expected = SaliencyRegularizer(None, tasks=["a", "b"], strength=1.0, metric="l1")(
        outputs=[head(read) for head in model.heads], features=before_relu
    )
    torch.testing.assert_close(penalty, expected)


def test_two_regularizers_on_different_heads() -> None:
    model = Dictionary()
    first = SaliencyRegularizer(model, ["depth", "normal"], strength=1.0, metric="l1")
    model.more = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    second = SaliencyRegularizer(model, "more", strength=1.0, metric="l1")
    feature = model.encoder(torch.randn(3, 4))
    for head in [*model.decoders.values(), *model.more]:
        head(feature)
    assert first() > 0
    assert second() > 0
    first.remove()
    for head in model.more:
        head(feature)
    assert second() > 0
    second.remove()
    assert "__getstate__" not in vars(model)
