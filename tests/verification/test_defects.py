"""``verify``: each seeded defect is found in its row, by the name of its layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saliency_reg import verify
from tests.support.zoo import Reverse, build

from .support import Centred, Net, Odd, X, failed, report_of, with_part

# Samples that mix.


def test_a_batch_norm_in_a_head() -> None:
    report = report_of(with_part(nn.BatchNorm1d(4)), strength=1.0)
    assert report.passed, str(report)
    assert "held constant" in report["samples"].found
    assert "'heads.b.1' (BatchNorm1d)" in report["samples"].found
    for cross_sample in ("warn", "ignore", "error"):
        report = report_of(with_part(nn.BatchNorm1d(4)), cross_sample=cross_sample)
        assert report["samples"].passed is False
        assert ("heads.b.1" in report["samples"].found) or cross_sample == "error"
        assert "cross_sample='fix'" in f"{report['samples']}"


def test_other_parts_that_mix_samples() -> None:
    report = report_of(with_part(Centred()))
    assert not report["samples"].passed
    assert "'heads.b.1' (Centred)" in report["samples"].found
    model = Net()
    model.middle = nn.BatchNorm1d(6)
    model.backbone.append(model.middle)
    assert "'backbone.4' (BatchNorm1d)" in report_of(model, feature="backbone.3")["samples"].found
    assert "other samples stay" in report_of(with_part(nn.BatchNorm1d(4)).eval())["samples"].found
    assert "other samples stay" in report_of(with_part(nn.LayerNorm(4)))["samples"].found


def test_instance_norm_mixes_nothing() -> None:
    entry = build("dense heads")
    for task in entry.model.heads:
        entry.model.heads[task].insert(1, nn.InstanceNorm2d(3))
    entry.model.double()
    report = verify(entry.model, entry.inputs, show=False)
    assert report["samples"].passed, str(report)
    assert "other samples stay" in report["samples"].found


def test_an_own_mean_over_the_batch_in_no_module() -> None:
    report = report_of(Net(lambda feature: feature - feature.mean(0)), feature="backbone")
    assert failed(report) == ["saliency", "samples"]
    assert "in no module" in report["samples"].found


# Detached.


class Detach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def detaching(where: str, place: int) -> Net:
    model = Net()
    model.get_submodule(where).insert(place, Detach())
    return model


def without_grad(where: str) -> Net:
    model = Net()
    part = model.get_submodule(where)
    part.forward = torch.no_grad()(part.forward)
    return model


def detached_before_b() -> Net:
    return Net(before=lambda task, feature: feature.detach() if task == "b" else feature)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: detaching("backbone", 2), "'backbone.0' (Linear)"),
    (lambda: Net(torch.detach), "'backbone.0' (Linear), 'backbone.2' (Linear)"),
    (lambda: without_grad("heads.b"), "heads.b"),
    (lambda: without_grad("backbone"), "ran under no_grad, so that no gradient reaches them: 'backbone.0' (Linear)"),
    (lambda: detaching("heads.b", 1), "'heads.b.0' (Linear)"),
    (lambda: detaching("heads.b", 0), "['heads.b']"),
    (detached_before_b, "['heads.b']"),
], ids=["backbone", "feature map", "head under no_grad", "trunk under no_grad", "in a head", "first in a head",
        "before a head"])  # fmt: skip
def test_what_is_detached_is_named(make: Callable[[], Net], words: str) -> None:
    reach = report_of(make())["reach"]
    assert reach.passed is False, reach
    assert words in reach.found
    assert ("requires_grad_(False)" in reach.advice) == ("ran under no_grad" in reach.found)


def test_a_head_that_is_detached_from_a_named_feature_map() -> None:
    reach = report_of(detached_before_b(), feature="backbone.3")["reach"]
    assert reach.passed is False, reach
    assert "['heads.b']" in reach.found


def test_a_frozen_backbone_is_told() -> None:
    model = Net()
    model.backbone.requires_grad_(False)
    report = report_of(model)
    assert report.passed, str(report)
    assert "frozen" in report["reach"].found


# Changed in place.


class InPlace(nn.Module):
    """Changes what its own derivative needs."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.sigmoid()
        y += 1
        return y


def changed_between_heads(task: str, feature: Tensor) -> Tensor:
    if task == "b":
        with torch.no_grad():
            feature.mul_(2)
    return feature


def patched_and_changed(x: Tensor) -> Tensor:
    z = x * 1
    y = Patched.apply(z, torch.eye(4), torch.zeros(4))
    z += 1
    return y


def changed_after_heads() -> Net:
    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        args[0].add_(1)

    model = Net()
    model.heads["c"].register_forward_hook(after)
    return model


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Net(lambda feature: feature.add_(1)), "'backbone.3' (Sigmoid)"),
    (changed_after_heads, "'backbone.3' (Sigmoid)"),
    (lambda: Net(before=changed_between_heads), "after head 'heads.a'"),
    (lambda: with_part(InPlace()), "read: 'heads.b.1' (InPlace)"),
    (lambda: with_part(nn.Sequential(nn.Sigmoid(), nn.Identity(), nn.ReLU(inplace=True))), "read: 'heads.b.1.0' (Sigmoid)"),
    (lambda: with_part(Odd(patched_and_changed)), "read: 'heads.b.1' (Odd)"),
], ids=["feature map", "after heads", "between heads", "within a part", "by the next but one", "by a function"])  # fmt: skip
def test_what_is_changed_in_place_is_named(make: Callable[[], Net], words: str) -> None:
    reach = report_of(make())["reach"]
    assert reach.passed is False, reach
    assert reach.found.endswith(words) or not words.startswith("read")
    assert words in reach.found


# Gradients that are not derivatives, and layers without a second one.


class Patched(torch.autograd.Function):
    """A Linear whose backward keeps the weight as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight.detach(), gradient.T @ x, gradient.sum(0)


class Once(Patched):
    backward = staticmethod(once_differentiable(Patched.backward))


def scaled(x: Tensor) -> Tensor:
    y = x * 1
    if y.requires_grad:
        y.register_hook(lambda gradient: 0.1 * gradient)
    return y


@pytest.mark.parametrize("function", [Reverse.apply, scaled, lambda x: x + (x.sign() - x).detach(), torch.round],
                         ids=["reversal", "scaling", "straight-through", "rounding"])  # fmt: skip
def test_backwards_that_are_no_derivative(function: Callable[[Tensor], Tensor]) -> None:
    report = report_of(with_part(Odd(function)))
    if function is torch.round:  # its derivative is zero, and right
        assert failed(report) == ["saliency"]
        assert "['b']" in report["saliency"].found
        return
    assert failed(report) == ["derivatives"], str(report)
    assert "'heads.b.1' (Odd)" in report["derivatives"].found


def test_a_reversal_in_no_module() -> None:
    assert report_of(Net(Reverse.apply)).passed  # in front of the feature map it is no concern of the penalty
    report = report_of(Net(Reverse.apply), feature="backbone")
    assert failed(report) == ["derivatives"], str(report)
    assert "Reverse" in report["derivatives"].found


@pytest.mark.parametrize("function", [Patched, Once])
def test_a_patched_linear(function: Any) -> None:
    model = Net()
    layer = model.heads["b"][2]
    layer.forward = lambda x: function.apply(x, layer.weight, layer.bias)
    report = report_of(model)
    assert report["derivatives"].passed is False, str(report)
    assert "heads.b.2" in report["derivatives"].found or "'b'" in report["derivatives"].found


def test_a_linear_of_ones_own() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Patched.apply(x, self.weight, self.bias)

    model = Net()
    model.heads["b"][2] = Own(4, 1)
    report = report_of(model)
    assert failed(report) == ["derivatives"], str(report)
    assert "'heads.b.2' (Own)" in report["derivatives"].found
    model.heads["b"].insert(2, nn.Hardsigmoid())
    assert "Hardsigmoid" in report_of(model)["derivatives"].found


def test_a_spectral_norm_in_train_mode() -> None:
    model = Net()
    model.heads["b"][0] = nn.utils.spectral_norm(model.heads["b"][0])
    derivatives = report_of(model)["derivatives"]
    assert derivatives.passed is False
    assert "spectral_norm: 'heads.b.0' (Linear)" in derivatives.found
    assert report_of(model.eval())["derivatives"].passed


# Compiled parts.


@pytest.mark.parametrize("way", ["head", "in place", "whole", "inside", "forward"])
def test_compiled_heads(way: str) -> None:
    torch._dynamo.reset()
    model: nn.Module = Net()
    if way == "head":
        model.heads["b"] = torch.compile(model.heads["b"], backend="aot_eager")
    elif way == "in place":
        model.heads["b"].compile(backend="aot_eager")
    elif way == "whole":
        model = torch.compile(model, backend="aot_eager")
    elif way == "inside":
        model.heads["b"][0] = torch.compile(model.heads["b"][0], backend="aot_eager")
    else:
        model.heads["b"].forward = torch.compile(model.heads["b"].forward, backend="aot_eager")
    report = report_of(model)
    assert report["compiled"].passed is False, str(report)
    assert ("the model" if way == "whole" else "heads.b") in report["compiled"].found
    assert "model.backbone.compile()" in report["compiled"].advice


def test_a_compiled_backbone_is_right() -> None:
    torch._dynamo.reset()
    model = Net()
    model.backbone.compile(backend="aot_eager")
    report = report_of(model)
    assert report.passed, str(report)
    assert "backbone" in report["compiled"].found


# Strength.


def test_a_strength_of_fifty_times_the_losses() -> None:
    share = float(report_of(Net(), strength=1.0)["share"].found.split()[3])
    for factor, passed in ((50, False), (10.1, False), (9.9, True), (0.1, True), (4e-4, False)):
        report = report_of(Net(), strength=factor / share)
        assert report["share"].passed is passed, str(report)
        assert float(report["share"].found.split()[3]) == pytest.approx(factor, rel=2e-3)
    assert f"strength={0.01 / share:.2g} to {1 / share:.2g}" in report_of(Net(), strength=50 / share)["share"].advice


def test_a_strength_that_is_found_in_training() -> None:
    share = float(report_of(Net(), strength=1.0)["share"].found.split()[3])
    check = report_of(Net(), strength="auto", share=0.5)["share"]
    assert check.passed
    assert f"it would be {0.5 / share:.2g}, for a share of 0.5" in check.found


def test_saliencies_that_vanish_in_half_precision() -> None:
    model = Net()
    with torch.no_grad():
        for head in model.heads.values():
            head[0].weight.mul_(1e-4)
            head[2].weight.mul_(1e-4)
    report = report_of(model)
    assert report["fp16"].passed is None
    assert "100.0% of the entries" in report["fp16"].found
    half = report_of(model.half(), X.half())
    assert half["fp16"].passed is False, str(half)
