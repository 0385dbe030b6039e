"""Which tensor is differentiated: the one that is meant, whoever reads it and whatever is done to it in place later."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.errors import CaptureError
from tests.reference.slow import slow_distances, slow_penalty
from tests.support.zoo import Reverse, float64  # noqa: F401

pytestmark = pytest.mark.usefixtures("float64")
SURGERY = pytest.mark.parametrize("surgery", [False, True], ids=["plain", "surgery"])


def mlp(first: nn.Module | None = None, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(*(() if first is None else (first,)), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, outputs))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, feature: Tensor, gate: Tensor) -> Tensor:
        return self.net(feature) * gate.mean(1, keepdim=True)


class Net(nn.Module):
    """Two heads; what comes before them is a function of the model, which notes in ``meant`` the tensor that is named."""

    def __init__(
        self, between: Callable[[Any, Tensor], Any], heads: Sequence[nn.Module] = (), inplace: bool = False
    ) -> None:
        super().__init__()
        self.body, self.side, self.gate = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4)
        self.act, self.inner = nn.ReLU(inplace), nn.Softplus()
        self.heads = nn.ModuleList(heads or [mlp(), mlp()])
        self.between, self.inplace, self.meant = between, inplace, torch.empty(0)

    def forward(self, x: Tensor) -> Any:
        return self.between(self, x)

    def all(self, *args: Tensor) -> list[Tensor]:
        return [head(*args) for head in self.heads]

    def times(self, tensor: Tensor, factor: float) -> Tensor:
        return tensor.mul_(factor) if self.inplace else tensor * factor


def by_hand(outputs: Sequence[Tensor], feature: Tensor) -> float:
    """The penalty of strength 1 with uniform weights, by one gradient per task, summed over positions."""
    gradients = [torch.autograd.grad(out.sum(), feature, create_graph=True)[0] for out in outputs]
    rows = [one.flatten(1, -2).sum(1) if one.ndim > 2 else one for one in gradients]
    size = len(rows)
    weights = (torch.ones(size, size) - torch.eye(size)) / (size * (size - 1) / 2)
    return slow_penalty(slow_distances([list(row) for row in rows], "l1", "mean"), weights).item()


def found(model: nn.Module, x: Any, steps: int = 3, surgery: bool = False, **options: Any) -> list[float]:
    """The penalty in several forwards, the first of which looks at more; each with a backward pass."""
    if surgery:
        options["surgery"] = PCGrad()
    penalties = []
    with SaliencyRegularizer(model, heads="heads", strength=1.0, **options) as regularizer:
        for _ in range(steps):
            outputs = model(x)
            penalties.append(regularizer())
            (sum(output.square().mean() for output in outputs) + penalties[-1]).backward()
    return [penalty.item() for penalty in penalties]


# A named tensor that others read, too.


def raw(m: Any, x: Tensor) -> Any:
    m.meant = x
    return m.all(m.body(x).tanh() * m.side(x).sigmoid())


def flat(m: Any, x: Tensor) -> Any:
    m.meant = rows = x.flatten(1)
    return m.all(m.side(rows).tanh() * m.body(rows))


def read_before(m: Any, x: Tensor) -> Any:
    m.meant = x
    early = x[:, :1] * m.side(x)
    return m.all(m.body(x) + early)


def behind_frozen(m: Any, x: Tensor) -> Any:
    m.side.requires_grad_(False)
    m.meant = hidden = m.side(x)
    return m.all(hidden + m.gate(hidden).tanh())


def trained(m: Any, x: Tensor) -> Any:
    m.meant = hidden = m.side(x)
    return m.all(hidden * m.gate(hidden).tanh())


def gated_heads(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.inner(m.body(x))
    return m.all(feature, m.gate(feature))


def twice_in_one_head(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.inner(m.body(x))
    return m.all(feature, feature)


def nested(m: Any, x: Tensor) -> Any:
    m.meant = m.body(x)
    return m.all(m.inner(m.gate(m.meant)) + m.meant)


NAMED: dict[str, tuple[Any, str, tuple[int, ...], bool]] = {
    "a raw input": (raw, "body:input", (5, 3), False),
    "its second reader": (raw, "side:input", (5, 3), False),
    "a view of it": (flat, "body:input", (5, 3, 1), False),
    "an operation before": (read_before, "body:input", (5, 3), False),
    "behind a frozen layer": (behind_frozen, "gate:input", (5, 3), False),
    "behind a trained layer": (trained, "gate:input", (5, 3), False),
    "heads and a gate": (gated_heads, "inner", (5, 3), True),
    "one head twice": (twice_in_one_head, "inner", (5, 3), True),
    "a residual": (nested, "body", (5, 3), False),
}


@SURGERY
@pytest.mark.parametrize("case", NAMED)
def test_a_named_tensor_whoever_reads_it(case: str, surgery: bool) -> None:
    between, feature, shape, gated = NAMED[case]
    model, x = Net(between, [Gated(), Gated()] if gated else ()), torch.randn(shape)
    leaf = x.clone().requires_grad_()
    outputs = model(leaf)
    expected = by_hand(outputs, model.meant)
    assert found(model, x, surgery=surgery, feature=feature) == pytest.approx([expected] * 3, abs=1e-12)
    assert not x.requires_grad
    assert x.grad is None


class WithContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, feature: Tensor, context: Any = None) -> Tensor:
        hidden = self.first(feature)
        if isinstance(context, list):
            context = context[0]
        return self.last((hidden if context is None else hidden * context.sigmoid()).tanh())


CONTEXTS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "an argument": lambda head, feature, context: head(feature, context),
    "a keyword": lambda head, feature, context: head(feature, context=context),
    "in a list": lambda head, feature, context: head(feature, [context]),
}


@SURGERY
@pytest.mark.parametrize("whose", ["all", "last"])
@pytest.mark.parametrize("way", CONTEXTS)
def test_a_context_that_heads_are_given_later_on(way: str, whose: str, surgery: bool) -> None:
    """Made of the feature that is named, which the first forwards do not tell."""

    def between(m: Any, x: Tensor) -> Any:
        m.meant = feature = m.inner(m.body(x))
        context = m.gate(feature)
        given = [m.on and (whose == "all" or head is m.heads[-1]) for head in m.heads]
        return [CONTEXTS[way](head, feature, context) if own else head(feature) for head, own in zip(m.heads, given)]

    model, x = Net(between, [WithContext(), WithContext(), WithContext()]), torch.randn(5, 3)
    options: dict[str, Any] = {"surgery": PCGrad()} if surgery else {}
    expected, penalties = [], []
    for model.on in (False, True, False):
        outputs = model(x)
        expected.append(by_hand(outputs, model.meant))
    with SaliencyRegularizer(model, "heads", feature="inner", strength=1.0, **options) as regularizer:
        for model.on in (False, True, False):
            loss = sum(output.square().mean() for output in model(x))
            penalty = regularizer()
            (loss + penalty).backward()
            penalties.append(penalty.item())
    assert penalties == pytest.approx(expected, abs=1e-12)
    assert abs(expected[1] - expected[0]) > 1e-3


def test_what_is_read_twice_needs_no_name() -> None:
    model, x = Net(twice_in_one_head, [Gated(), Gated()]), torch.randn(5, 3)
    expected = by_hand(model(x), model.meant)
    for surgery in (False, True):
        assert found(model, x, surgery=surgery) == pytest.approx([expected] * 3, abs=1e-12)


def test_no_graph_of_a_frozen_backbone_after_the_first_forward() -> None:
    seen = []

    def alone(m: Any, x: Tensor) -> Any:
        m.side.requires_grad_(False)
        hidden = m.side(x)
        seen.append(hidden.requires_grad)
        return m.all(m.gate(hidden))

    model, x = Net(alone), torch.randn(5, 3)
    first, second, third = found(model, x, feature="gate:input")
    assert seen == [True, False, False]
    assert first == second == third > 0


def test_a_named_input_that_nobody_can_follow() -> None:
    def under_no_grad(m: Any, x: Tensor) -> Any:
        with torch.no_grad():
            hidden = m.side(x)
        return m.all(m.gate(hidden))

    with pytest.warns(UserWarning, match=r"'gate:input' does not require grad.*Name the module whose output"):
        found(Net(under_no_grad), torch.randn(5, 3), feature="gate:input")


def test_under_surgery_nested_names_count_once() -> None:
    grads = []
    for surgery in (False, True):
        torch.manual_seed(0)
        model = Net(nested)
        regularizer = SaliencyRegularizer(
            model, heads="heads", strength=1.0, feature=["body", "inner"], surgery=PCGrad() if surgery else None
        )
        model(torch.randn(5, 3))
        regularizer().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


# A tensor that is changed in place later: as its twin that makes new tensors.


def tokens(m: Any, x: Tensor) -> Any:
    seen = m.body(x)  # [B, L, C], a view of what addmm returned
    context = m.gate(seen.mean(1))
    return m.all(m.act(seen).mean(1) + context)


def residual(m: Any, x: Tensor) -> Any:
    seen = m.body(x)
    step = seen.mean(1, keepdim=True).tanh()
    seen = seen.add_(step) if m.inplace else seen + step
    return m.all((seen * seen).mean(1))


def turned(m: Any, x: Tensor) -> Any:
    seen = m.turn(m.body(x))  # [B, C, L]
    return m.all(m.act(seen).square().mean(2))


def plain_map(m: Any, x: Tensor) -> Any:
    seen = m.inner(m.body(x))
    return m.all(m.times(seen, 3.0).mean(1))


IN_PLACE: dict[str, tuple[Any, str]] = {
    "tokens": (tokens, "body"),
    "a residual of tokens": (residual, "body"),
    "a transposed view": (turned, "turn"),
    "a map": (plain_map, "inner"),
}


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@SURGERY
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", IN_PLACE)
def test_a_feature_that_is_changed_in_place(case: str, frozen: bool, surgery: bool) -> None:
    between, feature = IN_PLACE[case]
    model, x = Net(between), torch.randn(5, 2, 3)
    model.turn = Turn()
    model.body.requires_grad_(not frozen)
    twin = copy.deepcopy(model)
    twin.inplace = True
    twin.act = nn.ReLU(inplace=True)
    options: dict[str, Any] = (
        {"feature": feature, "channel_axis": 1} if case == "a transposed view" else {"feature": feature}
    )
    expected = found(model, x, **options)
    assert found(twin, x, surgery=surgery, **options) == pytest.approx(expected, abs=1e-12)
    if not surgery:
        for one, other in zip(model.parameters(), twin.parameters()):
            if one.grad is not None or other.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=0)


def rows(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.body(x)
    return m.all(feature)


def each_flattens(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.body(x)
    return [head(feature.flatten(1)) for head in m.heads]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("between", "shape"), [(rows, (5, 3)), (rows, (5, 2, 3)), (each_flattens, (5, 1, 3))])
def test_heads_that_begin_in_place(between: Any, shape: tuple[int, ...], frozen: bool) -> None:
    model, x = Net(between, [mlp(nn.ReLU(inplace=True)), mlp(), mlp(nn.Tanh())]), torch.randn(shape)
    feature = model.body(x).detach().requires_grad_()
    read = feature.flatten(1) if between is each_flattens else feature
    outputs = [head[1:](read.relu()) if place == 0 else head(read.relu()) for place, head in enumerate(model.heads)]
    model.body.requires_grad_(not frozen)
    assert found(model, x) == pytest.approx([by_hand(outputs, feature)] * 3, abs=1e-12)


@SURGERY
def test_one_head_that_begins_in_place(surgery: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), mlp(nn.ReLU(inplace=True), outputs=3))
    x = torch.randn(5, 1, 3)
    feature = model[:2](x).detach().requires_grad_()
    expected = by_hand([column.unsqueeze(1) for column in model[2][1:](feature.relu()).unbind(1)], feature)
    options: dict[str, Any] = {"surgery": PCGrad()} if surgery else {}
    regularizer = SaliencyRegularizer(model, heads="2", tasks=list("abc"), strength=1.0, **options)
    loss = model(x).square().sum()
    penalty = regularizer()
    (loss + penalty).backward()
    assert penalty.item() == pytest.approx(expected, abs=1e-12)


def between_heads(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.inner(m.body(x))
    outputs = []
    for factor, head in enumerate(m.heads, 1):
        feature = m.times(feature, factor)
        outputs.append(head(feature))
    return outputs


def after_one_head(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.inner(m.body(x))
    first = m.heads[0](feature)
    return [first, m.heads[1](m.times(feature, 3.0))]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("between", [between_heads, after_one_head])
def test_a_map_that_is_changed_between_heads(between: Any, frozen: bool) -> None:
    model, x = Net(between, [mlp(Scaled()), mlp(Scaled())]), torch.randn(5, 3)
    expected = by_hand(model(x), model.meant)
    model.inplace = True
    model.body.requires_grad_(not frozen)
    with pytest.raises(CaptureError, match=r"changed in place.*after head 'heads.0' and before 'heads.1'.*feature="):
        found(model, x)
    assert found(model, x, feature="inner") == pytest.approx([expected] * 3, abs=1e-12)
    if not frozen:
        with pytest.raises(CaptureError, match="changed in place"):
            found(model, x, surgery=True)


class Scaled(nn.Module):
    """Saves nothing of what it reads, which autograd would miss."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


# Outputs that are changed in place.


class Late(nn.Module):
    """Each head's output is changed in place by the model."""

    def __init__(self, change: Callable[[Tensor], Any], outputs: int) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.heads = nn.ModuleList([mlp(outputs=outputs), mlp(outputs=outputs)])
        self.change = change

    def forward(self, x: Tensor) -> list[Tensor]:
        feature = self.body(x)
        outputs = [head(feature) for head in self.heads]
        for output in outputs:
            self.change(output)
        return outputs


@SURGERY
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    "change", [lambda out: out.add_(7.0), lambda out: out.mul_(-3.0), lambda out: out[:, 0].sigmoid_()]
)
def test_outputs_that_are_changed_in_place(change: Any, outputs: int, surgery: bool) -> None:
    model, x = Late(change, outputs), torch.randn(5, 3)
    unchanged = copy.deepcopy(model)
    unchanged.change = lambda output: None
    assert found(model, x, surgery=surgery) == pytest.approx(found(unchanged, x), abs=1e-12)


def test_an_output_that_is_changed_in_place_later_on() -> None:
    model, x = Late(lambda output: None, 1), torch.randn(5, 3)
    regularizer = SaliencyRegularizer(model, heads="heads")
    model(x)
    regularizer()
    model.change = lambda output: output.add_(1.0)
    model(x)
    with pytest.raises(CaptureError, match=r"pass output=lambda out: out.clone\(\)"):
        regularizer()
    model(x)
    regularizer()  # from now on a copy is kept
    regularizer.remove()
    regularizer = SaliencyRegularizer(model, heads="heads", output=lambda out: out.clone())
    model(x)
    regularizer()


# The rest.


def test_heads_that_read_copies() -> None:
    def copies(m: Any, x: Tensor) -> Any:
        feature = m.body(x)
        return [head(feature.clone()) for head in m.heads]

    def again(m: Any, x: Tensor) -> Any:
        return [head(m.body(x)) for head in m.heads]

    model, x = Net(rows), torch.randn(5, 3)
    expected = by_hand(model(x), model.meant)
    for between in (copies, again):
        model.between = between
        assert found(model, x) == pytest.approx([expected] * 3, abs=1e-12)
    model.between = lambda m, x: [head(m.body(x + place)) for place, head in enumerate(m.heads)]
    with pytest.raises(CaptureError, match="do not read the same tensor"):
        found(model, x)


@pytest.mark.parametrize("key", ["3", 3, "-1"])
def test_digit_keys_of_mappings(key: Any) -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Any:
            return {"other": x, key: self.layer(x)}

    def levels(m: Any, x: Tensor) -> Any:
        m.meant = m.enc(x)[key]
        return m.all(m.meant.tanh())

    model, x = Net(levels), torch.randn(5, 3)
    model.enc = Levels()
    expected = by_hand(model(x), model.meant)
    for surgery in (False, True):
        assert found(model, x, surgery=surgery, feature=f"enc:output.{key}") == pytest.approx([expected] * 3, abs=1e-12)
    model.enc.layer.requires_grad_(False)  # then it is replaced in the mapping
    assert found(model, x, feature=f"enc:output.{key}") == pytest.approx([expected] * 3, abs=1e-12)


def test_a_feature_under_no_grad() -> None:
    def probe(m: Any, x: Tensor) -> Any:
        with torch.no_grad():
            feature = m.body(x)
        return m.all(feature)

    model, x = Net(probe), torch.randn(5, 3)
    with pytest.raises(CaptureError, match=r"ran under no_grad.*Leave feature= out"):
        found(model, x, feature="body")
    assert min(found(model, x)) > 0

    def teacher(m: Any, x: Tensor) -> Any:  # the same module beside it
        m.meant = feature = m.body(x)
        with torch.no_grad():
            m.body(x + 1)
        return m.all(feature)

    model.between = teacher
    assert found(model, x, feature="body") == pytest.approx([by_hand(model(x), model.meant)] * 3, abs=1e-12)


def test_several_forwards_before_one_call() -> None:
    model, x = Net(rows), torch.randn(5, 3)
    regularizer = SaliencyRegularizer(model, heads="heads")
    model(x)
    model(x)
    with pytest.warns(UserWarning, match=r"2 forwards ran before this call.*after each forward"):
        regularizer()
    model(x)
    model(x)
    regularizer()  # told once


@pytest.mark.parametrize("alone", [0, 1])
def test_parts_called_one_by_one_after_a_head_ran_alone(alone: int) -> None:
    model, x = Net(rows), torch.randn(5, 3)
    regularizer = SaliencyRegularizer(model, heads="heads", strength=1.0)
    model.heads[alone](model.body(x * 2))
    feature = model.body(x)
    outputs = [head(feature) for head in model.heads]
    assert regularizer().item() == pytest.approx(by_hand(outputs, feature), abs=1e-12)
    for scale, head in enumerate(model.heads, 1):
        head(feature * scale)
    with pytest.raises(CaptureError, match="do not read the same tensor"):
        regularizer()


def test_a_list_of_axes_under_surgery() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 5, 1)
            self.head = nn.Sequential(nn.Conv1d(5, 4, 1), nn.Tanh(), nn.Conv1d(4, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)).tanh())

    penalties = []
    for options in ({}, {"surgery": PCGrad()}):
        torch.manual_seed(0)
        model = Maps()
        regularizer = SaliencyRegularizer(
            model,
            heads="head",
            tasks=list("abc"),
            feature=["second", "first"],
            channel_axis=[1, 1],
            strength=1.0,
            **options,
        )
        loss = model(torch.randn(5, 3, 6)).square().mean()
        penalties.append(regularizer())
        (loss + penalties[-1]).backward()
    assert penalties[0].item() == pytest.approx(penalties[1].item(), abs=1e-12)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_one_tensor_named_twice_under_surgery(strength: float) -> None:
    def drop(m: Any, x: Tensor) -> Any:
        return m.all(m.drop(m.body(x)))

    model, x = Net(drop).eval(), torch.randn(5, 3)
    model.drop = nn.Dropout(0.5).eval()
    gradients, penalties = [], []
    for surgery in (None, lambda gramian: torch.ones(2)):
        model.zero_grad()
        with SaliencyRegularizer(
            model, heads="heads", feature=["body", "drop"], surgery=surgery, strength=strength
        ) as regularizer:
            outputs = model(x)
            penalties.append(regularizer())
            (sum(output.square().mean() for output in outputs) + penalties[-1]).backward()
        gradients.append(model.body.weight.grad.clone())
    assert penalties[0].item() == pytest.approx(penalties[1].item(), abs=1e-12)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_tensors_without_a_saliency() -> None:
    texts = torch.nested.nested_tensor([torch.randn(3, 3), torch.randn(5, 3)], layout=torch.jagged)
    for feature in (None, "body"):
        with pytest.raises(CaptureError, match=r"nested \(jagged\).*Pad the batch"):
            found(Net(rows), texts, feature=feature)
    for feature in (None, "turn"):
        model = Net(lambda m, x: m.all(m.turn(torch.complex(m.body(x), m.body(x)))), [Real(), Real()])
        model.turn = nn.Tanh()
        with pytest.raises(CaptureError, match="is complex"):
            found(model, torch.randn(5, 3), feature=feature)


class Real(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.abs())


@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.parametrize("on_the_way", [Reverse.apply, lambda x: x.view_as(x)], ids=["reversed", "a view"])
def test_a_named_output_is_not_what_heads_make_of_its_memory(on_the_way: Any, surgery: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"backbone": nn.Linear(3, 4), "heads": nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])})
    options: dict[str, Any] = {"surgery": PCGrad()} if surgery else {}
    regularizer = SaliencyRegularizer(
        model, "heads", feature="backbone", strength=1.0, custom_backward="ignore", **options
    )
    feature = on_the_way(model["backbone"](torch.randn(5, 3)))
    for head in model["heads"]:
        head(feature)
    rows = [head.weight[0] for head in model["heads"]]
    sign = -1 if on_the_way == Reverse.apply else 1
    extractor, found = regularizer._extractor, []
    extract = extractor.extract
    extractor.extract = lambda *args, **kwargs: found.append(extract(*args, **kwargs)) or found[0]
    torch.testing.assert_close(regularizer(), (rows[0] - rows[1]).abs().sum())
    torch.testing.assert_close(found[0].values[:, 0], sign * torch.stack(rows))
