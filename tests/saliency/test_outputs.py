"""What the outputs of a head mean, and outputs whose saliency is always zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer

from .support import Behind, Net, by_sample, called, mlp, plain, told

pytestmark = pytest.mark.usefixtures("float64")


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
    regularizer = SaliencyRegularizer(net, strength=1.0, surgery=PCGrad() if surgery else None, metric="l1", **options)
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
    regularizer = SaliencyRegularizer(net, strength=1.0, metric="l1")
    net(torch.randn(5, 4))
    with pytest.warns(UserWarning, match="odd"):
        penalty = regularizer()
    penalty.backward()
    assert penalty == 0
    assert regularizer.report.present == ("a",)


def test_it_is_compared_as_soon_as_it_is_there() -> None:
    net = plain({"a": mlp(6, 1), "odd": Ordinal(4)})
    regularizer = SaliencyRegularizer(net, strength=1.0, metric="l1")
    net(torch.randn(5, 4))
    told(regularizer)
    net.heads["odd"] = mlp(6, 4)  # the module with the hooks is gone
    regularizer.remove()
    regularizer = SaliencyRegularizer(net, strength=1.0, metric="l1")
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
    regularizer = SaliencyRegularizer(net, strength=1.0, **{"metric": "l1", **options})
    net(torch.randn(5, 4))
    assert not told(lambda: regularizer(targets=targets))
    assert regularizer.report.present == ("a", "b")


@pytest.mark.parametrize("accumulated", [1, 4])
def test_many_heads_that_begin_at_zero_are_given_time(accumulated: int) -> None:
    net = plain({f"t{number}": mlp(6, 1) for number in range(40)})
    for head in net.heads.values():
        nn.init.zeros_(head[2].weight)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    regularizer = SaliencyRegularizer(net, strength=1.0, optimizer=optimizer, metric="l1")

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
    regularizer = SaliencyRegularizer(net, strength=1.0, metric="l1")

    def call(times: int) -> None:
        for _ in range(times):
            net(torch.randn(5, 4))
            regularizer()

    assert not told(lambda: call(20))
    assert regularizer.report.present == ("a", "b", "zero")
    assert "['zero'] is zero" in told(lambda: call(2))[0]
    assert regularizer.report.present == ("a", "b")
