"""What the outputs of a head mean, what counts as a sample, and which axis is which."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer, errors, task_distances, task_saliencies
from tests.reference.slow import slow_distances, slow_saliency

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def in_double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(DOUBLE)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def mlp(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 5), nn.GELU(), nn.Linear(5, outputs))


class Net(nn.Module):
    """A backbone and heads that read what ``between`` makes of its output."""

    def __init__(
        self, backbone: nn.Module, heads: dict[str, nn.Module], between: Callable[[Tensor], Tensor] | None = None
    ):
        super().__init__()
        self.backbone, self.heads, self.between = backbone, nn.ModuleDict(heads), between

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.feature = self.backbone(x)
        read = self.feature if self.between is None else self.between(self.feature)
        return {task: head(read) for task, head in self.heads.items()}


def plain(heads: dict[str, nn.Module]) -> Net:
    return Net(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), heads)


def called(net: nn.Module, x: Tensor, *, mask: Tensor | None = None, **options: Any) -> SaliencyRegularizer:
    regularizer = SaliencyRegularizer(net, heads="heads", strength=1.0, **options)
    net(x)
    regularizer(mask=mask)
    regularizer.remove()
    return regularizer


def told(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught]


def by_sample(
    net: Net,
    x: Tensor,
    scalar: Callable[[Tensor], Tensor],
    pooled: Callable[[Tensor], Tensor],
    metric: str = "l1",
) -> Tensor:
    """Distances by loops, each sample alone."""
    saliencies: list[list[Tensor]] = [[] for _ in net.heads]
    for one in x.split(1):
        outputs = net(one)
        for row, output in zip(saliencies, outputs.values()):
            row.append(pooled(slow_saliency(output, net.feature, scalar)))
    return slow_distances(saliencies, metric, "mean")


# Two logits.


def test_two_logits_are_their_difference() -> None:
    net = plain({"a": mlp(6, 2), "b": mlp(6, 2), "c": mlp(6, 2)})
    x = torch.randn(5, 4)
    found = called(net, x).report.distances
    torch.testing.assert_close(found, by_sample(net, x, lambda z: (z[:, 1] - z[:, 0]).sum(), lambda g: g))


@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean", "cosine", "sqchordal"])
def test_a_bias_parts_no_heads_with_two_logits(metric: str) -> None:
    net = plain({"a": mlp(6, 2), "b": mlp(6, 2)})
    net.heads["b"].load_state_dict(net.heads["a"].state_dict())
    net.heads["b"][2].bias.data += torch.tensor([3.0, -2.0])
    assert called(net, torch.randn(50, 4), metric=metric).report.distances.abs().max() < 1e-12


def test_two_dense_logits_are_their_difference() -> None:
    conv = lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1))  # noqa: E731
    net = Net(nn.Conv2d(1, 3, 3), {"a": conv(), "b": conv()})
    x = torch.randn(3, 1, 6, 6)
    found = called(net, x).report.distances
    torch.testing.assert_close(found, by_sample(net, x, lambda z: (z[:, 1] - z[:, 0]).sum(), lambda g: g.sum((1, 2))))


# Saliencies of nothing but rounding.


class Ordinal(nn.Module):
    def __init__(self, thresholds: int, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.score = mlp(6, 1) if trunk is None else trunk
        self.threshold = nn.Parameter(torch.arange(float(thresholds), 0, -1))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) + self.threshold


class Behind(nn.Module):
    def __init__(self, inner: nn.Module, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.last = inner, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


VANISHING = {
    "ordinal, 3 thresholds": (lambda: Ordinal(3), {}, "pass scalarize='sum', or"),  # a third is no binary number
    "ordinal, 4 thresholds": (lambda: Ordinal(4), {}, "pass scalarize='sum', or"),
    "ordinal, a difference": (lambda: Ordinal(2), {}, "pass scalarize='sum', or"),
    "softmax": (lambda: Behind(mlp(6, 3), lambda z: z.softmax(-1)), {"scalarize": "sum"}, "choose the logits"),
    "log softmax": (lambda: Behind(mlp(6, 3), lambda z: z), {"scalarize": lambda z: z.exp() * 0}, "choose the logits"),
    "rounded": (lambda: Behind(mlp(6, 1), torch.round), {}, "do not react"),
    "dead": (lambda: Behind(mlp(6, 1), lambda z: (z - 100).relu()), {}, "do not react"),
}


@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.parametrize("name", VANISHING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saliency_of_nothing_is_told_and_not_compared(name: str, surgery: bool, dtype: torch.dtype) -> None:
    build, options, advice = VANISHING[name]
    net = plain({"a": mlp(6, 1), "odd": build(), "b": mlp(6, 1)}).to(dtype)
    if "scalarize" in options and callable(options["scalarize"]):
        options = {"scalarize": {"a": "auto", "odd": options["scalarize"], "b": "auto"}}
    regularizer = SaliencyRegularizer(net, strength=1.0, surgery=PCGrad() if surgery else None, **options)
    x = torch.randn(5, 4, dtype=dtype)

    def train() -> None:
        for _ in range(3):
            outputs = net(x)
            (sum(output.square().mean() for output in outputs.values()) + regularizer()).backward()

    messages = told(train)
    assert len(messages) == 1
    assert "['odd'] is zero, or nothing but rounding" in messages[0]
    assert advice in messages[0]
    distances = regularizer.report.distances
    assert distances[0, 2] > 0
    assert bool(distances[1, [0, 2]].isnan().all())
    assert regularizer.report.present == ("a", "b")


def test_alone_it_leaves_a_penalty_of_zero_with_a_graph() -> None:
    net = plain({"a": mlp(6, 1), "odd": Ordinal(4)})
    regularizer = SaliencyRegularizer(net, strength=1.0)
    net(torch.randn(5, 4))
    with pytest.warns(UserWarning, match="odd"):
        penalty = regularizer()
    penalty.backward()
    assert penalty == 0
    assert regularizer.report.present == ("a",)


def test_it_is_compared_as_soon_as_it_is_there() -> None:
    net = plain({"a": mlp(6, 1), "odd": Ordinal(4)})
    regularizer = SaliencyRegularizer(net, strength=1.0)
    net(torch.randn(5, 4))
    told(regularizer)
    net.heads["odd"] = mlp(6, 4)  # the module with the hooks is gone
    regularizer.remove()
    regularizer = SaliencyRegularizer(net, strength=1.0)
    net(torch.randn(5, 4))
    assert not told(regularizer)
    assert regularizer.report.distances[0, 1] > 0


def test_a_sum_over_positions_that_is_always_zero_is_told() -> None:
    heads = {
        task: nn.Sequential(nn.InstanceNorm2d(3), nn.Conv2d(3, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(32, 1))
        for task in "ab"
    }
    net = Net(nn.Conv2d(1, 3, 3), heads)
    assert "pass pool=none" in told(lambda: called(net, torch.randn(3, 1, 8, 8)))[0].lower()
    assert not told(lambda: called(net, torch.randn(3, 1, 8, 8), pool=None))


@pytest.mark.parametrize("name", ["zero weights", "no labels", "small"])
def test_others_are_not_told(name: str) -> None:
    net, options, targets = plain({"a": mlp(6, 3), "b": mlp(6, 3)}), {}, None
    if name == "zero weights":
        nn.init.zeros_(net.heads["b"][2].weight)
    elif name == "small":
        net.heads["b"][2].weight.data *= 1e-9
    else:
        options = {"scalarize": "label"}
        targets = {"a": torch.zeros(5, dtype=torch.int64), "b": torch.full((5,), -100)}
    regularizer = SaliencyRegularizer(net, strength=1.0, **options)
    net(torch.randn(5, 4))
    assert not told(lambda: regularizer(targets=targets))
    assert regularizer.report.present == ("a", "b")


@pytest.mark.parametrize("accumulated", [1, 4])
def test_many_heads_that_begin_at_zero_are_given_time(accumulated: int) -> None:
    net = plain({f"t{number}": mlp(6, 1) for number in range(40)})
    for head in net.heads.values():
        nn.init.zeros_(head[2].weight)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    regularizer = SaliencyRegularizer(net, strength=1.0, optimizer=optimizer)

    def train() -> None:
        for _ in range(2):
            for _ in range(accumulated):
                loss = sum((output - 1).square().mean() for output in net(torch.randn(5, 4)).values())
                (loss + regularizer()).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert not told(train)
    net(torch.randn(5, 4))
    assert regularizer() > 0
    assert len(regularizer.report.present) == 40


def test_heads_that_stay_at_zero_are_told_in_the_end() -> None:
    net = plain({"a": mlp(6, 1), "b": mlp(6, 1), "zero": mlp(6, 1)})
    nn.init.zeros_(net.heads["zero"][2].weight)
    regularizer = SaliencyRegularizer(net, strength=1.0)

    def call(times: int) -> None:
        for _ in range(times):
            net(torch.randn(5, 4))
            regularizer()

    assert not told(lambda: call(20))
    assert regularizer.report.present == ("a", "b", "zero")
    assert "['zero'] is zero" in told(lambda: call(2))[0]
    assert regularizer.report.present == ("a", "b")


# Maps with three axes.

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
    regularizer = SaliencyRegularizer(net, strength=1.0, batch_axis=1, pool=pool, surgery=PCGrad() if surgery else None)
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


# Samples that are padding.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("metric", ["l1", "cosine"])
@pytest.mark.parametrize(
    "kind", ["linear heads", "columns", "mlp", "tokens", "tokens, a mask of samples", "tokens, mean"]
)
def test_rows_of_padding_do_not_count(kind: str, metric: str, reduction: str) -> None:
    tokens = kind.startswith("tokens")
    options: dict[str, Any] = {"metric": metric, "reduction": reduction}
    if kind == "columns":
        net: nn.Module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        options |= {"tasks": list("abc")}
    else:
        net = plain({task: nn.Linear(6, 1) if kind == "linear heads" else mlp(6, 1) for task in "abc"})
    if kind == "tokens, mean":
        options["pool"] = "mean"
    heads = "2" if kind == "columns" else "heads"
    x = torch.randn(6, 5, 4) if tokens else torch.randn(6, 4)
    real = torch.tensor([True, False, True, True, False, True])
    mask = torch.randint(2, (6, 5), generator=torch.Generator().manual_seed(1)) if tokens else real
    mask = real if kind == "tokens, a mask of samples" else mask * real[:, None] if tokens else mask
    if tokens and mask.ndim == 2:
        mask[real, 0] = 1
    with_padding = SaliencyRegularizer(net, heads=heads, strength=1.0, **options)
    net(x)
    penalty = with_padding(mask=mask)
    with_padding.remove()
    alone = SaliencyRegularizer(net, heads=heads, strength=1.0, **options)
    net(x[real])
    expected = alone(mask=mask[real] if mask.ndim == 2 else None)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(with_padding.report.distances, alone.report.distances)
    assert with_padding.report.samples.tolist() == [4, 4, 4]
    parameters = [each for each in net.parameters() if each.requires_grad]
    ours, theirs = (torch.autograd.grad(each, parameters, allow_unused=True) for each in (penalty, expected))
    for one, other in zip(ours, theirs):
        assert (one is None and other is None) or torch.allclose(one, other)


@pytest.mark.parametrize("heads", ["linear", "mlp"])
def test_a_batch_of_padding_alone(heads: str) -> None:
    net = plain({task: nn.Linear(6, 1) if heads == "linear" else mlp(6, 1) for task in "ab"})
    regularizer = called(net, torch.randn(3, 4), mask=torch.zeros(3))
    assert regularizer.report.penalty == 0
    assert regularizer.report.samples.tolist() == [0, 0]
    before = regularizer.relations.matrix()
    regularizer.step()
    assert torch.equal(regularizer.relations.matrix(), before)


def test_masks_of_another_shape_are_refused() -> None:
    net = plain({"a": mlp(6, 1), "b": mlp(6, 1)})
    with pytest.raises(errors.ShapeError, match=r"Pass one value per sample, \[3\]"):
        called(net, torch.randn(3, 4), mask=torch.ones(3, 6))
    with pytest.raises(errors.ShapeError, match=r"expected \[3, 5\].*or \[3\]"):
        called(net, torch.randn(3, 5, 4), mask=torch.ones(5))
    with pytest.raises(errors.ShapeError, match=r"mask must be \[2\]"):
        task_distances(torch.ones(2, 2, 3), mask=torch.ones(3))


# Heads that read some rows, or pool them.


class Routed(nn.Module):
    def __init__(self, rows: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone, self.rows = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), rows
        self.heads = nn.ModuleDict({task: mlp(6, 1) for task in rows})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.backbone(x)
        return {task: head(feature[self.rows[task]]) for task, head in self.heads.items()}


APART = {"a": torch.arange(0, 4), "b": torch.arange(4, 9)}
APART_ALIKE = {"a": torch.arange(0, 4), "b": torch.arange(4, 8)}
OVERLAPPING = {"a": torch.arange(0, 6), "b": torch.arange(3, 9), "c": torch.arange(9)}
SAME = {"a": torch.tensor([0, 3, 4]), "b": torch.tensor([0, 3, 4])}


@pytest.mark.parametrize("rows", [APART, APART_ALIKE, OVERLAPPING])
@pytest.mark.parametrize("way", ["plain", "function", "loss"])
def test_heads_on_rows_of_their_own_are_refused(rows: dict[str, Tensor], way: str) -> None:
    net = Routed(rows)
    options = {"plain": {}, "function": {"scalarize": lambda z: z}, "loss": {"target": "loss"}}[way]
    regularizer = SaliencyRegularizer(net, feature="backbone", strength=1.0, **options)
    outputs = net(torch.randn(9, 4))
    with pytest.raises(errors.ShapeError, match=r"head\(feature\)\[rows\] in place of head\(feature\[rows\]\)"):
        regularizer(losses={task: output.square().mean() for task, output in outputs.items()})


def test_heads_on_the_same_rows_are_compared_over_these() -> None:
    net, x = Routed(SAME), torch.randn(9, 4)
    regularizer = SaliencyRegularizer(net, feature="backbone", strength=1.0, scalarize=lambda z: z)
    net(x)
    regularizer()
    feature = net.backbone(x[SAME["a"]])
    expected = task_distances(task_saliencies({task: head(feature) for task, head in net.heads.items()}, feature))
    torch.testing.assert_close(regularizer.report.distances, expected.detach())
    assert regularizer.report.samples.tolist() == [3, 3]


@pytest.mark.parametrize("dead", [{"a": [1], "b": [1]}, {"a": [0, 1], "b": [0]}, {"a": [1], "b": []}])
@pytest.mark.parametrize("way", ["function", "loss"])
def test_rows_that_heads_do_not_react_to_count(dead: dict[str, list[int]], way: str) -> None:
    net, x = Routed(SAME), torch.randn(9, 4)
    for task, rows in dead.items():
        alive = torch.ones(3, 1).index_fill(0, torch.tensor(rows, dtype=torch.int64), 0.0)
        net.heads[task] = Behind(net.heads[task], lambda z, alive=alive: z * alive)
    options = {"function": {"scalarize": lambda z: z}, "loss": {"target": "loss"}}[way]
    regularizer = SaliencyRegularizer(net, feature="backbone", strength=1.0, metric="sqeuclidean", **options)
    outputs = net(x)
    regularizer(losses={task: output.sum() / 9 for task, output in outputs.items()})
    feature = net.backbone(x[SAME["a"]]).detach().requires_grad_()
    rows = [torch.autograd.grad(head(feature).sum(), feature)[0] for head in net.heads.values()]
    expected = slow_distances([list(row) for row in rows], "sqeuclidean", "mean")
    torch.testing.assert_close(regularizer.report.distances, expected)
    assert regularizer.report.samples.tolist() == [3, 3]
    assert expected[0, 1] > 0


class TopOne(nn.Module):
    """Reads one row of each set: that with the highest score."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.net = nn.Linear(6, 1), mlp(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        sets = x.view(3, 4, 6)
        best = self.score(sets).argmax(1, keepdim=True)
        return self.net(sets.gather(1, best.expand(-1, 1, 6)).squeeze(1))


@pytest.mark.parametrize("options", [{}, {"feature": "backbone"}])
def test_heads_that_choose_rows_within_are_compared_over_all(options: dict[str, str]) -> None:
    net, x = plain({"a": TopOne(), "b": TopOne()}), torch.randn(12, 4)
    regularizer = called(net, x, scalarize=lambda output: output.sum(-1), **options)
    feature = net.backbone(x).detach().requires_grad_()
    rows = [torch.autograd.grad(head(feature).sum(), feature)[0] for head in net.heads.values()]
    assert not torch.equal(rows[0].any(1), rows[1].any(1))
    expected = slow_distances([list(row) for row in rows], "l1", "mean")
    torch.testing.assert_close(regularizer.report.distances, expected)
    assert regularizer.report.samples.tolist() == [12, 12]


def test_heads_that_pool_graphs() -> None:
    graph = torch.tensor([0, 0, 1, 1, 1, 2])

    def pooled(nodes: Tensor) -> Tensor:
        return torch.zeros(3, nodes.shape[1]).index_add(0, graph, nodes)

    net = Net(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), {t: Behind(mlp(6, 1), pooled) for t in "ab"})
    x = torch.randn(6, 4)
    with pytest.raises(errors.ShapeError, match=r"pools rows \(nodes of graphs, sets\).*scalarize=lambda output"):
        called(net, x)
    found = called(net, x, scalarize=lambda output: output.sum(-1)).report
    feature = net.backbone(x)
    outputs = {task: head.inner(feature) for task, head in net.heads.items()}
    torch.testing.assert_close(found.distances, task_distances(task_saliencies(outputs, feature)).detach())
    assert found.samples.tolist() == [6, 6]


# run_all_heads.


class Batches(nn.Module):
    """Each batch is of one task, whose head reads what ``kinds`` makes of the map."""

    def __init__(self, kinds: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.stage, self.kinds = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh()), kinds
        self.heads = nn.ModuleDict({task: Behind(mlp(6, 1), lambda z: z.flatten(1).mean(1)) for task in kinds})

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.heads[task](self.kinds[task](self.stage(x)))


def vector(z: Tensor) -> Tensor:
    return z.mean((2, 3))


def tokens(z: Tensor) -> Tensor:
    return z.flatten(2).mT


def last(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1)


@pytest.mark.parametrize("other", [tokens, last])
def test_heads_are_not_run_on_another_kind_of_tensor(other: Callable[[Tensor], Tensor]) -> None:
    net = Batches({"a": vector, "b": vector, "odd": other})
    regularizer = SaliencyRegularizer(net, heads="heads", strength=1.0, run_all_heads=True, channel_axis=-1)
    x = torch.randn(3, 1, 5, 5)
    found = {}

    def train() -> None:
        for task in ("a", "b", "odd", "a", "odd", "b"):
            net(x, task)
            regularizer()
            found[task] = regularizer.report.distances

    messages = told(train)
    assert len(messages) == 1
    assert "'heads.a' (2 axes)" in messages[0]
    assert "'heads.odd'" in messages[0]
    torch.testing.assert_close(found["a"][0, 1], found["b"][0, 1])
    assert found["a"][0, 1] > 0
    assert found["a"][0, 2].isnan()
    assert found["odd"].isnan().sum() == 8


def test_a_head_that_cannot_run_on_it() -> None:
    net = Batches({"a": vector, "wide": lambda z: z.flatten(1)})
    net.heads["wide"] = mlp(54, 1)
    regularizer = SaliencyRegularizer(net, heads="heads", strength=1.0, run_all_heads=True)
    net(torch.randn(3, 1, 5, 5), "a")
    with pytest.raises(
        errors.CaptureError, match=r"cannot run head 'heads.wide' on what head 'heads.a' was called with"
    ):
        regularizer()


LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Tagger(nn.Module):
    def __init__(self, kind: str, behind: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.behind = LAYERS[kind](3, 4, **options), behind
        self.heads = nn.ModuleDict({task: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 1)) for task in "ab"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states = self.layer(x)[0]
        if self.behind == "dropout":
            states = nn.functional.dropout(states, 0.5).relu()
        if self.behind == "transpose":
            states = states.transpose(0, 1)
        return {task: head(states) for task, head in self.heads.items()}


@pytest.mark.parametrize("behind", ["", "dropout"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_sequence_of_a_recurrent_layer_is_not_taken_for_samples(kind: str, behind: str) -> None:
    model, x = Tagger(kind, behind).double(), torch.randn(7, 5, 3).double()
    regularizer = SaliencyRegularizer(model, heads="heads")
    model(x)
    with pytest.raises(errors.ShapeError, match=r"\[7, 5, 4\] comes out of a recurrent layer.*Pass batch_axis=1"):
        regularizer()
    regularizer.remove()
    if behind:
        return
    found = []
    for other, given, axis in ((Tagger(kind, "", batch_first=True), x.transpose(0, 1), 0), (model, x, 1)):
        twin = other.double()
        twin.load_state_dict(model.state_dict())
        with SaliencyRegularizer(twin, heads="heads", batch_axis=axis, relations="fixed") as right:
            twin(given)
            found.append(right())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_recurrent_layer_whose_output_was_transposed_has_its_samples_first(kind: str) -> None:
    model = Tagger(kind, "transpose")
    regularizer = SaliencyRegularizer(model, heads="heads")
    model(torch.randn(7, 5, 3))
    assert regularizer() > 0
