"""One test for each row of the table in docs/models.md, on models written the way people write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency_reg import RelationWeights, SaliencyRegularizer, task_distances, task_saliencies
from saliency_reg.errors import CrossSampleError, SecondDerivativeError
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "models.md"
TASKS = ["age", "gender", "smile"]


def uniform(tasks: int) -> RelationWeights:
    return RelationWeights(tasks, "fixed", mass=float(tasks * (tasks - 1) // 2))


def sum_of_distances(outputs: Any, feature: Tensor, **options: Any) -> Tensor:
    """The penalty with strength 1 and weights 1, without hooks."""
    return task_distances(task_saliencies(outputs, feature, **options)).triu(1).sum()


def attached(model: nn.Module, *args: Any, tasks: int = 3, **options: Any) -> SaliencyRegularizer:
    return SaliencyRegularizer(model, *args, strength=1.0, relations=uniform(tasks), **options)


def mlp(inputs: int, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.GELU(), nn.Linear(8, outputs))


class BasicBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    """In the manner of torchvision: in-place ReLUs, average pooling, dropout, one classifier with many columns."""

    def __init__(self, num_classes: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(8), BasicBlock(8))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer1(self.relu(self.bn1(self.conv1(x))))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def test_shared_linear() -> None:
    """`fc` with a column per task, on the pooled vector: the closed form."""
    model = ResNet()
    regularizer = attached(model, "fc")
    model(torch.randn(4, 3, 16, 16))
    rows = model.fc.weight
    torch.testing.assert_close(regularizer(), task_distances(rows.unsqueeze(1)).triu(1).sum())
    assert "closed form" in regularizer.describe()


def test_shared_linear_behind_pooling() -> None:
    """The map before average pooling: summed over positions, it is the weight row again."""
    model = ResNet()
    regularizer = attached(model, "fc", feature="layer1")
    model(torch.randn(4, 3, 16, 16))
    torch.testing.assert_close(regularizer(), task_distances(model.fc.weight.unsqueeze(1)).triu(1).sum())


def test_dropout_before_a_shared_linear() -> None:
    """With dropout in between, the rows are those of the units that were kept, over (1 - p)."""
    torch.manual_seed(0)
    model = ResNet(dropout=0.5)
    masks: list[Tensor] = []
    model.dropout.register_forward_hook(lambda m, args, out: masks.append((out != 0) | (args[0] == 0)))
    regularizer = attached(model, "fc", feature="dropout:input")
    model(torch.randn(6, 3, 16, 16))
    expected = task_distances(model.fc.weight.unsqueeze(1) * masks[0] / 0.5).triu(1).sum()
    torch.testing.assert_close(regularizer(), expected)
    assert not masks[0].all()


def test_several_columns_for_each_task() -> None:
    torch.manual_seed(0)
    model, x = ResNet(num_classes=12), torch.randn(6, 3, 16, 16)
    groups = {task: slice(4 * index, 4 * index + 4) for index, task in enumerate(TASKS)}
    regularizer = attached(model, "fc", columns=groups)
    model(x)
    penalty = regularizer()
    model.fc = nn.Sequential(model.fc, nn.Unflatten(1, (3, 4)))  # the same, [B, T, K]
    regularizer.remove()
    by_rows = SaliencyRegularizer(model, "fc", tasks=TASKS, strength=1.0, relations=uniform(3))
    logits = model(x)
    assert logits.shape == (6, 3, 4)
    torch.testing.assert_close(by_rows(), penalty)
    model.fc = model.fc[0]
    feature = model.avgpool(model.forward_features(x)).flatten(1).detach().requires_grad_()
    torch.testing.assert_close(penalty, sum_of_distances(list(model.fc(feature).split(4, dim=1)), feature))


def test_branches_of_several_modules() -> None:
    class SharedBottom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bottom = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
            self.towers = nn.ModuleList([mlp(6, 4) for _ in TASKS])
            self.last = nn.ModuleList([nn.Linear(4, 1) for _ in TASKS])

        def forward(self, x: Tensor) -> list[Tensor]:
            shared = self.bottom(x)
            return [last(tower(shared).tanh()) for tower, last in zip(self.towers, self.last)]

    torch.manual_seed(0)
    model, x = SharedBottom(), torch.randn(7, 5)
    regularizer = attached(model, {task: [f"towers.{i}", f"last.{i}"] for i, task in enumerate(TASKS)})
    model(x)
    penalty = regularizer()
    regularizer.remove()
    feature = model.bottom(x).detach().requires_grad_()
    outputs = [last(tower(feature).tanh()) for tower, last in zip(model.towers, model.last)]
    torch.testing.assert_close(penalty, sum_of_distances(outputs, feature))


def test_methods_instead_of_a_module() -> None:
    """`forward_features` and `forward_head` called by the training loop, never the model itself."""
    model = ResNet().eval()
    regularizer = attached(model, "fc", feature="layer1")
    x = torch.randn(4, 3, 16, 16)
    for _ in range(2):
        feature = model.forward_features(x)
        outputs = model.forward_head(feature)
        torch.testing.assert_close(regularizer(), sum_of_distances(outputs.unbind(1), feature))


class MultiTaskNet(nn.Module):
    """Encoder and decoders in a dictionary, as in common multi-task code bases."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.decoders = nn.ModuleDict(
            {
                "segmentation": nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 13, 1)),
                "depth": nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 1, 1)),
                "normal": nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 1)),
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.encoder(x)
        return {task: decoder(feature) for task, decoder in self.decoders.items()}


def test_dense_decoders() -> None:
    model = MultiTaskNet()
    regularizer = attached(model)
    x = torch.randn(2, 3, 6, 6)
    model(x)
    penalty = regularizer()
    feature = model.encoder(x)
    outputs = {task: decoder(feature) for task, decoder in model.decoders.items()}
    torch.testing.assert_close(penalty, sum_of_distances(outputs, feature))


class Output(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass
class HeadOutput:
    logits: Tensor
    attention: Tensor | None = None


class StructuredHead(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers, self.kind = mlp(6), kind

    def forward(self, feature: Tensor) -> Any:
        logits = self.layers(feature)
        return {
            "tuple": (feature, logits),
            "named tuple": Output(logits, feature),
            "dict": {"logits": logits, "hidden": feature},
            "dataclass": HeadOutput(logits),
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("tuple", 1),
        ("named tuple", "logits"),
        ("dict", "logits"),
        ("dataclass", "logits"),
        ("dict", lambda out: out["logits"]),
    ],
)
def test_structured_outputs(kind: str, part: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"backbone": nn.Linear(5, 6), "heads": nn.ModuleDict({t: StructuredHead(kind) for t in TASKS})}
    )
    regularizer = attached(model, "heads", output=part)
    feature = model["backbone"](torch.randn(4, 5))
    for head in model["heads"].values():
        head(feature)
    outputs = [head.layers(feature) for head in model["heads"].values()]
    torch.testing.assert_close(regularizer(), sum_of_distances(outputs, feature))


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


class LSTMHead(nn.Module):
    """A head that is itself recurrent."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(tokens)[0][:, -1])


def test_lstm_heads() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(5, 6), "heads": nn.ModuleList([LSTMHead() for _ in range(3)])})
    regularizer = attached(model, "heads")
    feature = model["backbone"](torch.randn(3, 4, 5))
    outputs = [head(feature) for head in model["heads"]]
    penalty = regularizer()
    torch.testing.assert_close(penalty, sum_of_distances([head(feature) for head in model["heads"]], feature))
    (sum(output.mean() for output in outputs) + penalty).backward()


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


class SoftSharing(nn.Module):
    """A whole network per task on the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({task: mlp(5) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {task: tower(x) for task, tower in self.towers.items()}


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


def test_heads_that_begin_in_place() -> None:
    """One may: autograd itself refuses a second one on the same tensor. Later heads read what it wrote, as without us."""
    torch.manual_seed(0)
    heads = [nn.Sequential(nn.ReLU(inplace=True), mlp(6)), *(nn.Sequential(nn.ReLU(), mlp(6)) for _ in range(2))]
    model = nn.ModuleDict({"backbone": nn.Linear(5, 6), "heads": nn.ModuleList(heads)})
    regularizer = attached(model, "heads")
    x = torch.randn(4, 5)
    feature = model["backbone"](x)
    outputs = [head(feature) for head in model["heads"]]
    penalty = regularizer()
    fresh = model["backbone"](x)
    torch.testing.assert_close(penalty, sum_of_distances([head[1](fresh.relu()) for head in heads], fresh))
    (sum(output.mean() for output in outputs) + penalty).backward()


def test_tied_weights() -> None:
    heads = [mlp(6) for _ in range(3)]
    heads[1][2].weight = heads[0][2].weight
    model = nn.ModuleDict({"backbone": nn.Linear(5, 6), "heads": nn.ModuleList(heads)})
    regularizer = attached(model, "heads")
    feature = model["backbone"](torch.randn(4, 5))
    for head in heads:
        head(feature)
    penalty = regularizer()
    expected = sum_of_distances([head(feature) for head in heads], feature)
    torch.testing.assert_close(penalty, expected)
    parameters = list(model["heads"].parameters())
    for ours, theirs in zip(
        torch.autograd.grad(penalty, parameters, allow_unused=True, retain_graph=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
    ):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_two_forwards_before_one_backward() -> None:
    """As with two views of each image: a call after each forward, and one backward."""
    model = SoftSharing()
    regularizer = attached(model)
    first, second = torch.randn(4, 5), torch.randn(4, 5)
    losses = []
    for view in (first, second):
        outputs = model(view)
        losses.append(sum(output.square().mean() for output in outputs.values()) + regularizer())
    sum(losses).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for view in (first, second):
        outputs = model(view)
        (sum(output.square().mean() for output in outputs.values()) + regularizer()).backward()
    for ours, parameter in zip(found, model.parameters()):
        torch.testing.assert_close(ours, parameter.grad)


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


class BatchNormHead(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 1))


def test_batch_norm_in_heads() -> None:
    """Its statistics are constants in the derivative; on request a warning, an error, or neither."""

    def build(**options: Any) -> tuple[nn.ModuleDict, Callable[[], Tensor]]:
        heads = nn.ModuleList([BatchNormHead() for _ in range(3)])
        model = nn.ModuleDict({"backbone": nn.Linear(5, 6), "heads": heads})
        regularizer = attached(model, "heads", **options)

        def run() -> Tensor:
            feature = model["backbone"](torch.randn(8, 5))
            for head in heads:
                head(feature)
            return regularizer()

        return model, run

    build()[1]()  # warnings are errors here
    _, run = build(cross_sample="warn")
    with pytest.warns(UserWarning, match="BatchNorm in train mode") as caught:
        run()
    assert caught[0].filename == __file__
    run()  # told once
    _, run = build(cross_sample="error")
    for _ in range(2):
        with pytest.raises(CrossSampleError, match="use LayerNorm or GroupNorm"):
            run()
    build(cross_sample="ignore")[1]()
    model, run = build(cross_sample="error")
    model.eval()
    run()


def test_batch_norm_between_feature_and_heads() -> None:
    model = ResNet()
    regularizer = attached(model, "fc", feature="bn1")
    model(torch.randn(4, 3, 16, 16))
    regularizer()
    regularizer.remove()
    regularizer = attached(model, "fc", feature="bn1", cross_sample="warn")
    model(torch.randn(4, 3, 16, 16))
    with pytest.warns(UserWarning, match="choose a feature map behind it"):
        regularizer()


def test_checkpointed_backbone() -> None:
    class Checkpointed(SoftSharing):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return super().forward(checkpoint(self.backbone, x, use_reentrant=False))

    model = Checkpointed()
    regularizer = attached(model)
    x = torch.randn(4, 5)
    (sum(output.mean() for output in model(x).values()) + regularizer()).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    feature = model.backbone(x)
    outputs = {task: tower(feature) for task, tower in model.towers.items()}
    regularizer.enabled = False
    (sum(output.mean() for output in outputs.values()) + sum_of_distances(outputs, feature)).backward()
    for ours, parameter in zip(found, model.parameters()):
        torch.testing.assert_close(ours, parameter.grad)


def test_partially_labelled_batches() -> None:
    """The saliency of the output needs no labels; that of the loss takes per-sample losses, 0 where there is none."""
    torch.manual_seed(0)
    model, x = SoftSharing(), torch.randn(6, 5)
    labels = torch.randint(2, (6, 3)).float()
    known = torch.rand(6, 3) < 0.5
    known[:, 2] = False  # a task without any label in this batch
    regularizer = attached(model, target="loss")
    outputs = model(x)
    losses = {
        task: nn.functional.binary_cross_entropy_with_logits(output[:, 0], labels[:, t], reduction="none") * known[:, t]
        for t, (task, output) in enumerate(outputs.items())
    }
    penalty = regularizer(losses=losses)
    assert regularizer.report is not None
    leaf = x.clone().requires_grad_()
    fresh = model(leaf)
    rows = []
    for t, task in enumerate(TASKS):
        error = torch.sigmoid(fresh[task][:, :1]) - labels[:, t : t + 1]
        (gradient,) = torch.autograd.grad(fresh[task].sum(), leaf, retain_graph=True)
        rows.append(gradient * error * known[:, t : t + 1])
    torch.testing.assert_close(penalty, task_distances(torch.stack(rows)).triu(1).sum())
    (sum(loss.sum() for loss in losses.values()) + penalty).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:no backward pass has reached")
def test_many_tasks_are_sampled_without_bias() -> None:
    """The mean over draws is the penalty of all pairs, and the draw leaves the global generator alone."""
    torch.manual_seed(0)
    heads = nn.ModuleList([mlp(6) for _ in range(7)])
    backbone = nn.Linear(5, 6)
    tasks = [str(task) for task in range(7)]
    feature = backbone(torch.randn(4, 5))
    relations = RelationWeights(7, "fixed", matrix=(lambda m: m.triu(1) + m.triu(1).T)(torch.rand(7, 7)))
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    outputs = [head(feature) for head in heads]
    state = torch.get_rng_state()
    sampled = SaliencyRegularizer(None, tasks=tasks, strength=1.0, relations=relations, max_tasks_per_step=3)
    for _ in range(1500):
        found[True].append(sampled(outputs=outputs, features=feature).detach())
        sampled.step()
    assert torch.equal(torch.get_rng_state(), state)
    whole = SaliencyRegularizer(None, tasks=tasks, strength=1.0, relations=relations)
    expected = float(whole(outputs=outputs, features=feature).detach())
    values = torch.stack(found[True])
    assert float(values.mean()) == pytest.approx(expected, abs=4 * float(values.std()) / 1500**0.5)
    assert float(values.std()) > 0.01 * expected
    again = SaliencyRegularizer(None, tasks=tasks, strength=1.0, relations=relations, max_tasks_per_step=3)
    again.load_state_dict(sampled.state_dict())
    assert torch.equal(again(outputs=outputs, features=feature), sampled(outputs=outputs, features=feature))


def test_the_page_names_these_tests() -> None:
    named = set(re.findall(r"`([\w/]+)\.py::(test_\w+)`", PAGE.read_text()))
    here = {name for name in globals() if name.startswith("test_")} - {"test_the_page_names_these_tests"}
    assert here == {name for file, name in named if file == "capture/test_models"}
    assert len(named) > len(here) + 10
    assert all(hasattr(import_module(f"tests.{file.replace('/', '.')}"), name) for file, name in named)
