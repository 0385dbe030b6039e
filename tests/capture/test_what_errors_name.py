"""Errors name what is in the model: what they say to pass works, and is the saliency at that place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from saliency_reg.errors import CaptureError, HeadNotFoundError, NoHeadRanError, NotConnectedError, TaskError

pytestmark = pytest.mark.usefixtures("float64")


def said(model: nn.Module, x: Any, error: type[Exception] = CaptureError, **options: Any) -> str:
    """Return what the error of the first call says."""
    with SaliencyRegularizer(model, **{"strength": 0.1, "metric": "l1", **options}) as regularizer:
        model(x)
        with pytest.raises(error) as caught:
            regularizer()
    return str(caught.value)


def passed(text: str, name: str, number: int = 0) -> Any:
    """Return what an error says to pass."""
    found = re.findall(rf"\b{name}=('[^']*'|\[[^\]]*\]|\{{.*?\}}|\d+)", text)
    assert len(found) > number, text
    return eval(found[number])


def penalty(model: nn.Module, x: Any, **options: Any) -> float:
    with SaliencyRegularizer(
        model, strength=1.0, custom_backward="ignore", **{"metric": "l1", **options}
    ) as regularizer:
        model(x)
        return regularizer().item()


def by_hand(feature: Tensor | list[Tensor], outputs: list[Tensor]) -> float:
    """The penalty of two tasks with one output each (summed where there are several), l1, at these tensors."""
    maps = feature if isinstance(feature, list) else [feature]
    saliencies = []
    for output in outputs:
        gradients = torch.autograd.grad(output.sum(), maps, retain_graph=True)
        saliencies.append(torch.cat([g if g.ndim == 2 else g.flatten(2).sum(2) for g in gradients], 1))
    return (saliencies[0] - saliencies[1]).abs().sum(1).mean().item()


def smooth(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, o), nn.Tanh())


# Modules that run once for each task are not shared; neither are those whose output only some heads read.


class Attention(nn.Module):
    """A shared network with a mask of each task at two levels, and a block that all tasks run, each for itself."""

    def __init__(self, through: str = "block") -> None:
        super().__init__()
        self.through = through
        self.first, self.second, self.block = smooth(4, 5), smooth(5, 5), smooth(5, 5)
        self.masks = nn.ModuleList([smooth(5, 5) for _ in range(4)])
        self.heads = nn.ModuleList([nn.Linear(5, 1) for _ in range(2)])

    def parts(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        a = self.first(x)
        b = self.second(a)
        own = [self.masks[task](a) * a for task in range(2)]
        if self.through == "block":
            own = [self.block(one) for one in own]
        elif self.through == "parts of it":
            own = [self.block[1](self.block[0](one)) for one in own]
        return [a, b], [self.masks[2 + task](own[task] + b) * b for task in range(2)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(own) for head, own in zip(self.heads, self.parts(x)[1])]


@pytest.mark.parametrize("through", ["block", "parts of it", "nothing"])
def test_what_runs_for_each_task_is_not_proposed(through: str) -> None:
    model, x = Attention(through), torch.randn(3, 4)
    text = said(model, x, heads="heads")
    assert (
        "outputs of 'second', 'first' (the nearest first): pass feature='second', or feature=['second', 'first']"
        in text
    )
    for number, place in enumerate(["b", "both"]):
        (a, b), own = model.parts(x)
        outputs = [head(one) for head, one in zip(model.heads, own)]
        expected = by_hand(b if place == "b" else [b, a], outputs)
        assert penalty(model, x, heads="heads", feature=passed(text, "feature", number)) == pytest.approx(
            expected, 1e-10
        )


def test_a_feature_that_a_head_does_not_read_is_answered_with_others() -> None:
    model, x = Attention(), torch.randn(3, 4)
    for feature in ("masks.0", "masks.1", "block"):
        text = said(model, x, NotConnectedError, heads="heads", feature=feature)
        assert passed(text, "feature") == "second"
    assert penalty(model, x, heads="heads", feature=passed(text, "feature")) > 0


# Skips.


class Skips(nn.Module):
    def __init__(self, levels: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([smooth(4, 4) for _ in range(levels)])
        self.ups = nn.ModuleList([nn.ModuleList([smooth(8, 4) for _ in range(levels - 1)]) for _ in range(2)])
        self.outs = nn.ModuleList([nn.Linear(4, 1) for _ in range(2)])

    def parts(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        maps = []
        for down in self.down:
            x = down(x)
            maps.append(x)
        outputs = []
        for ups, out in zip(self.ups, self.outs):
            y = maps[-1]
            for up, skip in zip(ups, maps[-2::-1]):
                y = up(torch.cat([y, skip], 1))
            outputs.append(out(y))
        return maps, outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.parts(x)[1]


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_all_that_is_read_by_skips_is_proposed(levels: int) -> None:
    model, x = Skips(levels), torch.randn(3, 4)
    text = said(model, x, heads="outs")
    last, every = passed(text, "feature"), passed(text, "feature", 1)
    assert last == f"down.{levels - 1}"
    assert every == [f"down.{level}" for level in reversed(range(levels))]
    maps, outputs = model.parts(x)
    assert penalty(model, x, heads="outs", feature=last) == pytest.approx(by_hand(maps[-1], outputs), 1e-10)
    assert penalty(model, x, heads="outs", feature=every) == pytest.approx(by_hand(maps[::-1], outputs), 1e-10)


# Parts of what a module returns.


@dataclass
class Output:
    states: Tensor
    pooled: Tensor


class Encoder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, smooth(4, 5)

    def forward(self, x: Tensor) -> Any:
        states = self.layer(x)
        return {
            "tuple": lambda: (states, states.detach()),
            "dict": lambda: {"mask": torch.ones(3), "states": states},
            "nested": lambda: (None, [states]),
            "dataclass": lambda: Output(states, states.detach()),
        }[self.kind]()

    def of(self, value: Any) -> Tensor:
        picks: dict[str, Callable[[Any], Tensor]] = {
            "tuple": lambda v: v[0],
            "dict": lambda v: v["states"],
            "nested": lambda v: v[1][0],
            "dataclass": lambda v: v.states,
        }
        return picks[self.kind](value)


class Joint(nn.Module):
    """One head reads a vector, the other one what it is made of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.encoder, self.pooler = Encoder(kind), smooth(5, 3)
        self.intent_head, self.slot_head = nn.Linear(3, 1), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        self.states = self.encoder.of(self.encoder(x))
        return [self.intent_head(self.pooler(self.states)), self.slot_head(self.states)]


@pytest.mark.parametrize(
    ("kind", "part"), [("tuple", "0"), ("dict", "states"), ("nested", "1.0"), ("dataclass", "states")]
)
def test_the_part_that_is_shared_is_named(kind: str, part: str) -> None:
    model, x = Joint(kind), torch.randn(3, 4)
    feature = passed(said(model, x), "feature")
    assert feature == f"encoder:output.{part}"
    outputs = model(x)
    expected = by_hand(model.states, outputs)
    assert penalty(model, x, feature=feature) == pytest.approx(expected, 1e-10)


def test_the_input_of_a_module_is_named_where_it_is_a_tensor() -> None:
    model = Joint("tuple")
    assert "or 'encoder:input' for what that module reads" in said(model, torch.randn(3, 4))
    model.encoder.layer = nn.Sequential(nn.Embedding(4, 5), nn.Flatten(), smooth(10, 5))
    assert ":input" not in said(model, torch.randint(4, (3, 2)))
    assert "pool:input" not in said(model, torch.randint(4, (3, 2)))


# Heads that are called with several maps.


class Levels(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.convs = nn.ModuleList([nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 2, 2)])

    def forward(self, x: Tensor) -> Any:
        maps = [conv(x).tanh() for conv in self.convs]
        return {"list": maps, "dict": {"p2": maps[0], "p3": maps[1]}, "changed": maps}[self.kind]


class OnLevels(nn.Module):
    def __init__(self, cells: bool) -> None:
        super().__init__()
        self.conv, self.cells = nn.Conv2d(3, 2, 1), cells

    def forward(self, maps: Any) -> Tensor:
        every = [self.conv(one).tanh().flatten(2) for one in (maps.values() if isinstance(maps, dict) else maps)]
        joined = torch.cat(every, 2).transpose(1, 2)  # [B, cells, 2]
        return joined if self.cells else joined.sum((1, 2))[:, None]


class Detector(nn.Module):
    def __init__(self, kind: str, cells: bool) -> None:
        super().__init__()
        self.backbone = Levels(kind)
        self.heads = nn.ModuleDict({task: OnLevels(cells) for task in "ab"})

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone(x)
        if self.backbone.kind == "changed":
            maps = [one * 2 for one in maps]
        self.maps = list(maps.values()) if isinstance(maps, dict) else maps
        return [head(maps) for head in self.heads.values()]


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("list", ["backbone:output.0", "backbone:output.1"]),
        ("dict", ["backbone:output.p2", "backbone:output.p3"]),
        ("changed", ["heads.a:input.0.0", "heads.a:input.0.1"]),
    ],
)
def test_the_maps_that_heads_are_called_with_are_named(kind: str, named: list[str], cells: bool) -> None:
    model, x = Detector(kind, cells), torch.randn(3, 2, 4, 4)
    text = said(model, x)
    assert passed(text, "feature") == named
    assert ("scalarize=lambda" in text) == cells
    options: dict[str, Any] = {"scalarize": lambda output: output.sum(1)} if cells else {}
    outputs = model(x)
    expected = by_hand(model.maps, outputs)
    assert penalty(model, x, feature=named, **options) == pytest.approx(expected, 1e-10)


# Heads whose methods are called.


class Method(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        if order == "backwards":
            self.out, self.act, self.hidden = nn.Linear(4, 1), nn.Tanh(), nn.Linear(5, 4)
        elif order == "one":
            self.out = nn.Linear(5, 1)
        else:
            self.layers = nn.ModuleList([nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)])

    def predict(self, z: Tensor) -> Tensor:
        if self.order == "backwards":
            return self.out(self.act(self.hidden(z)))
        if self.order == "one":
            return self.out(z)
        for layer in self.layers:
            z = layer(z)
        return z


class Methods(nn.Module):
    def __init__(self, order: str, tasks: int) -> None:
        super().__init__()
        self.encoder, self.heads = smooth(4, 5), nn.ModuleList([Method(order) for _ in range(tasks)])

    def forward(self, x: Tensor) -> list[Tensor]:
        self.z = self.encoder(x)
        return [head.predict(self.z) for head in self.heads]


@pytest.mark.parametrize(
    ("order", "first"),
    [
        ("backwards", ["heads.0.hidden", "heads.0.act", "heads.0.out"]),
        ("one", "heads.0.out"),
        ("list", ["heads.0.layers.0", "heads.0.layers.1", "heads.0.layers.2"]),
    ],
)
def test_the_modules_that_methods_call_are_named_for_each_task(order: str, first: Any) -> None:
    model, x = Methods(order, 2), torch.randn(3, 4)
    heads = passed(said(model, x, NoHeadRanError, heads="heads"), "heads")
    assert heads["0"] == first
    assert list(heads) == ["0", "1"]
    outputs = model(x)
    expected = by_hand(model.z, outputs)
    assert penalty(model, x, heads=heads) == pytest.approx(expected, 1e-10)


def test_of_many_tasks_some_are_named() -> None:
    text = said(Methods("one", 8), torch.randn(3, 4), NoHeadRanError, heads="heads")
    assert "'5': 'heads.5.out', ...} (for each task from where its head begins to its output)" in text


# Mappings that leave tasks out.


class Several(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.one, self.two = kind, nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, z: Tensor) -> Any:
        a, b = self.one(z).tanh(), self.two(z).tanh()
        return {"tuple": (a, b), "dict": {"mean": a, "deviation": b}, "dataclass": Output(a, b), "tensor": a}[self.kind]


class Uncertain(nn.Module):
    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.encoder = smooth(4, 5)
        self.heads = nn.ModuleDict({task: Several(kind) for task, kind in zip("ab", kinds)})

    def forward(self, x: Tensor) -> list[Any]:
        self.z = self.encoder(x)
        return [head(self.z) for head in self.heads.values()]


@pytest.mark.parametrize(
    ("kinds", "output"),
    [
        (("tensor", "tuple"), {"b": 0}),
        (("dict", "tensor"), {"a": "mean"}),
        (("tensor", "dataclass"), {"b": "states"}),
        (("dict", "tuple"), {"a": "mean", "b": 0}),
        (("tuple", "tuple"), 0),
        (("dataclass", "dataclass"), "states"),
    ],
)
def test_the_parts_of_outputs_are_named_for_heads_that_need_it(kinds: tuple[str, str], output: Any) -> None:
    model, x = Uncertain(*kinds), torch.randn(3, 4)
    assert passed(said(model, x), "output") == output
    found = penalty(model, x, output=output, scalarize="sum")
    z = model.encoder(x)
    outputs = [head.one(z).tanh() for head in model.heads.values()]
    assert found == pytest.approx(by_hand(z, outputs), 1e-10)


def test_scalarize_for_some_tasks_is_auto_for_the_others() -> None:
    model, x = Uncertain("tensor", "tensor"), torch.randn(3, 4)
    for task in "ab":
        whole = {**dict.fromkeys("ab", "auto"), task: "logsumexp"}
        assert penalty(model, x, scalarize={task: "logsumexp"}) == penalty(model, x, scalarize=whole)
    assert penalty(model, x, scalarize={}) == penalty(model, x)
    for name in ("scalarize", "output"):
        with pytest.raises(TaskError, match=rf"{name}= names \['c'\].*The tasks are \['a', 'b'\]"):
            SaliencyRegularizer(model, **{"strength": 0.1, "metric": "l1", name: {"c": "sum"}})


# Heads that were not found.


class Own(nn.ModuleDict):
    """Its forward runs the members side by side."""

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        return {task: member(z) for task, member in self.items()}


class OwnList(nn.ModuleList):
    def forward(self, z: Tensor) -> list[Tensor]:
        return [member(z) for member in self]


@pytest.mark.parametrize("name", ["fc", "outputs", "heads"])
@pytest.mark.parametrize("kind", ["dict", "list"])
def test_members_of_containers_with_a_forward_are_found(name: str, kind: str) -> None:
    members = {"a": nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)), "b": nn.Linear(5, 1)}
    model = nn.Sequential()
    model.add_module("body", smooth(4, 5))
    model.add_module(name, Own(members) if kind == "dict" else OwnList(members.values()))
    x = torch.randn(3, 4)
    if kind == "list" and name != "heads":  # a list may be anything
        with pytest.raises(HeadNotFoundError, match=rf"e.g. heads='{name}'\.") as caught:
            SaliencyRegularizer(model, strength=0.1, metric="l1")
        heads = passed(str(caught.value), "heads")
        assert penalty(model, x, heads=heads) > 0
        return
    with SaliencyRegularizer(model, strength=1.0, metric="l1") as regularizer:
        outputs = model(x)
        found = regularizer().item()
    assert len(outputs) == 2
    z = model[0](x)
    assert found == pytest.approx(by_hand(z, [member(z) for member in members.values()]), 1e-10)


def model_of(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def lists(*sizes: tuple[int, int]) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(*size) for size in sizes])


@pytest.mark.parametrize(
    ("children", "words"),
    [
        ({"layers": lists((4, 4), (4, 4)), "exits": lists((4, 2), (4, 2))}, "e.g. heads='exits'."),
        ({"encoder": nn.Linear(4, 4), "scoring": lists((4, 4), (4, 1))}, "e.g. heads='scoring'."),
        ({"body": nn.Linear(4, 5), "pos": nn.Linear(5, 2), "ner": nn.Linear(5, 3)}, "e.g. heads=['pos', 'ner']."),
        ({"stages": lists((4, 5), (5, 6)), "fc": nn.Linear(6, 4)}, "or heads='fc', tasks=[...] for one layer"),
        ({f"conv{i}": nn.Linear(4, 4) for i in range(12)} | {"last": nn.Linear(4, 3)}, "the last first: 'last' with 3"),
    ],
)
def test_examples_are_names_of_the_model(children: dict[str, nn.Module], words: str) -> None:
    with pytest.raises(HeadNotFoundError, match=re.escape(words)):
        SaliencyRegularizer(model_of(**children), strength=0.1, metric="l1")


def test_the_number_of_columns_is_printed() -> None:
    model = model_of(body=nn.Linear(4, 5), fc=nn.Linear(5, 12))
    assert "'fc', one column for each of 12 tasks" in repr(SaliencyRegularizer(model, "fc", strength=0.1, metric="l1"))


# Nothing of it stays on the model.


def test_modules_are_watched_in_the_first_forward_alone() -> None:
    model, x = Uncertain("tensor", "tensor"), torch.randn(3, 4)
    layer = model.encoder[0]
    before = dict(layer._forward_hooks)
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(len(layer._forward_hooks)))
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    for _ in range(3):
        model(x)
        assert len(layer._forward_hooks) == len(before) + 1
        regularizer()
    assert seen == [2, 1, 1]


def test_modules_are_not_watched_for_ever() -> None:
    model, seen = Uncertain("tensor", "tensor"), []
    layer = model.encoder[0]
    layer.register_forward_hook(lambda *_: seen.append(len(layer._forward_hooks)))
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    for _ in range(10):
        model(torch.randn(3, 4))
        with torch.no_grad():
            regularizer()
    assert seen == [2] * 8 + [1] * 2


def test_modules_are_not_watched_behind_a_forward_that_raised() -> None:
    model = Uncertain("tensor", "tensor")
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 7))
    assert not model.encoder[0]._forward_hooks
    model(torch.randn(3, 4))
    assert regularizer() >= 0


def test_compiled_parts_are_not_watched() -> None:
    model = Uncertain("tensor", "tensor")
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    model.encoder.compile(backend=backend)
    with SaliencyRegularizer(model, strength=0.1, metric="l1") as regularizer:
        for _ in range(3):
            model(torch.randn(3, 4))
            regularizer()
    assert calls == [1]
