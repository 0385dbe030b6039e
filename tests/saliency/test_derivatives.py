"""Gradients that are not derivatives, and second derivatives that are missing: told in the first call, by name."""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from saliency_reg.errors import SecondDerivativeError
from saliency_reg.saliency import Derivatives, derivatives_of
from tests.support.zoo import Reverse


def function(forward: Callable[..., Any], backward: Callable[..., Any], name: str) -> Callable[[Tensor], Tensor]:
    made = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    return made.apply


def save(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x)
    return x.sigmoid()


def keep(ctx: Any, x: Tensor) -> Tensor:
    ctx.slope = (x.sigmoid() * (1 - x.sigmoid())).detach()
    return x.sigmoid()


def of_input(ctx: Any, gradient: Tensor) -> Tensor:
    y = ctx.saved_tensors[0].sigmoid()
    return gradient * y * (1 - y)


def hooked(x: Tensor) -> Tensor:
    view = x.view_as(x)
    view.register_hook(lambda gradient: 3 * gradient)
    return view


PARTS: dict[str, tuple[Callable[[Tensor], Tensor], Derivatives]] = {
    "reversal": (Reverse.apply, Derivatives.NOT_FIRST),
    "scaling": (function(lambda ctx, x: x.view_as(x), lambda ctx, g: 0.1 * g, "Scale"), Derivatives.NOT_FIRST),
    "straight-through": (function(lambda ctx, x: x.sign(), lambda ctx, g: g, "Sign"), Derivatives.NOT_FIRST),
    "straight-through by detach": (lambda x: x + (x.sign() - x).detach(), Derivatives.NOT_FIRST),
    "hook": (hooked, Derivatives.NOT_FIRST),
    "keeps an intermediate": (function(keep, lambda ctx, g: g * ctx.slope, "Keeps"), Derivatives.NOT_SECOND),
    "as it should be": (function(save, of_input, "Saves"), Derivatives.RIGHT),
    "kinks": (torch.relu, Derivatives.RIGHT),
    "dropout": (nn.functional.dropout, Derivatives.RIGHT),
    "float32 within": (lambda x: x * (x.float().square().mean(-1, keepdim=True) + 1).rsqrt().to(x.dtype), Derivatives.RIGHT),
    "batch norm": (lambda x: nn.functional.batch_norm(x, None, None, training=True), Derivatives.RIGHT),
}  # fmt: skip


class Head(nn.Module):
    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.part, self.runs = nn.Linear(8, 5), nn.Linear(5, 1), part, 0

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        self.runs += 1
        return self.last(self.part(self.first(x)).tanh())


@pytest.mark.parametrize("name", PARTS)
def test_what_a_head_is_found_to_be(name: str) -> None:
    torch.manual_seed(0)
    part, expected = PARTS[name]
    head, feature = Head(part), torch.randn(6, 8)
    state = torch.get_rng_state()
    for _ in range(3):
        assert derivatives_of(head, feature) is expected
    assert torch.equal(torch.get_rng_state(), state)
    assert head.runs == 0
    assert not hasattr(head, "kept")


class Keeping(Head):
    """Keeps what it saw in all kinds of containers."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__(part)
        self.seen: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        self.shapes: set[torch.Size] = set()
        self.latest: deque[Tensor] = deque(maxlen=3)
        self.by_size: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.nested: dict[str, Any] = {"inner": {"all": [[]]}}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.named[str(len(self.named))] = x
        self.shapes.add((*x.shape, len(self.shapes)))
        self.latest.append(x)
        self.by_size[1].append(x)
        self.by_size[len(x)].append(x)
        self.nested["inner"]["all"][0].append(x)
        return super().forward(x)

    def containers(self) -> list[Any]:
        own = [self.seen, self.named, self.shapes, self.latest, self.by_size, self.nested]
        return [(repr(one), [id(part) for part in one]) for one in own]


def test_what_a_head_keeps_in_containers_stays_as_it_is() -> None:
    torch.manual_seed(0)
    head, feature = nn.Sequential(Keeping(torch.sin), nn.Tanh()), torch.randn(6, 8)
    assert derivatives_of(head, feature) is Derivatives.RIGHT
    assert head[0].containers() == Keeping(torch.sin).containers()
    head(feature)
    before = head[0].containers()
    assert derivatives_of(head, feature) is Derivatives.RIGHT
    assert head[0].containers() == before
    assert len(head[0].seen) == 1


def run(parts: dict[str, Callable[[Tensor], Tensor]], **options: Any) -> tuple[list[str], nn.ModuleDict]:
    torch.manual_seed(0)
    heads = nn.ModuleDict({task: Head(part) for task, part in parts.items()})
    model = nn.ModuleDict({"backbone": nn.Linear(4, 8), "heads": heads})
    regularizer = SaliencyRegularizer(model, "heads", strength=1.0, **{"metric": "l1", **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            feature = model["backbone"](torch.randn(6, 4))
            for head in heads.values():
                head(feature)
            regularizer()
    assert all(head.runs == 2 for head in heads.values())
    return [str(one.message) for one in caught], model


@pytest.mark.parametrize("name", [name for name, (_, found) in PARTS.items() if found is not Derivatives.RIGHT])
def test_it_is_told_once(name: str) -> None:
    part, found = PARTS[name]
    parts = {"plain": torch.sin, "odd": part}
    told, _ = run(parts)
    assert len(told) == 1
    assert "['odd']" in told[0]
    assert "custom_backward='ignore'" in told[0]
    assert ("not its derivative" if found is Derivatives.NOT_FIRST else "gradient is missing") in told[0]
    assert run(parts, custom_backward="ignore")[0] == []


def test_nothing_is_told_of_what_is_right() -> None:
    right = {name: part for name, (part, found) in PARTS.items() if found is Derivatives.RIGHT}
    assert run(right)[0] == []


def test_what_cannot_be_looked_at_is_told_by_name() -> None:
    model = nn.ModuleDict(
        {
            "backbone": nn.Linear(4, 8),
            "middle": nn.Identity(),
            "heads": nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)]),
        }
    )
    regularizer = SaliencyRegularizer(model, "heads", feature="backbone", strength=0.1, metric="l1")
    hidden = 2 * PARTS["reversal"][0](model["backbone"](torch.randn(6, 4)))
    for head in model["heads"]:
        head(hidden)
    with pytest.warns(UserWarning, match=r"between the feature map and the outputs \(Reverse\).*gradgradcheck"):
        regularizer()


class OfNeither(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.hardsigmoid(x)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Hardsigmoid(), r"'1' is a Hardsigmoid. In place of Hardsigmoid use relu6\(x \+ 3\) / 6, which is the same"),
        (nn.Sequential(nn.Identity(), nn.Hardsigmoid()), "'1.1' is a Hardsigmoid"),
        (OfNeither(), "'1' is a OfNeither.*relu6"),
    ],
)
def test_layers_without_a_second_derivative_are_named(layer: nn.Module, words: str) -> None:
    heads = nn.ModuleDict({task: nn.Sequential(nn.Linear(8, 5), layer, nn.Linear(5, 1)) for task in "ab"})
    model = nn.ModuleDict({"backbone": nn.Linear(4, 8), "heads": heads})
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    feature = model["backbone"](torch.randn(6, 4))
    for head in heads.values():
        head(feature)
    with pytest.raises(SecondDerivativeError, match=words):
        regularizer()


def test_a_penalty_without_a_gradient_is_told() -> None:
    heads = nn.ModuleList([nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 1)) for _ in range(2)])
    model = nn.ModuleDict({"backbone": nn.Linear(4, 8), "heads": heads.requires_grad_(False)})
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    feature = model["backbone"](torch.randn(6, 4))
    for head in heads:
        head(feature)
    with pytest.warns(UserWarning, match="a value and no gradient"):
        assert not regularizer().requires_grad


@pytest.mark.parametrize("between", ["reversal", "scaling", "hook"])
def test_heads_that_read_the_map_through_another_backward(between: str) -> None:
    torch.manual_seed(0)
    backbone, part = nn.Linear(3, 8), PARTS[between][0]
    model = nn.ModuleDict({"backbone": backbone, "heads": nn.ModuleDict({name: Head(torch.sin) for name in "ab"})})
    x = torch.randn(4, 3)

    def step(regularizer: SaliencyRegularizer) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                feature = backbone(x).tanh()
                model["heads"]["a"](feature)
                model["heads"]["b"](part(feature))
                regularizer()
        regularizer.remove()
        return [str(one.message) for one in caught]

    (told,) = step(SaliencyRegularizer(model, heads="heads", strength=0.1, metric="l1"))
    assert "heads ['heads.b'] read the feature map through something that changes its gradient alone" in told
    assert step(SaliencyRegularizer(model, heads="heads", custom_backward="ignore", strength=0.1, metric="l1")) == []


def test_ties_are_no_missing_derivative() -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.amax((2, 3)).sin()

    map_of_zeros = torch.randn(4, 3, 5, 5).clamp(min=2.5)
    assert derivatives_of(Largest(), map_of_zeros) is Derivatives.RIGHT
