"""Arguments and return values are left as they are, and gradients are found on every path."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer, task_distances, task_saliencies
from saliency_reg.errors import CaptureError, CrossSampleError, SecondDerivativeError, WrongTypeError

TASKS = ["a", "b", "c", "d"]


class Writing(nn.Module):
    """A head that writes into what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, feature: Tensor, notes: dict[str, int], log: list[int]) -> Tensor:
        notes["seen"] = 1
        log.append(1)
        return self.layer(feature)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_heads_write_into_their_arguments_arrives(frozen: bool) -> None:
    backbone, heads = nn.Linear(3, 4).requires_grad_(not frozen), [Writing(), Writing()]
    regularizer = SaliencyRegularizer(backbone, heads, strength=1.0, metric="l1")
    notes: dict[str, int] = {}
    log: list[int] = []
    feature = backbone(torch.randn(5, 3))
    for head in heads:
        head(feature, notes, log=log)
    assert regularizer() > 0
    assert notes == {"seen": 1}
    assert log == [1, 1]


class Chain(nn.Module):
    """Head b reads what head a returned."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})
        self.late = nn.ModuleDict({"b": Late()})
        self.heads["b"] = Late()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = torch.tanh(self.backbone(x))
        first = self.heads["a"](feature)
        outputs = {task: self.heads[task](feature) for task in ("c", "d")}
        return {"a": first, "b": self.heads["b"](feature, first), **outputs}


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, feature: Tensor, other: Tensor) -> Tensor:
        return self.layer(feature) + 3 * torch.tanh(other)


@pytest.mark.parametrize("seed", [1, 4, 6])
def test_heads_that_read_others_are_found_in_a_sample_of_tasks_too(seed: int) -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(5, 3)
    relations = RelationWeights(4, "fixed", mass=6.0)
    sampled = SaliencyRegularizer(
        model, "heads", strength=1.0, relations=relations, max_tasks_per_step=2, seed=seed, metric="l1"
    )
    for _ in range(12):
        model(x)
        sampled()
        feature = torch.tanh(model.backbone(x))
        outputs = {task: model.heads[task](feature) for task in ("a", "c", "d")}
        outputs["b"] = model.heads["b"](feature, outputs["a"])
        expected = task_distances(task_saliencies([outputs[task] for task in TASKS], feature))
        assert sampled.report is not None
        found = sampled.report.distances
        known = ~torch.isnan(found)
        torch.testing.assert_close(found[known], expected.detach()[known])
        sampled._capture.drop()  # the heads were called for the expectation


def test_a_function_of_the_output_is_differentiated_and_not_taken_for_a_weight_row() -> None:
    torch.manual_seed(0)
    backbone, heads = nn.Linear(3, 4), [nn.Linear(4, 1), nn.Linear(4, 1)]
    regularizer = SaliencyRegularizer(backbone, heads, strength=1.0, output=lambda out: out.exp(), metric="l1")
    feature = backbone(torch.randn(5, 3))
    outputs = [head(feature).exp() for head in heads]
    expected = task_distances(task_saliencies(outputs, feature))[0, 1]
    torch.testing.assert_close(regularizer(), expected)
    assert "closed form" not in regularizer.describe()


class ModelOutput(OrderedDict):
    """Keys that are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass
class Inner:
    hidden: Tensor


@dataclass
class Outer:
    inner: Inner
    other: int = 3


class Structured(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 4), kind

    def forward(self, x: Tensor) -> Any:
        hidden = self.layer(x)
        return ModelOutput(last=hidden) if self.kind == "mapping" else Outer(Inner(hidden))


@pytest.mark.parametrize(("kind", "place"), [("mapping", "output.last"), ("nested", "output.inner.hidden")])
def test_parts_behind_a_frozen_backbone(kind: str, place: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Structured(kind).requires_grad_(False)
            self.heads = nn.ModuleList([nn.Sequential(nn.Tanh(), nn.Linear(4, 1)) for _ in range(2)])

        def forward(self, x: Tensor) -> list[Tensor]:
            out = self.backbone(x)
            hidden = out.last if kind == "mapping" else out.inner.hidden
            return [head(hidden * 1.0) for head in self.heads]

    model = Model()
    regularizer = SaliencyRegularizer(model, "heads", feature=f"backbone:{place}", strength=1.0, metric="l1")
    model(torch.randn(5, 3))
    penalty = regularizer()
    assert penalty > 0
    penalty.backward()
    assert model.heads[0][1].weight.grad is not None


def two_heads(**options: Any) -> tuple[nn.Module, SaliencyRegularizer]:
    class Dictionary(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x), "ids": torch.ones(len(x), dtype=torch.int64)}

    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"backbone": nn.Linear(3, 4), "heads": nn.ModuleDict({"a": Dictionary(4, 1), "b": nn.Linear(4, 1)})}
    )
    return model, SaliencyRegularizer(model, "heads", strength=1.0, **{"metric": "l1", **options})


def run(model: nn.Module) -> None:
    feature = model["backbone"](torch.randn(5, 3))
    for head in model["heads"].values():
        head(feature)


def test_parts_for_some_heads_only() -> None:
    model, regularizer = two_heads(output={"a": "logits", "b": None})
    run(model)
    assert regularizer() > 0


def test_wrong_parts() -> None:
    model, regularizer = two_heads(output={"a": "logit", "b": None})
    run(model)
    with pytest.raises(CaptureError, match=r"output='logit' is no part of .*with the keys \['logits', 'ids'\]"):
        regularizer()
    model, regularizer = two_heads(output={"a": "ids", "b": None})
    run(model)
    with pytest.raises(CaptureError, match=r"is torch.int64, which has no gradient"):
        regularizer()
    model, regularizer = two_heads(output={"a": "logits", "b": 0})
    run(model)
    with pytest.raises(
        CaptureError, match="output=0 is no part of what head 'heads.b' returned: a torch.float32 tensor"
    ):
        regularizer()
    with pytest.raises(WrongTypeError, match="a key, an attribute, an index or a function.*found float"):
        two_heads(output=1.5)
    model, _ = two_heads(output=lambda out: out["nothing"] if isinstance(out, dict) else out)
    with pytest.raises(KeyError, match="nothing"):
        run(model)


def test_samples_are_looked_at_again_in_train_mode() -> None:
    heads = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)) for _ in range(2)])
    model = nn.ModuleDict({"backbone": nn.Linear(3, 4), "heads": heads}).eval()
    regularizer = SaliencyRegularizer(model, "heads", cross_sample="error", strength=0.1, metric="l1")
    for training in (False, True):
        model.train(training)
        feature = model["backbone"](torch.randn(5, 3))
        for head in heads:
            head(feature)
        if not training:
            regularizer()
    with pytest.raises(CrossSampleError):
        regularizer()


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class OnceHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, feature: Tensor) -> Tensor:
        return self.layer(OnceOnly.apply(feature))


def test_a_head_without_a_second_derivative_that_joins_later() -> None:
    backbone = nn.Linear(3, 4)
    heads = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(2)]
    bad = OnceHead()
    regularizer = SaliencyRegularizer(backbone, [*heads, bad], tasks=["a", "b", "bad"], strength=1.0, metric="l1")
    feature = backbone(torch.randn(5, 3))
    for head in heads:
        head(feature)
    regularizer()
    feature = backbone(torch.randn(5, 3))
    for head in [*heads, bad]:
        head(feature)
    with pytest.raises(
        SecondDerivativeError, match="output of task 'bad' has no second derivative.*once_differentiable"
    ):
        regularizer()


def test_a_wrapper_that_passes_names_on_is_not_taken_for_a_compiled_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner").backbone, name)

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.compile(nn.Linear(3, 4), backend="eager")
            self.heads = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

    SaliencyRegularizer(Wrapper(Inner()), "heads", strength=0.1, metric="l1").remove()
