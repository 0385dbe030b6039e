"""``verify``: a healthy model passes, each seeded defect is found in its row, by the name of its layer; nothing changes."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import saliency_reg.saliency.extraction
from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, SaliencyRegularizer, VerificationReport, verify
from saliency_reg.errors import AlreadyAttachedError, ConfigurationError, VerificationError, WrongTypeError
from saliency_reg.verification.__main__ import main
from tests.support.paths import ROOT
from tests.support.zoo import Reverse, build


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide terminal, so that words are not broken over lines."""
    monkeypatch.setenv("COLUMNS", "120")


TASKS = ("a", "b", "c")


def head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))


class Net(nn.Module):
    """A small net; tests put defects in the place of its parts, behind the backbone, or before a head."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] = lambda feature: feature,
        before: Callable[[str, Tensor], Tensor] = lambda task, feature: feature,
    ) -> None:
        super().__init__()
        self.between, self.before = between, before
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Sigmoid())
        self.heads = nn.ModuleDict({task: head() for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.between(self.backbone(x))
        return {task: head(self.before(task, feature)) for task, head in self.heads.items()}


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def losses(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: (output - 3 * place).square().mean() for place, (task, output) in enumerate(outputs.items())}


def report_of(model: nn.Module, batch: Any = X, **options: Any) -> VerificationReport:
    return verify(model, batch, **{"losses": losses, "show": False, "heads": "heads", "strength": 10.0, **options})


def with_part(part: nn.Module, task: str = "b") -> Net:
    """A net with a part within one head."""
    model = Net()
    model.heads[task].insert(1, part)
    return model


def failed(report: VerificationReport) -> list[str]:
    return [check.name for check in report.failed]


# Healthy models.


@pytest.mark.parametrize("name", ["linear heads", "tanh heads, 3 classes", "mlp columns", "pooled columns",
                                  "dense heads, 3 classes", "token heads", "trunk", "cascade", "in-place heads"])  # fmt: skip
def test_healthy_models_pass(name: str) -> None:
    entry = build(name)
    report = verify(entry.model, entry.inputs, show=False, **entry.options)
    assert report.passed, str(report)
    assert {
        row for row in ("heads", "compiled", "saliency", "samples", "derivatives") if not report[row].passed
    } == set()
    assert report["share"].passed is None


def test_a_healthy_model_under_surgery_passes_whole() -> None:
    report = report_of(Net(), surgery=PCGrad())
    assert [check.passed for check in report] == [True] * 9, str(report)
    assert len(str(report).splitlines()) >= 10
    assert max(map(len, str(report).splitlines())) <= 120


def test_one_head_with_columns_under_surgery() -> None:
    entry = build("mlp columns")
    report = verify(
        entry.model,
        entry.inputs,
        losses=lambda out: (out - 2).square().mean(0),
        surgery=PCGrad(),
        show=False,
        **entry.options,
    )
    assert report.passed, str(report)
    assert report["surgery"].passed


class SequenceFirst(nn.Module):
    """A recurrent layer, ``[L, B, 6]``, and heads that read each step or the last one, or a column of each step per task."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads, self.lstm = reads, nn.LSTM(4, 6)
        self.heads: nn.Module = nn.ModuleDict({task: head() for task in TASKS})
        if reads == "columns":
            self.heads = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, len(TASKS)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.lstm(x)[0]
        if isinstance(self.heads, nn.ModuleDict):
            return {task: head(feature[-1] if self.reads == "last" else feature) for task, head in self.heads.items()}
        return dict(zip(TASKS, self.heads(feature).unbind(-1)))


@pytest.mark.parametrize("length", [7, 5])
@pytest.mark.parametrize(("reads", "options"), [
    ("each", {}), ("each", {"surgery": PCGrad()}), ("each", {"pool": None}), ("last", {"feature": "lstm:output.0"}),
    ("columns", {"tasks": TASKS}), ("columns", {"tasks": TASKS, "surgery": PCGrad()}),
])  # fmt: skip
def test_the_sequence_comes_first(reads: str, options: dict[str, Any], length: int) -> None:
    x = torch.randn(length, 5, 4, generator=torch.Generator().manual_seed(1))  # as many steps as samples, too
    report = report_of(SequenceFirst(reads), x, batch_axis=1, **options)
    assert report.passed, str(report)
    assert report["saliency"].passed
    assert report["surgery"].passed is ("surgery" in options or None), str(report)


class Dropping(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.append(nn.Dropout(0.3))
        for head in self.heads.values():
            head.insert(2, nn.Dropout(0.3))


@pytest.mark.parametrize("options", [{"target": "loss"}, {"metric": "cosine"}, {"reduction": "sum"}, {"strength": 0.0},
                                     {"start_step": 5}, {"feature": "backbone.1"}, {"max_tasks_per_step": 2}])  # fmt: skip
def test_dropout_and_options(options: dict[str, Any]) -> None:
    report = report_of(Dropping(), **options)
    assert report.passed, str(report)
    assert report["saliency"].passed
    assert report["derivatives"].passed


def test_ways_to_call_and_heads_that_do_not_run() -> None:
    class Missing(Net):
        def forward(self, x: Tensor, *, only: tuple[str, ...]) -> dict[str, Tensor]:
            feature = self.backbone(x)
            return {task: self.heads[task](feature) for task in only}

    report = report_of(Missing(), {"x": X, "only": ("a", "c")})
    assert report.passed, str(report)
    assert "did not run in this batch: 'b'" in report["heads"].found
    assert report_of(Net(), (X,)).passed


def test_half_precision() -> None:
    model = Net().bfloat16()
    assert report_of(model, X.bfloat16()).passed
    with torch.autocast("cpu", torch.bfloat16):
        assert report_of(Net()).passed


def test_saliencies_that_are_not_those_of_the_samples_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return input_gradients(*args, **kwargs).roll(1, dims=1)

    input_gradients = saliency_reg.saliency.extraction.input_gradients
    monkeypatch.setattr(saliency_reg.saliency.extraction, "input_gradients", wrong)
    report = report_of(Net())
    assert failed(report) == ["saliency"], str(report)
    assert "task '" in report["saliency"].found
    assert report_of(Net(), tolerance=10.0).passed


# 1. Samples that mix.


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


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


# 2. Detached.


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


# 3. Changed in place.


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


# 4. Gradients that are not derivatives, and 5. layers without a second one.


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


class Odd(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


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


# 6. Surgery.


class OfSum(PCGrad):
    """Projects the sum of the gradients in the place of each of them."""

    def forward(self, gramian: Tensor) -> Tensor:
        products = gramian.sum(0).clamp(max=0)
        return torch.ones_like(products) - products / gramian.diagonal()


def detached(losses: dict[str, Tensor], penalty: Tensor) -> None:
    (sum(losses.values()) + penalty.item()).backward()


def summed_before(losses: dict[str, Tensor], penalty: Tensor) -> None:
    total = sum(losses.values()) + penalty
    total.backward(create_graph=True)


def twice(losses: dict[str, Tensor], penalty: Tensor) -> None:
    for loss in losses.values():  # the surgery sees one task at a time
        loss.backward(retain_graph=True)
    penalty.backward()


def right(losses: dict[str, Tensor], penalty: Tensor) -> None:
    (sum(losses.values()) + penalty).backward()


def conflicting(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        task: (1 if place else -1) * output.mean() + output.square().mean()
        for place, (task, output) in enumerate(outputs.items())
    }


def conflicts() -> Net:
    model = Net()
    for task in TASKS[1:]:
        model.heads[task].load_state_dict(model.heads["a"].state_dict())
        with torch.no_grad():
            model.heads[task][0].weight.add_(0.1 * torch.randn(4, 6))
    return model


@pytest.mark.parametrize("backward", [None, right, detached, summed_before, twice])
def test_surgery(backward: Any) -> None:
    report = report_of(conflicts(), losses=conflicting, surgery=PCGrad(), backward=backward)
    assert failed(report) == ([] if backward in (None, right) else ["surgery"]), str(report)
    assert ("that was built here" in report["surgery"].advice) == (backward is right)


def test_pcgrad_on_summed_gradients() -> None:
    report = report_of(conflicts(), losses=conflicting, surgery=OfSum())
    assert failed(report) == ["surgery"], str(report)
    assert "reference" in report["surgery"].found
    assert report_of(conflicts(), losses=conflicting, surgery=lambda gramian: gramian.diagonal().rsqrt()).passed
    assert failed(report_of(Net(), backward=detached)) == ["surgery"]
    assert report_of(Net(), backward=right)["surgery"].passed


def test_losses_that_go_around_the_surgery() -> None:
    report = report_of(
        conflicts(), losses=lambda out: {t: o.detach().requires_grad_().sum() for t, o in out.items()}, surgery=PCGrad()
    )
    assert failed(report) == ["surgery"], str(report)
    assert "weighed no gradient" in report["surgery"].found


def test_surgery_has_nothing_to_weigh_in_front_of_a_frozen_backbone() -> None:
    model = conflicts()
    model.backbone.requires_grad_(False)
    report = report_of(model, losses=conflicting, surgery=PCGrad())
    assert report.passed, str(report)
    assert "nothing is weighed" in report["surgery"].found


def by_hand(model: Net, *, of_sum: bool = False) -> Callable[[dict[str, Tensor], Tensor], None]:
    """PCGrad at the parameters of the backbone, in the order of the tasks; or, wrongly, of the sum of the gradients."""

    def backward(losses: dict[str, Tensor], penalty: Tensor) -> None:
        shared = list(model.backbone.parameters())
        rows = [flat_gradient(loss, shared) for loss in losses.values()]
        alone = flat_gradient(penalty, shared)
        (sum(losses.values()) + penalty).backward()
        projected = [sum(rows)] if of_sum else [row.clone() for row in rows]
        for place, row in enumerate(projected):
            for other, against in enumerate(rows):
                if (of_sum or place != other) and row @ against < 0:
                    row = row - (row @ against) / (against @ against) * against
            projected[place] = row
        total = sum(projected) + alone
        for one, part in zip(shared, total.split([one.numel() for one in shared])):
            one.grad = part.view_as(one).clone()

    return backward


def flat_gradient(value: Tensor, parameters: list[Any]) -> Tensor:
    found = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([one.flatten() for one in found])


def test_a_loop_at_the_parameters() -> None:
    model = conflicts()
    surgery = ParameterSurgery(model, PCGrad())
    loops: dict[str, Any] = {
        "right": lambda losses, penalty: surgery.backward(losses, penalty),
        "in tasks": lambda losses, penalty: surgery.backward({k: v + penalty for k, v in losses.items()}),
        "sum": lambda losses, penalty: (sum(losses.values()) + penalty).backward(),
        "no penalty": lambda losses, penalty: surgery.backward(losses),
        "by hand": by_hand(model),
        "of the sum": by_hand(model, of_sum=True),
    }
    expected: dict[str, Any] = {"right": True, "in tasks": False, "sum": False, "no penalty": False, "by hand": True}
    before = copy.deepcopy(surgery.weighting.state_dict())

    def row(loop: str, **options: Any) -> Any:
        return report_of(model, losses=conflicting, backward=loops[loop], **options)["surgery"]

    for loop in ("right", "in tasks", "sum", "no penalty"):
        assert row(loop, surgery=surgery).passed is expected[loop], loop
    assert row("right", surgery=PCGrad()).passed
    assert row("by hand", surgery=PCGrad()).passed
    assert row("of the sum", surgery=PCGrad()).passed is False
    assert "PCGrad on summed gradients" in row("sum", surgery=surgery).found
    for loop in ("right", "by hand"):
        found = row(loop)
        assert found.passed is None
        assert "changes the sum of the gradients (cosine" in found.found
        assert "pass surgery=PCGrad() (or the ParameterSurgery)" in found.advice.replace("Pass", "pass")
    assert "penalty's gradient is missing" in row("no penalty", surgery=surgery).found
    assert surgery.tasks is None
    assert surgery.weighting.state_dict() == before


@pytest.mark.parametrize("kind", ["feature map", "parameters"])
def test_a_weighting_with_state_of_its_own_keeps_it(kind: str) -> None:
    class Weighting:
        calls = 0

        def __call__(self, gramian: Tensor) -> Tensor:
            self.calls += 1
            return torch.linspace(1, 2, len(gramian)) * self.calls

    model, weighting = conflicts(), Weighting()
    used = weighting if kind == "feature map" else ParameterSurgery(model, weighting)
    report = report_of(model, losses=conflicting, surgery=used)
    assert report["surgery"].passed, str(report)
    assert weighting.calls == 0


def test_passing_in_the_users_loop_shows() -> None:
    model = conflicts()
    regularizer = SaliencyRegularizer(model, "heads", strength=10.0, surgery=PCGrad())

    def passing(losses: dict[str, Tensor], penalty: Tensor) -> None:
        with regularizer.surgery.passing():
            (sum(losses.values()) + penalty).backward()

    options: dict[str, Any] = {"losses": conflicting, "show": False, "regularizer": regularizer}
    assert verify(model, X, backward=right, **options)["surgery"].passed
    assert verify(model, X, backward=passing, **options)["surgery"].passed is False
    assert regularizer.surgery.report is None
    regularizer.surgery.enabled = False
    assert verify(model, X, backward=right, **options)["surgery"].passed is None
    regularizer.enabled = False
    assert "enabled is False" in str(verify(model, X, **options)["heads"])


def test_a_batch_without_conflicts_is_told() -> None:
    same = {task: (lambda output: output.square().mean()) for task in TASKS}
    model = Net()
    for task in TASKS[1:]:
        model.heads[task].load_state_dict(model.heads["a"].state_dict())
    with torch.no_grad():
        model.heads["b"][2].weight.mul_(1.1)
    found = report_of(model, losses=lambda out: {t: same[t](o) for t, o in out.items()}, surgery=PCGrad())["surgery"]
    assert found.passed
    assert "nothing was projected" in found.found


def test_a_reversal_before_a_head() -> None:
    reversing = Net(before=lambda task, feature: Reverse.apply(feature) if task == "b" else feature)
    report = report_of(reversing)
    assert report["derivatives"].passed is False
    assert "heads ['heads.b'] read the feature map" in report["derivatives"].found
    for model in (reversing, with_part(Odd(Reverse.apply))):
        found = report_of(model, custom_backward="ignore")["derivatives"]
        assert found.passed is None
        assert "(meant: custom_backward='ignore')" in found.found


def test_axes_and_masks_are_told() -> None:
    entry = build("token heads")
    found = verify(entry.model, entry.inputs, show=False, **entry.options)["heads"].found
    assert " samples, " in found
    assert "(axis 2 of [" in found
    shape = eval(found.split("axis 2 of ")[1].split(")")[0])
    nothing = torch.zeros(shape[:2], dtype=torch.bool)
    report = verify(entry.model, entry.inputs, show=False, **{**entry.options, "mask": nothing})
    assert report["saliency"].passed is False
    assert "mask" in report["saliency"].found


def test_errors_of_the_users_functions() -> None:
    found = report_of(Net(), losses=lambda out: {"a": out["foo"]})["share"]
    assert "your losses= raised KeyError: 'foo' (" in found.found
    assert "test_verify.py:" in found.found
    found = report_of(Net(), backward=lambda losses: None)["surgery"]
    assert "your backward= raised TypeError" in found.found
    assert (
        "has none for 'b', 'c'" in report_of(Net(), losses=lambda out: {"a": out["a"].square().mean()})["share"].found
    )


# 7. Compiled parts.


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


# 8. Strength.


def test_a_strength_of_fifty_times_the_losses() -> None:
    share = float(report_of(Net(), strength=1.0)["share"].found.split()[3])
    for factor, passed in ((50, False), (3.1, False), (2.9, True), (0.1, True), (5e-4, False)):
        report = report_of(Net(), strength=factor / share)
        assert report["share"].passed is passed, str(report)
        assert f"{factor:.3g} times" in report["share"].found
    assert f"strength={1 / share:.2g} makes it" in report_of(Net(), strength=50 / share)["share"].advice


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


# Nothing changes.


class Counting(Dropping):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.append(nn.BatchNorm1d(6))
        self.runs = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.runs += 1
        random.random()
        return super().forward(x)


def state_of(model: nn.Module, *others: nn.Module) -> Any:
    return (
        {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()},
        {name: None if one.grad is None else one.grad.clone() for name, one in model.named_parameters()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        model.runs,
        *({name: tensor.clone() for name, tensor in other.state_dict().items()} for other in others),
    )


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("surgery", [False, True])
def test_nothing_changes(attached: bool, surgery: bool) -> None:
    model = Counting()
    model.heads["b"].eval()
    options: dict[str, Any] = {"heads": "heads", "strength": 0.5, "surgery": PCGrad() if surgery else None}
    regularizer, others = None, []
    if attached:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        regularizer = SaliencyRegularizer(model, optimizer=optimizer, **options)
        for _ in range(2):
            outputs = model(X)
            (sum(losses(outputs).values()) + regularizer(losses=losses(outputs))).backward()
            optimizer.step()
        model(X)  # waits to be read
        others, options = [regularizer], {}
        read = regularizer.report, vars(regularizer._capture)["_latest"], regularizer.describe()
        reminded = {
            name: copy.copy(value) if isinstance(value, (set, list)) else value
            for name, value in vars(regularizer._reminders).items()
        }
    before, identities = state_of(model, *others), [*map(id, model.parameters()), *map(id, model.buffers())]
    report = verify(model, X, losses=losses, show=False, regularizer=regularizer, **options)
    assert report.passed, str(report)
    assert report["surgery"].passed is (True if surgery else None)
    torch.testing.assert_close(state_of(model, *others), before, rtol=0, atol=0)
    assert [*map(id, model.parameters()), *map(id, model.buffers())] == identities
    if regularizer is not None:
        assert regularizer.describe() == read[2]
        assert vars(regularizer._capture)["_latest"] is read[1]
        if not surgery:
            assert regularizer.report is read[0]
        assert vars(regularizer._reminders) == reminded
        assert float(regularizer()) > 0  # the forward that waited
    else:
        SaliencyRegularizer(model, "heads")  # nothing is attached


def test_a_regularizer_that_has_seen_nothing_has_seen_nothing_afterwards() -> None:
    model = Net()
    regularizer = SaliencyRegularizer(model, "heads", feature="backbone.0:input", strength=10.0)
    capture = regularizer._capture

    def seen() -> list[Any]:
        known = [vars(way) for way in capture._ways]
        return copy.deepcopy([known, capture._changes_output, capture._raw_inputs._ran, capture._raw_inputs._told])

    before = seen()
    assert verify(model, X, losses=losses, show=False, regularizer=regularizer).passed
    assert seen() == before
    model(X)
    regularizer()
    assert seen() != before


def test_a_model_that_raises_is_put_back() -> None:
    model = Counting()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        report_of(model, torch.zeros(6, 3))
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)


# How it is told.


def test_strict_raises_and_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        VerificationError, match=r"(?s)2 checks failed:\nsaliency .*\nsamples +FAIL  .*'heads.b.1' \(Centred\)"
    ):
        verify(with_part(Centred()), X, strict=True)
    assert "2 of 9 checks failed" in capsys.readouterr().out
    assert verify(Net(), X, strict=True).passed


def test_wrong_use() -> None:
    model = Net()
    with pytest.raises(WrongTypeError, match="model must be"):
        verify("model", X)
    with pytest.raises(WrongTypeError, match="losses= must be a function"):
        verify(model, X, losses={"a": torch.zeros(())})
    with pytest.raises(ConfigurationError, match="lazy"):
        verify(nn.LazyLinear(2), X)
    with pytest.raises(TypeError, match="strenght"):
        verify(model, X, strenght=1)
    report = verify(model, X, heads="head", show=False)
    assert failed(report) == ["heads"]
    assert "'head'" in report["heads"].found
    assert report["saliency"].found == "not checked: the regularizer could not be built"
    regularizer = SaliencyRegularizer(model, "heads")
    with pytest.raises(AlreadyAttachedError, match="regularizer=it"):
        verify(model, X)
    with pytest.raises(ConfigurationError, match=r"\['strength'\] are those of the regularizer"):
        verify(model, X, regularizer=regularizer, strength=1.0)
    with pytest.raises(WrongTypeError, match="attached to the model"):
        verify(model, X, regularizer=copy.deepcopy(regularizer))
    regularizer.remove()
    FeatureSurgery(model, "heads")
    with pytest.raises(AlreadyAttachedError, match=r"call .remove\(\)"):
        verify(model, X)


COMMAND = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.backbone = nn.Linear(4, 3)
        self.heads = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), part, nn.Linear(3, 1)), "b": nn.Linear(3, 1)})
    def forward(self, x):
        feature = self.backbone(x)
        return {task: head(feature) for task, head in self.heads.items()}

class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)

def healthy(): return Net(nn.Tanh()), torch.randn(4, 4)
def defect(): return {"model": Net(Centred()), "batch": torch.randn(4, 4), "heads": "heads"}
def wrong(): return Net(nn.Tanh())
def raises(): return {}["foo"]
def typo(): return {"model": Net(nn.Tanh()), "batch": torch.randn(4, 4), "strenght": 1}
def shapes(): return Net(nn.Tanh()), torch.randn(4, 7)
"""


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(COMMAND)
    path = {"PYTHONPATH": str(ROOT)}
    for what, code, words in (("healthy", 0, "No check failed."), ("defect", 1, "'heads.a.1' (Centred)")):
        command = [sys.executable, "-m", "saliency_reg.verification", f"mine:{what}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **path})
        assert done.returncode == code, done.stdout + done.stderr
        assert words in done.stdout


@pytest.mark.parametrize(("what", "code", "words"), [
    (["mine:healthy"], 0, ""),
    (["mine:wrong"], 2, "expected (model, batch) or a dict with both"),
    (["mine:nothing"], 2, "cannot be imported"),
    (["nowhere:nothing"], 2, "cannot be imported"),
    (["mine:raises"], 2, "'mine:raises' raised KeyError: 'foo'"),
    (["mine:typo"], 2, "no option 'strenght'. Did you mean 'strength'?"),
    (["mine:shapes"], 2, "mat1 and mat2"),
    (["mine.py:healthy"], 2, "Leave out .py: mine:healthy"),
    (["mine"], 2, "is no file, and names no function"),
    (["saved.pt"], 2, "loading a pickled model runs whatever code is in it. Pass --trust if you wrote it"),
    (["saved.pt", "--trust"], 0, ""),
])  # fmt: skip
def test_what_the_command_takes(
    what: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(COMMAND)
    torch.save((build("tanh heads").model, build("tanh heads").inputs), "saved.pt")
    assert main(what) == code
    error = capsys.readouterr().err
    assert words in error
    assert code != 2 or len(error.splitlines()) == 1
