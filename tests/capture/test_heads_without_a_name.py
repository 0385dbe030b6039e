"""What is found where no heads are named, and what errors propose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from saliency_reg.errors import AmbiguousHeadsError, CaptureError, ConfigurationError, HeadNotFoundError, NoHeadRanError

from .heads import TASKS, Named, Towers, chain


class Branches(nn.Module):
    """Dictionaries that are no heads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        if kind == "hidden":
            self.out = nn.Linear(12, 2)
            self.scales = nn.ModuleDict({name: chain(6, 6).append(nn.GELU()) for name in ("fine", "coarse")})
        elif kind == "read":
            self.scales = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("fine", "coarse")})
            self.out = nn.Linear(12, 2)
        elif kind == "embeddings":
            self.tables = nn.ModuleDict({name: nn.Embedding(3, 4) for name in ("user", "item")})
        elif kind == "a forward of its own":
            self.layers = Layers({name: nn.Linear(6, 6) for name in ("first", "second")})
        else:
            self.a, self.b = (nn.ModuleDict({"hidden": nn.Linear(6, 6), "out": nn.Linear(6, 1)}) for _ in "ab")


class Layers(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", ["hidden", "read", "embeddings", "a forward of its own", "parts of each task"])
def test_dictionaries_that_are_no_heads(kind: str) -> None:
    with pytest.raises(HeadNotFoundError, match="its children, the last first: .*'stem' with 6 outputs.*Pass heads="):
        SaliencyRegularizer(Branches(kind), strength=0.1, metric="l1")


def test_stages_of_a_decoder_are_no_heads() -> None:
    stages = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 1, 1)])
    with pytest.raises(HeadNotFoundError):
        SaliencyRegularizer(
            nn.ModuleDict({"encoder": nn.Conv2d(3, 8, 1), "decoders": stages}), strength=0.1, metric="l1"
        )


def test_ambiguous_heads_are_described() -> None:
    model = Towers()
    model.last_heads, model.last = model.last, nn.Identity()
    with pytest.raises(AmbiguousHeadsError) as caught:
        SaliencyRegularizer(model, strength=0.1, metric="l1")
    text = str(caught.value)
    assert "'towers' (3 modules: 'towers.0', 'towers.1', 'towers.2'; 5 inputs and 6 outputs each; hidden layers" in text
    assert "that run before 'last_heads'" in text
    assert "6 inputs and 1 output each" in text
    assert "['towers.0', 'last_heads.0']" in text


class Experts(nn.Module):
    """Each head reads a mixture of its own."""

    def __init__(self, bottom: bool = True) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict({"linear": nn.Linear(4, 5)}) if bottom else nn.Identity()
        self.bottom = nn.Sequential(nn.Linear(5 if bottom else 4, 5), nn.Tanh())
        self.experts = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.gates = nn.ModuleList([nn.Linear(5, 3) for _ in TASKS])
        self.heads = nn.ModuleList([nn.Linear(5, 1) for _ in TASKS])

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.bottom(self.embedding["linear"](x) if isinstance(self.embedding, nn.ModuleDict) else x)
        experts = torch.stack([expert(hidden) for expert in self.experts], 1)
        return [
            head((gate(hidden).softmax(1).unsqueeze(2) * experts).sum(1)) for gate, head in zip(self.gates, self.heads)
        ]


def test_what_all_heads_depend_on_is_listed_nearest_first() -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(3, 4)
    with SaliencyRegularizer(model, "heads", strength=0.1, metric="l1") as regularizer:
        model(x)
        with pytest.raises(CaptureError) as caught:
            regularizer()
    listed = "'experts.0' to 'experts.2', 'bottom', 'embedding.linear' (the nearest first): pass feature='bottom'"
    assert listed in str(caught.value)
    with SaliencyRegularizer(
        model, "heads", feature="bottom", strength=0.1, metric="l1"
    ) as regularizer:  # what it says works
        model(x)
        assert regularizer() > 0


@pytest.mark.parametrize(
    ("make", "heads", "listed"),
    [
        (Towers, "last", "'bottom' (the nearest first): pass feature='bottom'"),
        (Named, "out_*", "'bottom' (the nearest first): pass feature='bottom'"),
        (
            lambda: Experts(False),
            "heads",
            "'experts.0' to 'experts.2', 'bottom' (the nearest first): pass feature='bottom'",
        ),
    ],
)
def test_what_is_listed_for_other_models(make: Any, heads: str, listed: str) -> None:
    model = make()
    regularizer = SaliencyRegularizer(model, heads, strength=0.1, metric="l1")
    model(torch.randn(3, 4))
    with pytest.raises(CaptureError) as caught:
        regularizer()
    assert listed in str(caught.value)


class Predictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sigmoid()

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_methods_of_heads_are_told_of() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(4, 5), "predictor": Predictor()})
    regularizer = SaliencyRegularizer(model, "predictor", strength=0.1, metric="l1")
    model["predictor"].logits(model["backbone"](torch.randn(3, 4)))
    with pytest.raises(
        CaptureError, match=r"'predictor' itself, name the modules in it that are called: heads='predictor.net'\."
    ):
        regularizer()
    with SaliencyRegularizer(model, "predictor.net", strength=0.1, metric="l1") as inner:
        model["predictor"].logits(model["backbone"](torch.randn(3, 4)))
        assert inner() > 0


def test_methods_of_heads_in_a_forward_are_told_of() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.heads = nn.Linear(4, 5), nn.ModuleDict({task: Predictor() for task in TASKS})

        def forward(self, x: Tensor) -> list[Tensor]:
            return [head.logits(self.backbone(x)) for head in self.heads.values()]

    model = Net()
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    model(torch.randn(3, 4))
    with pytest.raises(
        NoHeadRanError, match=r"'heads.a' itself.*called: heads=\{'a': 'heads.a.net', 'b': 'heads.b.net', 'c'"
    ):
        regularizer()


@pytest.mark.parametrize("whole", [True, False])
def test_what_can_be_compiled_is_named(whole: bool) -> None:
    model = nn.Module()
    model.stem, model.blocks, model.fc = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5)), nn.Linear(5, 3)
    if whole:
        compiled: nn.Module = torch.compile(model, backend="eager")
    else:
        compiled = model
        model.fc.compile(backend="eager")
    with pytest.raises(
        ConfigurationError, match=r"model.stem.compile\(\), model.blocks.compile\(\)\. If all heads are Linear"
    ):
        SaliencyRegularizer(compiled, "fc", strength=0.1, metric="l1")
