"""Heads that are chains of modules, heads with several columns for each task, and what is said where neither is named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, PCGrad, SaliencyRegularizer
from saliency_reg.errors import (
    AmbiguousHeadsError,
    CaptureError,
    ConfigurationError,
    HeadNotFoundError,
    NoHeadRanError,
    TaskError,
    WrongTypeError,
)
from tests.reference.slow import slow_distances, slow_penalty

TASKS = ("a", "b", "c")


def expected_penalty(feature: Tensor, outputs: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
    """The penalty by explicit autograd, sample by sample; ``outputs`` are those of all tasks, ``[1, K]`` each."""
    saliencies: list[list[Tensor]] = [[] for _ in outputs(feature[:1])]
    for sample in feature.split(1):
        own = sample.detach().requires_grad_()
        for task, output in enumerate(outputs(own)):
            logits = output.flatten()
            scalar = logits.amax() - logits.mean()
            if len(logits) <= 2:
                scalar = logits[1] - logits[0] if len(logits) == 2 else logits.sum()
            saliencies[task].append(torch.autograd.grad(scalar, own, retain_graph=True)[0][0])
    count = len(saliencies)
    weights = torch.full((count, count), 2 / (count * (count - 1)), dtype=torch.float64)
    return slow_penalty(slow_distances(saliencies, "l1", "mean"), weights)


def chain(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(1, len(widths)):
        layers += [nn.Linear(widths[index - 1], widths[index]), nn.Tanh()]
    return nn.Sequential(*layers)


class Towers(nn.Module):
    """Branches in two containers."""

    def __init__(self, outputs: int = 1, kind: Any = nn.ModuleList, hidden: int = 6) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        members = [chain(5, hidden) for _ in TASKS], [nn.Linear(hidden, outputs) for _ in TASKS]
        if kind is nn.ModuleDict:
            self.towers, self.last = (kind(dict(zip(TASKS, own))) for own in members)
        else:
            self.towers, self.last = (kind(own) for own in members)

    def of(self, shared: Tensor) -> list[Tensor]:
        pairs = (each.values() if isinstance(each, nn.ModuleDict) else each for each in (self.towers, self.last))
        return [last(torch.relu(tower(shared))) for tower, last in zip(*pairs)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.of(self.bottom(x))


class Layered(Towers):
    """All towers run before the last layers do, and return the same."""

    def of(self, shared: Tensor) -> list[Tensor]:
        hidden = [tower(shared) for tower in self.towers]
        return [last(torch.relu(one)) for last, one in zip(self.last, hidden)]


class Named(nn.Module):
    """Branches as attributes, of three modules each."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        for task in TASKS:
            setattr(self, f"tower_{task}", chain(5, 6))
            setattr(self, f"middle_{task}", chain(6, 3))
            setattr(self, f"out_{task}", nn.Linear(3, 2))

    def of(self, shared: Tensor) -> list[Tensor]:
        found = []
        for task in TASKS:
            hidden = getattr(self, f"middle_{task}")(getattr(self, f"tower_{task}")(shared))
            found.append(getattr(self, f"out_{task}")(hidden))
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.of(self.bottom(x))


def by_index(first: str, last: str, keys: Sequence[Any] = range(3)) -> dict[str, list[str]]:
    return {task: [f"{first}.{key}", f"{last}.{key}"] for task, key in zip(TASKS, keys)}


BRANCHES: dict[str, tuple[Callable[[], Any], Any]] = {
    "lists": (Towers, by_index("towers", "last")),
    "dictionaries": (lambda: Towers(3, nn.ModuleDict), by_index("towers", "last", TASKS)),
    "layer by layer": (Layered, by_index("towers", "last")),
    "three modules": (Named, {t: [f"tower_{t}", f"middle_{t}", f"out_{t}"] for t in TASKS}),
    "a list of lists": (lambda: Towers(2), list(by_index("towers", "last").values())),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_list_of_modules_is_one_head(name: str) -> None:
    torch.manual_seed(0)
    make, heads = BRANCHES[name]
    model, x = make().double(), torch.randn(4, 4).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SaliencyRegularizer(model, heads, strength=1.0) as regularizer:
            model(x)
            penalty = regularizer()
    torch.testing.assert_close(penalty.double(), expected_penalty(model.bottom(x), model.of), rtol=1e-6, atol=0)
    assert all(head in set(model.modules()) for head in regularizer.heads)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", BRANCHES)
def test_a_list_of_modules_is_one_head_under_surgery(name: str) -> None:
    """The backbone's gradient is that of explicit PCGrad at the map, and the penalty's beside it."""
    torch.manual_seed(0)
    make, heads = BRANCHES[name]
    model, x = make().double(), torch.randn(4, 4).double()
    plain = copy.deepcopy(model)

    def losses(outputs: Sequence[Tensor]) -> list[Tensor]:
        return [(output - 2 * index).square().mean() for index, output in enumerate(outputs)]

    weights = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    regularizer = SaliencyRegularizer(model, heads, strength=0.3, surgery=lambda gramian: weights)
    (sum(losses(model(x))) + regularizer()).backward()

    other = SaliencyRegularizer(plain, heads, strength=0.3)
    outputs = plain(x)
    penalty = other()
    (sum(weight * loss for weight, loss in zip(weights, losses(outputs))) + penalty).backward()
    for own, its in zip(model.bottom.parameters(), plain.bottom.parameters()):
        torch.testing.assert_close(own.grad, its.grad)


def test_branches_of_which_some_do_not_run() -> None:
    torch.manual_seed(0)
    model, x = Towers().double(), torch.randn(4, 4).double()
    regularizer = SaliencyRegularizer(model, by_index("towers", "last"), strength=1.0)
    hidden = [tower(model.bottom(x)) for tower in model.towers]  # all begin, of one forward each
    regularizer._capture.drop()
    shared = model.bottom(x)
    hidden = [tower(shared) for tower in model.towers]
    for index in (0, 2):
        model.last[index](hidden[index])
    regularizer()
    assert regularizer.report.distances[0, 2] > 0
    assert regularizer.report.distances[0, 1].isnan()


@pytest.mark.parametrize(
    ("heads", "error", "text"),
    [
        (
            {"a": ["bottom", "last.0"], "b": ["bottom", "last.1"]},
            TaskError,
            "'bottom' was given twice.*what heads share",
        ),
        ({"a": ["towers.0", "towers.0.0"], "b": "last.1"}, TaskError, "is part of head"),
        ({"a": [], "b": "last.1"}, HeadNotFoundError, "empty list"),
        ({"a": ["towers", "last"], "b": "last.1"}, TaskError, "is part of head"),
        (["towers", "last"], HeadNotFoundError, r"'towers' is a ModuleList.*\['towers.0', 'last.0'\]"),
        ({"a": ["towers.0", 3], "b": "last.1"}, WrongTypeError, "found int"),
    ],
)
def test_lists_that_are_no_heads(heads: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SaliencyRegularizer(Towers(), heads)


def test_branches_cannot_be_run_by_themselves() -> None:
    with pytest.raises(ConfigurationError, match="run_all_heads"):
        SaliencyRegularizer(Towers(), by_index("towers", "last"), run_all_heads=True)


# Hidden layers that are given as heads.


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (Towers, "towers"),
        (lambda: Towers(3, nn.ModuleDict), "towers"),
        (Layered, ["towers.0", "towers.1", "towers.2"]),
        (Named, [f"tower_{task}" for task in TASKS]),
        (Named, "tower_?"),
    ],
)
def test_heads_that_go_on_are_followed_to_their_outputs(make: Any, heads: Any) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(4, 4).double()
    expected = expected_penalty(model.bottom(x), model.of)
    regularizer = SaliencyRegularizer(model, heads, strength=1.0)
    with pytest.warns(UserWarning, match="ends in a hidden layer.*To say so, pass heads="):
        model(x)
    torch.testing.assert_close(regularizer().double(), expected, rtol=1e-6, atol=0)


def test_a_list_says_where_a_head_ends() -> None:
    torch.manual_seed(0)
    model, x = Towers().double(), torch.randn(4, 4).double()
    regularizer = SaliencyRegularizer(model, {task: [f"towers.{i}"] for i, task in enumerate(TASKS)}, strength=1.0)
    model(x)
    with pytest.warns(UserWarning, match=r"'last.0'.*read the outputs of heads.*pass a list"):
        penalty = regularizer()
    expected = expected_penalty(model.bottom(x), lambda shared: [tower(shared) for tower in model.towers])
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Linear(4, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 6) for task in TASKS})
        self.proj = nn.ModuleDict({task: nn.Linear(5, 6) for task in TASKS})
        self.fusion = nn.Linear(18, 1)

    def forward(self, x: Tensor) -> Any:
        shared = self.bottom(x)
        outputs = [head(shared) for head in self.heads.values()]
        return {"all": [self.fusion(torch.cat(outputs, 1).relu())], "beside": [p(shared) for p in self.proj.values()]}


def test_what_reads_the_heads_is_told_once() -> None:
    model = Fused()
    regularizer = SaliencyRegularizer(model, "heads")
    model(torch.randn(3, 4))
    with pytest.warns(UserWarning, match="'fusion' read the outputs of heads, 'fusion' that of 'heads") as caught:
        regularizer()
    assert "proj" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 4))
        regularizer()


def test_heads_that_nothing_reads_are_not_told_of() -> None:
    """Not of modules beside the heads either, with names and widths that would fit."""

    class Beside(Fused):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({task: nn.Linear(5, 5) for task in TASKS})

        def forward(self, x: Tensor) -> Any:
            shared = self.bottom(x)
            outputs = [head(shared) for head in self.heads.values()]
            return outputs, [proj(shared) for proj in self.proj.values()]

    torch.manual_seed(0)
    model, x = Beside().double(), torch.randn(3, 4).double()
    regularizer = SaliencyRegularizer(model, "heads", strength=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        penalty = regularizer()
    expected = expected_penalty(model.bottom(x), lambda shared: [head(shared) for head in model.heads.values()])
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)


# Several columns for each task.


class Joint(nn.Module):
    """One layer for all tasks behind a backbone; ``shaped`` makes something of its output."""

    def __init__(self, columns: int, shaped: Callable[[Tensor], Tensor] = lambda x: x, smooth: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        layer = nn.Linear(5, columns)
        self.head = Shaped(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), layer) if smooth else layer, shaped)
        self.fc = nn.Linear(5, columns)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Shaped(nn.Module):
    def __init__(self, net: nn.Module, shaped: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.shaped = net, shaped

    def forward(self, x: Tensor) -> Tensor:
        return self.shaped(self.net(x))


GROUPS: dict[str, Any] = {
    "slices": {"a": slice(0, 4), "b": slice(4, 8), "c": slice(8, 12)},
    "of several sizes, with some for nobody": {"a": slice(1, 4), "b": 5, "c": [6, 9, 11]},
    "every third": {"a": slice(0, None, 3), "b": range(1, 12, 3), "c": slice(-10, None, 3)},
}


def columns_of(given: Mapping[str, Any], width: int) -> list[list[int]]:
    every = list(range(width))
    return [
        every[own] if isinstance(own, slice) else [own] if isinstance(own, int) else list(own) for own in given.values()
    ]


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_columns(name: str, smooth: bool) -> None:
    torch.manual_seed(0)
    model, x = Joint(12, smooth=smooth).double(), torch.randn(4, 4).double()
    regularizer = SaliencyRegularizer(model, "head.net", columns=GROUPS[name], strength=1.0)
    model(x)
    penalty = regularizer()
    own = columns_of(GROUPS[name], 12)
    expected = expected_penalty(model.backbone(x), lambda shared: [model.head(shared)[:, each] for each in own])
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)
    assert regularizer.tasks == ("a", "b", "c")


@pytest.mark.parametrize(
    ("shaped", "parts"),
    [
        (lambda out: out.unflatten(1, (3, 4)), lambda out: out.unbind(1)),
        (lambda out: out.unflatten(1, (4, 3)).transpose(1, 2), lambda out: out.unbind(1)),
    ],
)
def test_a_row_for_each_task(shaped: Any, parts: Any) -> None:
    torch.manual_seed(0)
    model, x = Joint(12, shaped).double(), torch.randn(4, 4).double()
    regularizer = SaliencyRegularizer(model, "head", tasks=TASKS, strength=1.0)
    model(x)
    penalty = regularizer()
    expected = expected_penalty(model.backbone(x), lambda shared: parts(model.head(shared)))
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)


def test_rows_and_groups_of_dense_outputs() -> None:
    """[B, T, K, H, W] and [B, T * K, H, W] are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 6, 1), nn.Identity()).double()
    x, found = torch.randn(2, 2, 3, 3).double(), []
    model[2:3].append(nn.Unflatten(1, (3, 2)))
    with_rows = nn.Sequential(model[0], model[1], nn.Sequential(model[2], nn.Unflatten(1, (3, 2))))
    groups = {task: slice(2 * index, 2 * index + 2) for index, task in enumerate(TASKS)}
    for each, options in ((model, {"columns": groups}), (with_rows, {"tasks": TASKS})):
        with SaliencyRegularizer(each, "2", strength=1.0, **options) as regularizer:
            each(x)
            found.append(regularizer())
    assert found[0] > 0
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["closed form", "smooth", "rows"])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_columns_under_surgery(name: str, kind: str) -> None:
    """Gramian and gradient are those of separate outputs."""
    torch.manual_seed(0)
    if kind == "rows":
        model = Joint(12, lambda out: out.unflatten(1, (3, 4))).double()
        options: dict[str, Any] = {"heads": "head", "tasks": TASKS}
        own = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    else:
        model = Joint(12, smooth=kind == "smooth").double()
        options = {"heads": "head.net", "columns": GROUPS[name]}
        own = columns_of(GROUPS[name], 12)
    x, target = torch.randn(4, 4).double(), torch.randn(4, 12).double()
    weights = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    gramians = []

    def weighting(gramian: Tensor) -> Tensor:
        gramians.append(gramian)
        return weights

    def error(out: Tensor) -> Tensor:
        return (out.flatten(1) - target).square()

    surgery = FeatureSurgery(model, weighting=weighting, **options)
    error(model(x)).sum().backward()
    surgery.remove()
    found = [parameter.grad.clone() for parameter in model.backbone.parameters()]
    shared = model.backbone(x)
    errors = error(model.head(shared))
    losses = [errors[:, each].sum() for each in own]
    gradients = [torch.autograd.grad(loss, shared, retain_graph=True)[0].flatten() for loss in losses]
    torch.testing.assert_close(
        gramians[-1].double(), torch.stack([torch.stack([g @ h for h in gradients]) for g in gradients])
    )
    nobody = errors.sum() - sum(losses)
    total = nobody + sum(weight * loss for weight, loss in zip(weights, losses))
    for own_gradient, expected in zip(found, torch.autograd.grad(total, list(model.backbone.parameters()))):
        torch.testing.assert_close(own_gradient, expected)


def test_columns_with_the_penalty_under_surgery() -> None:
    torch.manual_seed(0)
    model, x = Joint(12).double(), torch.randn(4, 4).double()
    penalties = []
    for surgery in (None, PCGrad()):
        options = {"columns": GROUPS["slices"], "strength": 1.0, "surgery": surgery}
        with SaliencyRegularizer(model, "head.net", **options) as regularizer:
            out = model(x)
            penalties.append(regularizer())
            (out.square().mean() + penalties[-1]).backward()
    torch.testing.assert_close(penalties[0], penalties[1])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"heads": "fc", "tasks": TASKS}, TaskError, r"columns=\{'a': slice\(0, 4\), ...\}.*outputs="),
        (
            {"heads": "fc", "columns": {"a": slice(0, 4), "b": slice(3, 8)}},
            TaskError,
            "column 3 to the tasks 'a' and 'b'",
        ),
        ({"heads": "fc", "columns": {"a": slice(0, 4), "b": slice(4, 13)}}, TaskError, r"'b'.*12 columns"),
        ({"heads": "fc", "columns": {"a": 0, "b": 12}}, TaskError, r"'b' are 12.*12 columns"),
        ({"heads": "fc", "columns": {"a": 0, "b": []}}, TaskError, "at least one"),
        ({"heads": "fc", "columns": {"a": 0, "b": "x"}}, WrongTypeError, "'b' must be a slice"),
        ({"heads": "fc", "columns": 4}, WrongTypeError, "columns must be a mapping"),
        ({"heads": "fc", "columns": {"a": 0}}, TaskError, "at least 2"),
        ({"heads": "fc", "columns": {"a": 0, "b": 1}, "tasks": ["b", "a"]}, TaskError, "Leave tasks= out"),
        ({"heads": ["fc", "head"], "columns": {"a": 0, "b": 1}}, TaskError, "columns= are those of one head"),
        ({"columns": {"a": 0, "b": 1}}, TypeError, "heads='fc'"),
        ({"heads": {"a": "fc", "b": "fc"}}, TaskError, "heads='fc', columns="),
    ],
)
def test_columns_that_cannot_be(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SaliencyRegularizer(Joint(12), **options)
    with pytest.raises(ConfigurationError, match="columns= can only be used with a model"):
        SaliencyRegularizer(None, columns={"a": 0, "b": 1}, tasks=["a", "b"])


# What is found without a name, and what errors say.


class Branches(nn.Module):
    """Dictionaries that are no heads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        if kind == "hidden":
            self.out = nn.Linear(12, 2)
            self.scales = nn.ModuleDict({name: chain(6, 6).append(nn.GELU()) for name in ("fine", "coarse")})
        elif kind == "read":
            self.scales = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("fine", "coarse")})
            self.out = nn.Linear(12, 2)
        elif kind == "embeddings":
            self.tables = nn.ModuleDict({name: nn.Embedding(3, 4) for name in ("user", "item")})
        elif kind == "a forward of its own":
            self.layers = Layers({name: nn.Linear(6, 6) for name in ("first", "second")})
        else:
            self.a, self.b = (nn.ModuleDict({"hidden": nn.Linear(6, 6), "out": nn.Linear(6, 1)}) for _ in "ab")


class Layers(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", ["hidden", "read", "embeddings", "a forward of its own", "parts of each task"])
def test_dictionaries_that_are_no_heads(kind: str) -> None:
    with pytest.raises(HeadNotFoundError, match="its children, the last first: .*'stem' with 6 outputs.*Pass heads="):
        SaliencyRegularizer(Branches(kind))


def test_stages_of_a_decoder_are_no_heads() -> None:
    stages = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 1, 1)])
    with pytest.raises(HeadNotFoundError):
        SaliencyRegularizer(nn.ModuleDict({"encoder": nn.Conv2d(3, 8, 1), "decoders": stages}))


def test_ambiguous_heads_are_described() -> None:
    model = Towers()
    model.last_heads, model.last = model.last, nn.Identity()
    with pytest.raises(AmbiguousHeadsError) as caught:
        SaliencyRegularizer(model)
    text = str(caught.value)
    assert "'towers' (3 modules: 'towers.0', 'towers.1', 'towers.2'; 5 inputs and 6 outputs each; hidden layers" in text
    assert "that run before 'last_heads'" in text
    assert "6 inputs and 1 output each" in text
    assert "['towers.0', 'last_heads.0']" in text


class Experts(nn.Module):
    """Each head reads a mixture of its own."""

    def __init__(self, bottom: bool = True) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict({"linear": nn.Linear(4, 5)}) if bottom else nn.Identity()
        self.bottom = nn.Sequential(nn.Linear(5 if bottom else 4, 5), nn.Tanh())
        self.experts = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.gates = nn.ModuleList([nn.Linear(5, 3) for _ in TASKS])
        self.heads = nn.ModuleList([nn.Linear(5, 1) for _ in TASKS])

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.bottom(self.embedding["linear"](x) if isinstance(self.embedding, nn.ModuleDict) else x)
        experts = torch.stack([expert(hidden) for expert in self.experts], 1)
        return [
            head((gate(hidden).softmax(1).unsqueeze(2) * experts).sum(1)) for gate, head in zip(self.gates, self.heads)
        ]


def test_what_all_heads_depend_on_is_listed_nearest_first() -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(3, 4)
    with SaliencyRegularizer(model, "heads") as regularizer:
        model(x)
        with pytest.raises(CaptureError) as caught:
            regularizer()
    listed = "'experts.0' to 'experts.2', 'bottom', 'embedding.linear' (the nearest first): pass feature='bottom'"
    assert listed in str(caught.value)
    with SaliencyRegularizer(model, "heads", feature="bottom") as regularizer:  # what it says works
        model(x)
        assert regularizer() > 0


@pytest.mark.parametrize(
    ("make", "heads", "listed"),
    [
        (Towers, "last", "'bottom' (the nearest first): pass feature='bottom'"),
        (Named, "out_*", "'bottom' (the nearest first): pass feature='bottom'"),
        (
            lambda: Experts(False),
            "heads",
            "'experts.0' to 'experts.2', 'bottom' (the nearest first): pass feature='bottom'",
        ),
    ],
)
def test_what_is_listed_for_other_models(make: Any, heads: str, listed: str) -> None:
    model = make()
    regularizer = SaliencyRegularizer(model, heads)
    model(torch.randn(3, 4))
    with pytest.raises(CaptureError) as caught:
        regularizer()
    assert listed in str(caught.value)


class Predictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sigmoid()

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_methods_of_heads_are_told_of() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(4, 5), "predictor": Predictor()})
    regularizer = SaliencyRegularizer(model, "predictor")
    model["predictor"].logits(model["backbone"](torch.randn(3, 4)))
    with pytest.raises(
        CaptureError, match=r"'predictor' itself, name the modules in it that are called: heads='predictor.net'\."
    ):
        regularizer()
    with SaliencyRegularizer(model, "predictor.net") as inner:
        model["predictor"].logits(model["backbone"](torch.randn(3, 4)))
        assert inner() > 0


def test_methods_of_heads_in_a_forward_are_told_of() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.heads = nn.Linear(4, 5), nn.ModuleDict({task: Predictor() for task in TASKS})

        def forward(self, x: Tensor) -> list[Tensor]:
            return [head.logits(self.backbone(x)) for head in self.heads.values()]

    model = Net()
    regularizer = SaliencyRegularizer(model)
    model(torch.randn(3, 4))
    with pytest.raises(
        NoHeadRanError, match=r"'heads.a' itself.*called: heads=\{'a': 'heads.a.net', 'b': 'heads.b.net', 'c'"
    ):
        regularizer()


@pytest.mark.parametrize("whole", [True, False])
def test_what_can_be_compiled_is_named(whole: bool) -> None:
    model = nn.Module()
    model.stem, model.blocks, model.fc = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5)), nn.Linear(5, 3)
    if whole:
        compiled: nn.Module = torch.compile(model, backend="eager")
    else:
        compiled = model
        model.fc.compile(backend="eager")
    with pytest.raises(
        ConfigurationError, match=r"model.stem.compile\(\), model.blocks.compile\(\)\. If all heads are Linear"
    ):
        SaliencyRegularizer(compiled, "fc")
