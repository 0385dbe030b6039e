"""Rows of docs/models.md on feature maps, with models written the way people write them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import task_distances, task_saliencies
from saliency_reg.errors import SecondDerivativeError

from .support import TASKS, SoftSharing, attached, mlp, sum_of_distances


class RecurrentTagger(nn.Module):
    """An LSTM encoder that returns a tuple, and a head per task on all its states."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(5, 6, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.heads = nn.ModuleDict({task: mlp(6) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states, _ = self.encoder(x)
        states = self.norm(states)
        return {task: head(states) for task, head in self.heads.items()}


@pytest.mark.parametrize("frozen", [False, True])
def test_part_of_a_backbone_output(frozen: bool) -> None:
    """`encoder:output.0` is the first item of what the LSTM returns; behind a frozen one it is made to require grad."""
    model = RecurrentTagger()
    model.encoder.requires_grad_(not frozen)
    regularizer = attached(model, "heads", feature="encoder:output.0")
    x = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    model(x)
    penalty = regularizer(mask=mask)
    states = model.encoder(x)[0].detach().requires_grad_()
    outputs = {task: head(model.norm(states)) for task, head in model.heads.items()}
    torch.testing.assert_close(penalty, sum_of_distances(outputs, states, mask=mask))
    penalty.backward()
    assert model.norm.weight.grad is not None
    assert (model.encoder.weight_ih_l0.grad is None) == frozen


class Pyramid(nn.Module):
    """Heads that read two maps of different size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer3 = nn.Conv2d(3, 4, 3, padding=1)
        self.layer4 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.heads = nn.ModuleDict({task: mlp(10) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = torch.tanh(self.layer3(x))
        high = torch.tanh(self.layer4(low))
        joined = torch.cat([low.mean((2, 3)), high.mean((2, 3))], 1)
        return {task: head(joined) for task, head in self.heads.items()}


def test_several_features() -> None:
    """The saliencies of all maps side by side: [T, B, C1 + C2]."""
    model = Pyramid()
    regularizer = attached(model, "heads", feature=["layer3", "layer4"])
    x = torch.randn(3, 3, 8, 8)
    model(x)
    penalty = regularizer()
    low = model.layer3(x)
    high = model.layer4(torch.tanh(low))
    joined = torch.cat([torch.tanh(low).mean((2, 3)), torch.tanh(high).mean((2, 3))], 1)
    outputs = {task: head(joined) for task, head in model.heads.items()}
    both = torch.cat([task_saliencies(outputs, low), task_saliencies(outputs, high)], 2)
    torch.testing.assert_close(penalty, task_distances(both).triu(1).sum())


def test_soft_sharing() -> None:
    """The model's own input is the feature, although it does not require grad."""
    model = SoftSharing()
    regularizer = attached(model)
    x = torch.randn(4, 5)
    model(x)
    penalty = regularizer()
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(penalty, sum_of_distances(model(leaf), leaf))
    assert x.grad is None
    assert not x.requires_grad


class VisionTransformer(nn.Module):
    """Patch tokens with a class token, a final norm, and heads on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(8)
        self.heads = nn.ModuleDict({task: mlp(8) for task in TASKS})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        tokens = self.norm(self.blocks(tokens))
        return {task: head(tokens[:, 0]) for task, head in self.heads.items()}


def test_transformer_tokens() -> None:
    """Behind the last attention layer, tokens [B, L, D] are a feature map like any other."""
    model = VisionTransformer()
    regularizer = attached(model, "heads", feature="norm")
    model(torch.randn(3, 3, 8, 8))
    penalty = regularizer()
    assert regularizer.report is not None
    assert "[3, 5, 8]" in regularizer.describe()
    penalty.backward()
    assert model.patch_embed.weight.grad.any()


def test_attention_between_feature_and_outputs() -> None:
    """Fused attention has no second derivative: the error names the task and the way out, which works."""
    model = VisionTransformer()
    regularizer = attached(model, "heads", feature="blocks.layers.0")
    images = torch.randn(3, 3, 8, 8)
    model(images)
    with pytest.raises(
        SecondDerivativeError, match=r"output of task 'age' has no second derivative: .*SDPBackend.MATH"
    ):
        regularizer()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = model(images)
    (sum(output.mean() for output in outputs.values()) + regularizer()).backward()


class ChannelsLast(nn.Module):
    """Maps [B, H, W, C] and Linear layers, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Linear(3, 6)
        self.heads = nn.ModuleDict({task: mlp(6, 2) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = torch.tanh(self.stage(x))
        return {task: head(feature) for task, head in self.heads.items()}


def test_channels_last() -> None:
    model = ChannelsLast()
    regularizer = attached(model, "heads", channel_axis=-1)
    x = torch.randn(2, 4, 5, 3)
    outputs = model(x)
    penalty = regularizer()
    feature = torch.tanh(model.stage(x)).detach()
    expected = 0.0
    for i, first in enumerate(TASKS):
        for second in TASKS[i + 1 :]:
            for b in range(2):
                saliencies = []
                for task in (first, second):
                    one = feature[b].clone().requires_grad_()
                    logits = model.heads[task](one)
                    scalar = (logits[..., 1] - logits[..., 0]).sum()
                    saliencies.append(torch.autograd.grad(scalar, one)[0].sum((0, 1)))
                expected += (saliencies[0] - saliencies[1]).abs().sum() / 2
    torch.testing.assert_close(penalty.detach(), expected)
    assert outputs["age"].shape == (2, 4, 5, 2)


def test_conv1d_maps() -> None:
    """[B, C, L]: say channel_axis=1, since [B, L, C] is the default for three axes."""
    model = nn.ModuleDict(
        {
            "backbone": nn.Conv1d(2, 6, 3),
            "heads": nn.ModuleList(
                [nn.Sequential(nn.Conv1d(6, 4, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(1)) for _ in range(3)]
            ),
        }
    )
    with torch.no_grad():
        for head in model["heads"]:
            head(torch.zeros(1, 6, 8))
    regularizer = attached(model, "heads", channel_axis=1, pool="mean")
    feature = model["backbone"](torch.randn(3, 2, 10))
    outputs = [head(feature) for head in model["heads"]]
    expected = sum_of_distances(outputs, feature, channel_axis=1, pool="mean")
    torch.testing.assert_close(regularizer(), expected)
