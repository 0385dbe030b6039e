"""The weight rows of ``Linear`` heads are their saliency only where the forward was computed with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from saliency_reg import FeatureSurgery, PCGrad, SaliencyRegularizer, task_distances
from saliency_reg.errors import NotConnectedError

TASKS = ("a", "b", "c")


class Net(nn.Module):
    def __init__(self, columns: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.heads = (
            nn.Linear(8, 3, bias) if columns else nn.ModuleDict({task: nn.Linear(8, 1, bias) for task in TASKS})
        )

    def forward(self, x: Tensor) -> Tensor:
        self.feature = self.backbone(x)
        if isinstance(self.heads, nn.Linear):
            return self.heads(self.feature)
        return torch.cat([head(self.feature) for head in self.heads.values()], -1)


def attached(net: nn.Module, **options: Any) -> SaliencyRegularizer:
    tasks = list(TASKS) if isinstance(getattr(net, "heads", None), nn.Linear) else None
    return SaliencyRegularizer(
        net, "heads", tasks=tasks, strength=1.0, relations="fixed", **{"metric": "l1", **options}
    )


def by_autograd(outputs: Tensor, feature: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.autograd.grad(column.sum(), feature, retain_graph=True, create_graph=True)[0]
            for column in outputs.unbind(-1)
        ]
    )


def linear_layers(net: Net) -> list[nn.Linear]:
    return [part for part in net.heads.modules() if isinstance(part, nn.Linear)]


def patched(net: Net) -> None:
    for layer in linear_layers(net):
        layer.forward = lambda x, first=layer.forward: 3 * first(x) + first(x.tanh())  # type: ignore[method-assign]


def hooked(net: Net) -> None:
    for layer in linear_layers(net):
        layer.register_forward_pre_hook(lambda _, args: (args[0] ** 2,))


def parametrised(net: Net) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for layer in linear_layers(net):
        parametrize.register_parametrization(layer, "weight", Doubled())


def other_class(net: Net) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 5

    for layer in linear_layers(net):
        layer.__class__ = Scaled


CHANGES: dict[str, Callable[[Net], None]] = {
    "patched": patched, "hooked": hooked, "parametrised": parametrised, "another class": other_class,
}  # fmt: skip


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_heads_that_are_more_than_their_weight(change: str, columns: bool) -> None:
    net = Net(columns).double()
    regularizer = attached(net)  # changed after it was attached
    CHANGES[change](net)
    outputs = net(torch.randn(5, 6, dtype=torch.float64))
    regularizer()
    assert "closed form" not in regularizer.describe()
    expected = task_distances(by_autograd(outputs, net.feature))
    torch.testing.assert_close(regularizer.report.distances, expected.detach().to(regularizer.report.distances))


def global_hook(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2 if isinstance(module, nn.Linear) and module.in_features == 8 else None


@pytest.mark.parametrize("how", ["fast weights", "another parameter", "another memory", "a hook on all modules"])
def test_weights_that_are_not_those_of_the_forward(how: str) -> None:
    net = Net().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    regularizer = attached(net)
    fast = {name: torch.randn_like(value).requires_grad_() for name, value in net.named_parameters()}
    if how == "fast weights":
        outputs = functional_call(net, fast, (x,))
    elif how == "a hook on all modules":
        handle = torch.nn.modules.module.register_module_forward_hook(global_hook)
        outputs = net(x)
        handle.remove()
    else:
        outputs = net(x)
    expected = task_distances(by_autograd(outputs, net.feature))
    for task in TASKS:
        layer = net.heads[task]
        if how == "another parameter":
            layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        elif how == "another memory":
            layer.weight.data = torch.randn_like(layer.weight)
    penalty = regularizer()
    torch.testing.assert_close(regularizer.report.distances, expected.detach().to(regularizer.report.distances))
    if how == "fast weights":
        wanted = torch.autograd.grad(
            (regularizer.relations.matrix() * expected).triu(1).sum(), fast["heads.a.weight"], retain_graph=True
        )
        torch.testing.assert_close(torch.autograd.grad(penalty, fast["heads.a.weight"]), wanted)


def test_weights_changed_in_place_before_the_call() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = attached(net)
    net(torch.randn(5, 6)).sum().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(NotConnectedError, match=r"Call regularizer\(\) between the model's forward and that change"):
        regularizer()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_still_taken(autocast: bool, shape: tuple[int, ...], columns: bool, bias: bool) -> None:
    net = Net(columns, bias)
    regularizer = attached(net, channel_axis=-1, surgery=PCGrad() if len(shape) == 2 else None)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = net(x if len(shape) < 3 else x.transpose(0, 1).contiguous().transpose(0, 1))
        penalty = regularizer()
    assert "closed form" in regularizer.describe()
    (outputs.float().square().mean() + penalty).backward()


@pytest.mark.parametrize("change", [*CHANGES, "fast weights"])
def test_surgery_on_columns(change: str) -> None:
    net = Net(columns=True).double()
    surgery = FeatureSurgery(net, heads="heads", tasks=list(TASKS), weighting=PCGrad())
    surgery.keep_task_gradients = True
    x, targets = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    fast = {name: torch.randn_like(value).requires_grad_() for name, value in net.named_parameters()}
    if change in CHANGES:
        CHANGES[change](net)
        run = net
    else:

        def run(x: Tensor) -> Tensor:
            return functional_call(net, fast, (x,))

    with surgery.passing():
        outputs = run(x)
        losses = (outputs - targets).square().mean(0).unbind()
        wanted = [torch.autograd.grad(loss, net.feature, retain_graph=True)[0] for loss in losses]
    (run(x) - targets).square().mean(0).sum().backward()
    for ours, theirs in zip(surgery.task_gradients.values(), wanted):
        torch.testing.assert_close(ours[0], theirs)
