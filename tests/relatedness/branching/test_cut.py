"""Where backbones are cut, and that the stages are the backbone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saliency_reg import BackboneCutError, ModuleNotFoundInModelError, WrongTypeError
from saliency_reg.relatedness.branching import Stage, cut

from .models import BACKBONES, STAGES, nested


def chained(stages: Sequence[Stage], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage.module(x)
    return x


@pytest.mark.parametrize("name", BACKBONES)
def test_the_stages_are_the_backbone(name: str) -> None:
    torch.manual_seed(0)
    backbone, x = BACKBONES[name]()
    modes = [module.training for module in backbone.modules()]
    before = copy.deepcopy(backbone.state_dict())
    stages = cut(backbone, x)
    assert [stage.name for stage in stages] == STAGES[name]
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    owned = [parameter for stage in stages for parameter in stage.module.parameters()]
    assert {id(one) for one in owned} == {id(one) for one in backbone.parameters()}
    assert len({id(one) for one in owned}) == len(owned)
    names = {f for stage in stages for f, _ in stage.module.named_parameters()}
    assert names == {f for f, _ in backbone.named_parameters()}
    other = torch.randn_like(x)[:1]
    backbone.eval()
    assert torch.equal(chained(stages, other), backbone(other))


@pytest.mark.parametrize("name", BACKBONES)
def test_training_is_that_of_the_backbone(name: str) -> None:
    torch.manual_seed(0)
    backbone, x = BACKBONES[name]()
    twin = copy.deepcopy(backbone)
    stages = cut(backbone, x)
    x = torch.cat([x, x + 1])
    results = []
    for run, parts in ((twin, twin), (lambda x: chained(stages, x), backbone)):
        output = run(x)
        results.append(
            [output, *torch.autograd.grad(output.square().sum(), list(parts.parameters())), *parts.buffers()]
        )
    for one, other in zip(*results):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["plain", "timm vit", "timm convnext"])
def test_copies_and_pickles_have_the_order_of_parameters(name: str) -> None:
    backbone, x = BACKBONES[name]()
    stages = cut(backbone, x)
    for stage in stages:
        names = [name for name, _ in stage.module.named_parameters()]
        for other in (copy.deepcopy(stage.module), pickle.loads(pickle.dumps(stage.module))):
            assert [name for name, _ in other.named_parameters()] == names


def test_poolings_of_vgg16_are_the_published_ones() -> None:
    layers: list[nn.Module] = []
    inputs = 3
    for convolutions in (2, 2, 3, 3, 3):
        for _ in range(convolutions):
            layers += [nn.Conv2d(inputs, 2, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = 2
        layers.append(nn.MaxPool2d(2))
    backbone = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4))
    costs = [2**stage.poolings_above for stage in cut(backbone, torch.zeros(1, 3, 32, 32))]
    assert costs == [
        32,
        32,
        16,
        16,
        8,
        8,
        8,
        4,
        4,
        4,
        2,
        2,
        2,
        1,
        1,
    ]  # over 64, for CelebA, in the scripts of the paper


def test_odd_sides_count_as_halved() -> None:
    layers = [nn.Conv2d(1, 1, 3, stride=2, padding=1) for _ in range(4)]
    stages = cut(nn.Sequential(*layers), torch.zeros(1, 1, 56, 56))  # 28, 14, 7, 4
    assert [stage.poolings_above for stage in stages] == [3, 2, 1, 0]


class Block(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=inplace)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(self.act(x)))


class Net(nn.Module):
    """Runs a function of its own between modules."""

    def __init__(self, between: str = "") -> None:
        super().__init__()
        self.stem, self.block, self.top = nn.Linear(4, 4), Block(), nn.Linear(4, 4)
        self.between = between

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Any:
        h = self.stem(x)
        if mask is not None:
            h = h * mask
        if self.between == "dropout":
            h = F.dropout(h, 0.5, training=self.training)
        elif self.between == "values" and h.sum() > 0:
            h = -h
        elif self.between == "noise":
            h = h + torch.rand(())
        h = self.block(h * scale)
        h = F.relu(self.top(h))
        return (h, None) if self.between == "tuple" else h


def test_functions_between_modules_and_other_arguments() -> None:
    backbone, x = Net(), torch.randn(3, 4)
    stages = cut(backbone, x)
    assert [stage.name for stage in stages] == ["stem", "block", "top"]
    assert torch.equal(chained(stages, x), backbone(x))


class TestNamedCuts:
    def test_after_these_modules_only(self) -> None:
        backbone, x = nested()
        assert [stage.name for stage in cut(backbone, x, ["middle"])] == ["stem..middle", "top"]
        assert [stage.name for stage in cut(backbone, x, [])] == ["stem..top"]
        stages = cut(backbone, x, ["middle", "stem"])
        assert [stage.name for stage in stages] == ["stem", "middle", "top"]

    def test_within_a_part(self) -> None:
        backbone = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
        stages = cut(backbone, torch.randn(2, 4), ["1.1"])
        assert [[*stage.module.state_dict()] for stage in stages] == [
            ["0.weight", "0.bias", "1.0.weight", "1.0.bias"],
            ["1.2.weight", "1.2.bias"],
        ]

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("block.act", "2 tensors are handed on there"),
            ("block.one", "2 tensors are handed on there"),
            ("top", "there are no weights behind it"),
        ],
    )
    def test_where_it_cannot_be(self, name: str, words: str) -> None:
        with pytest.raises(BackboneCutError) as caught:
            cut(Net(), torch.zeros(1, 4), [name])
        assert words in str(caught.value)
        assert "It can be cut after 'stem', 'block'." in str(caught.value)

    def test_unknown(self) -> None:
        with pytest.raises(ModuleNotFoundInModelError, match="'layer9'.*It can be cut after 'stem', 'block'"):
            cut(Net(), torch.zeros(1, 4), ["layer9"])
        with pytest.raises(WrongTypeError, match="list of module names"):
            cut(Net(), torch.zeros(1, 4), "stem")

    def test_never_called(self) -> None:
        backbone = Net()
        backbone.unused = nn.Linear(1, 1)
        with pytest.raises(BackboneCutError, match="its forward does not call it"):
            cut(backbone, torch.zeros(1, 4), ["unused"])


class TestBackbonesThatCannot:
    @pytest.mark.parametrize(
        ("between", "words"),
        [
            ("dropout", "does other things in train mode"),
            ("values", "depends on more than its modules.*they are stem, block, top"),
            ("tuple", "returns a tuple"),
            ("noise", "do not give its output on the example"),
        ],
    )
    def test_by_what_is_between(self, between: str, words: str) -> None:
        with pytest.raises(BackboneCutError, match=words):
            cut(Net(between), torch.zeros(1, 4))

    def test_one_residual_block(self) -> None:
        with pytest.raises(BackboneCutError, match="Block has no place where it can be cut"):
            cut(Block(), torch.zeros(1, 4))
        assert len(cut(Block(), torch.zeros(1, 4), [])) == 1

    def test_tied_weights_stay_in_one_stage(self) -> None:
        layers = [nn.Linear(4, 4) for _ in range(4)]
        layers[2].weight = layers[1].weight
        x = torch.randn(2, 4)
        assert [stage.name for stage in cut(nn.Sequential(*layers), x)] == ["0", "1..2", "3"]
        with pytest.raises(BackboneCutError, match="share weights"):
            cut(nn.Sequential(*layers), x, ["1"])

    def test_input_changed_in_place_stays_in_one_stage(self) -> None:
        x = torch.randn(2, 4)
        backbone = nn.Sequential(nn.Linear(4, 4), Block(), Block(inplace=True), Block())
        assert [stage.name for stage in cut(backbone, x)] == ["0", "1..2", "3"]
        with pytest.raises(BackboneCutError, match="cannot be cut after '1'.*in place"):
            cut(backbone, x, ["1"])
        before = x.clone()
        with pytest.raises(BackboneCutError, match="at its beginning.*in place"):
            cut(nn.Sequential(Block(inplace=True), Block()), x)
        assert torch.equal(x, before)

    def test_checkpointing_and_hooks_that_would_be_lost(self) -> None:
        timm = pytest.importorskip("timm")
        resnet = timm.create_model("resnet18", num_classes=0)
        resnet.set_grad_checkpointing()
        with pytest.raises(BackboneCutError, match="grad_checkpointing"):
            cut(resnet, torch.zeros(1, 3, 32, 32))
        hooked = Net()
        hooked.register_forward_hook(lambda *_: None)
        with pytest.raises(BackboneCutError, match="hooks on Net"):
            cut(hooked, torch.zeros(1, 4))

    def test_not_a_module_or_no_example(self) -> None:
        with pytest.raises(WrongTypeError, match="backbone must be"):
            cut("resnet18", torch.zeros(1, 4))
        with pytest.raises(WrongTypeError, match="example must be"):
            cut(Net(), (1, 4))
