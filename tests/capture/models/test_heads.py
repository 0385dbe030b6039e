"""Rows of docs/models.md on heads, with models written the way people write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer, task_distances
from saliency_reg.errors import CrossSampleError
from tests.support.attachment import uniform

from .support import TASKS, attached, mlp, sum_of_distances


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
    by_rows = SaliencyRegularizer(model, "fc", tasks=TASKS, strength=1.0, relations=uniform(3), metric="l1")
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
