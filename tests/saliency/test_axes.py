"""Which axis of a feature map has the channels, and which the samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer, errors, task_distances, task_saliencies

from .support import Behind, Net, by_sample, called, mlp

pytestmark = pytest.mark.usefixtures("float64")

CHANNELS_SECOND: dict[str, nn.Module] = {
    "convolution": nn.Sequential(nn.Conv1d(2, 6, 3), nn.GELU(), nn.Dropout()),
    "batch norm": nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU()),
    "group norm": nn.Sequential(nn.Conv1d(2, 6, 3), nn.GroupNorm(2, 6)),
    "pooled": nn.Sequential(nn.Conv1d(2, 6, 3), nn.MaxPool1d(2)),
    "transposed twice": nn.Sequential(
        nn.Conv1d(2, 6, 3), Behind(nn.Identity(), lambda z: nn.functional.layer_norm(z.mT, (6,)).mT)
    ),
    "joined positions": nn.Sequential(nn.Unflatten(1, (2, 1)), nn.Conv2d(2, 6, (1, 3)), nn.Flatten(2)),
    "celu": nn.Sequential(nn.Conv1d(2, 6, 3), nn.CELU()),
    "a power": Behind(nn.Conv1d(2, 6, 3), lambda z: z**2),
    "an exponential": Behind(nn.Conv1d(2, 6, 3), lambda z: z.exp()),
    "a root": Behind(nn.Conv1d(2, 6, 3), lambda z: (1 + z.abs()).sqrt()),
    "instance norm": nn.Sequential(nn.Conv1d(2, 6, 3), nn.InstanceNorm1d(6), nn.Tanh()),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", CHANNELS_SECOND)
def test_channels_of_a_convolution_are_on_axis_1(name: str, named: bool, size: int) -> None:
    heads = {task: nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), mlp(6, 1)) for task in "ab"}
    net = Net(CHANNELS_SECOND[name], heads).double().eval()
    x = torch.randn(size, 2, 15)
    options = {"feature": "backbone"} if named else {}
    found = called(net, x, metric="sqeuclidean", **options).report.distances
    torch.testing.assert_close(found, by_sample(net, x, lambda z: z.sum(), lambda g: g.sum(1), "sqeuclidean"))


@pytest.mark.parametrize("frozen", ["no_grad", "requires_grad"])
@pytest.mark.parametrize("name", ["convolution", "batch norm", "group norm", "pooled"])
def test_channels_behind_a_frozen_backbone(name: str, frozen: str) -> None:
    backbone = CHANNELS_SECOND[name].double().requires_grad_(frozen == "no_grad")
    if frozen == "no_grad":
        backbone = Behind(backbone, lambda z: z)
        backbone.forward = torch.no_grad()(backbone.forward)  # type: ignore[method-assign]
    net = Net(
        backbone, {task: nn.Sequential(nn.Conv1d(6, 4, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(1)) for task in "ab"}
    )
    net.eval()
    x = torch.randn(3, 2, 17)
    net(x)
    by_hand = net.backbone(x).detach().requires_grad_()
    outputs = {task: head(by_hand) for task, head in net.heads.items()}
    expected = task_distances(task_saliencies(outputs, by_hand, channel_axis=1))
    for options in ({}, {"feature": "backbone"}):
        torch.testing.assert_close(called(net, x, **options).report.distances, expected.detach())


@pytest.mark.parametrize("name", ["patches", "linear", "transposed", "attention"])
def test_tokens_stay_tokens(name: str) -> None:
    backbone = {
        "patches": nn.Sequential(
            nn.Unflatten(1, (1, 2)), nn.Conv2d(1, 6, 2), nn.Flatten(2), Behind(nn.Identity(), lambda z: z.mT)
        ),
        "linear": nn.Linear(15, 6),
        "transposed": nn.Sequential(nn.Conv1d(2, 6, 3), Behind(nn.GELU(), lambda z: z.permute(0, 2, 1))),
        "attention": nn.Sequential(nn.Linear(15, 6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
    }[name]
    net = Net(backbone, {task: Behind(mlp(6, 1), lambda z: z.mean((1, 2))) for task in "ab"}).eval()
    x = torch.randn(3, 2, 15)
    torch.testing.assert_close(
        called(net, x).report.distances, by_sample(net, x, lambda z: z.sum(), lambda g: g.sum(0))
    )


class Weighed(nn.Module):
    """Tells nothing of its channels."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.linspace(-1, 1, x[0].numel()).view(x.shape[1:])
        return (self.weight * positions * x).sin().mean((0, 2, 3)).unsqueeze(1)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.register_buffer("positions", torch.randn(7, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) + self.norm(self.positions)


class ChannelGate(nn.Module):
    """A convolution along the channels makes one factor for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Linear(5, 6), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        return self.conv(tokens.mean(1, keepdim=True)).sigmoid() * tokens


CHANNELS_LAST: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether no head has to tell
    "packed": (lambda: Behind(nn.Linear(5, 6), lambda z: z.view(1, -1, 6).tanh().view(z.shape)), True),
    "a gate of channels": (ChannelGate, True),
    "normalised positions": (Positions, True),
    "parts of complex numbers": (
        lambda: Behind(nn.Linear(5, 4), lambda z: torch.view_as_real(torch.fft.rfft(z.flatten(1)))),
        True,
    ),
    "mixed tokens": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Conv1d(7, 7, 1), nn.GELU()), False),
    "a norm for each token": (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(7)), False),
}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_channels_of_tokens_are_last(name: str, size: int, linear: bool) -> None:
    build, known = CHANNELS_LAST[name]
    if not (known or linear):
        return
    width = 2 if name.startswith("parts") else 6
    heads = {t: Behind(mlp(width, 1), lambda z: z.mean((1, 2))) if linear else Weighed(2) for t in "ab"}
    net = Net(build(), heads).eval()
    x = torch.randn(size, 7, 5)
    expected = by_sample(net, x, lambda z: z.sum(), lambda g: g.sum(0), "sqeuclidean")
    torch.testing.assert_close(called(net, x, metric="sqeuclidean").report.distances, expected)


# Sequence first.


@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.parametrize("pool", ["sum", "mean", None])
@pytest.mark.parametrize("kind", ["one per sample", "classes at each position"])
@pytest.mark.parametrize("masked", [False, True])
def test_batch_axis(kind: str, pool: str | None, masked: bool, surgery: bool) -> None:
    dense = kind == "classes at each position"
    heads = {task: mlp(6, 3) if dense else Behind(mlp(6, 1), lambda z: z.mean(0)[:, 0]) for task in "abc"}
    net = Net(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), heads)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]) if masked else None
    x = torch.randn(5, 3, 4)  # [L, B, C]
    regularizer = SaliencyRegularizer(
        net, strength=1.0, batch_axis=1, pool=pool, surgery=PCGrad() if surgery else None, metric="l1"
    )
    outputs = net(x)
    penalty = regularizer(mask=mask)
    (sum(output.square().mean() for output in outputs.values()) + penalty).backward()
    other = Net(
        net.backbone, {task: mlp(6, 3) if dense else Behind(mlp(6, 1), lambda z: z.mean(1)[:, 0]) for task in "abc"}
    )
    other.load_state_dict(net.state_dict(), strict=False)
    with torch.enable_grad():
        feature = net.backbone(x.transpose(0, 1))
        outputs = {task: head(feature) for task, head in other.heads.items()}
    expected = task_distances(task_saliencies(outputs, feature, pool=pool, mask=mask), mask=mask)
    torch.testing.assert_close(regularizer.report.distances, expected.detach())
    assert regularizer.report.samples.tolist() == [2 if masked else 3] * 3
    feature = net.backbone(x)
    outputs = {task: head.inner(feature).mean(0) if not dense else head(feature) for task, head in net.heads.items()}
    if dense:
        found = task_saliencies(outputs, feature, pool=pool, mask=mask, batch_axis=1)
        torch.testing.assert_close(task_distances(found, mask=mask), expected)


def test_the_error_says_batch_axis() -> None:
    net = Net(nn.Linear(4, 6), {task: Behind(mlp(6, 1), lambda z: z.mean(0)) for task in "ab"})
    with pytest.raises(errors.ShapeError, match="pass batch_axis=1"):
        called(net, torch.randn(5, 3, 4))
    with pytest.raises(errors.ShapeError, match="batch_axis=3 is no axis"):
        called(net, torch.randn(5, 3, 4), batch_axis=3)
    with pytest.raises(errors.ShapeError, match=r"Use one of 0, 2 \(axis 1 is the batch\)"):
        called(net, torch.randn(5, 3, 4), batch_axis=1, channel_axis=1)
