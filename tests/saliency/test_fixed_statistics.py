"""BatchNorm in train mode between feature and outputs: a sample's saliency is its own, and the penalty differentiates that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency_reg import PCGrad, SaliencyRegularizer, task_distances, task_saliencies
from saliency_reg.errors import ConfigurationError, CrossSampleError
from tests.support.two_processes import run_on_two_processes

STRENGTH = 0.7
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def vectors(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, **options), nn.Tanh(), nn.Linear(4, 1))


def twice() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 4), nn.Tanh(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)
    )


def lines() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 1)
    )


def maps() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)
    )


class Functional(nn.Module):
    """No module tells that there is a BatchNorm in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.batch_norm(self.first(x), None, None, training=self.training)
        return self.last(hidden.tanh())


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "vectors": (vectors, (7, 6), {}),
    "no statistics kept": (lambda: vectors(track_running_stats=False), (7, 6), {}),
    "two of them": (twice, (7, 6), {}),
    "lines": (lines, (5, 3, 8), {"channel_axis": 1}),
    "maps": (maps, (5, 3, 6, 6), {}),
}


def model_of(head: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.ModuleDict, Tensor]:
    torch.manual_seed(0)
    width = shape[1]
    backbone = nn.Linear(width, width) if len(shape) == 2 else (nn.Conv1d, nn.Conv2d)[len(shape) - 3](width, width, 1)
    heads = nn.ModuleDict({task: head() for task in "abc"})
    for part in heads.modules():
        if isinstance(part, NORMS) and part.affine:
            nn.init.normal_(part.weight, 1.0, 0.5)
    return nn.ModuleDict({"backbone": backbone, "heads": heads}).double(), torch.randn(shape, dtype=torch.float64)


def own_saliency(head: nn.Module, feature: Tensor) -> Tensor:
    """The derivative at a second feature of the same values, with the statistics of the first: explicit autograd."""
    head, found = copy.copy(head), {}
    second = feature.view_as(feature) if feature.requires_grad else feature.detach().requires_grad_()
    norms = [part for part in head.modules() if isinstance(part, NORMS)]
    momenta = [part.momentum for part in norms]

    def note(part: Any, args: tuple[Tensor]) -> None:
        axes = [0, *range(2, args[0].ndim)]
        found[part] = args[0].mean(axes, keepdim=True), args[0].var(axes, correction=0, keepdim=True)

    def use(part: Any, args: tuple[Tensor], _: Tensor) -> Tensor:
        mean, variance = found[part]
        values = (args[0] - mean) / (variance + part.eps).sqrt()
        if not part.affine:
            return values
        shape = (1, -1, *[1] * (values.ndim - 2))
        return values * part.weight.view(shape) + part.bias.view(shape)

    for part in norms:
        part.momentum = 0.0  # the running statistics stay
    with ExitStack() as stack:
        for part in norms:
            stack.callback(part.register_forward_pre_hook(note).remove)
        head(feature)
    with ExitStack() as stack:
        for part in norms:
            stack.callback(part.register_forward_hook(use).remove)
        (saliency,) = torch.autograd.grad(head(second).sum(), second, create_graph=True)
    for part, momentum in zip(norms, momenta):
        part.momentum = momentum
    return saliency.flatten(2).sum(2) if saliency.ndim > 2 else saliency


def expected_penalty(model: nn.ModuleDict, feature: Tensor) -> Tensor:
    saliencies = torch.stack([own_saliency(head, feature) for head in model["heads"].values()])
    return STRENGTH * task_distances(saliencies, metric="sqeuclidean").triu(1).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_saliency_and_penalty_are_those_of_explicit_autograd(shape: str) -> None:
    head, size, options = SHAPES[shape]
    model, x = model_of(head, size)
    expected = expected_penalty(model, model["backbone"](x))
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    regularizer = SaliencyRegularizer(
        model, "heads", strength=STRENGTH, relations="fixed", metric="sqeuclidean", **options
    )
    factor = float(regularizer.relations.matrix()[0, 1])
    feature = model["backbone"](x)
    outputs = [one(feature) for one in model["heads"].values()]
    after, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plain = torch.autograd.grad(
        sum(output.square().sum() for output in outputs), list(model.parameters()), retain_graph=True
    )
    penalty = regularizer()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(penalty, factor * expected, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True, retain_graph=True)
    for ours, theirs in zip(found, wanted):
        zero = torch.zeros(())
        torch.testing.assert_close(
            (zero if ours is None else ours).sum(),
            factor * (zero if theirs is None else theirs).sum(),
            rtol=1e-8,
            atol=1e-10,
            check_dtype=False,
        )
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, factor * theirs, rtol=1e-8, atol=1e-10)
    again = torch.autograd.grad(sum(output.square().sum() for output in outputs), list(model.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, again))  # the losses' gradient is untouched


def test_the_gradient_of_the_penalty_by_finite_differences() -> None:
    model, x = model_of(twice, (7, 6))
    weight = model["heads"]["a"][1].weight

    def penalty() -> Tensor:
        feature = model["backbone"](x)
        return task_distances(
            task_saliencies([one(feature) for one in model["heads"].values()], feature), metric="sqeuclidean"
        ).sum()

    inputs = [weight, model["backbone"].weight]
    directions = [torch.randn_like(one) for one in inputs]
    found = sum((g * d).sum() for g, d in zip(torch.autograd.grad(penalty(), inputs), directions))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for one, direction in zip(inputs, directions):
                one += sign * 1e-6 * direction
        values.append(penalty().detach())
        with torch.no_grad():
            for one, direction in zip(inputs, directions):
                one -= sign * 1e-6 * direction
    torch.testing.assert_close(found, (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", ["vectors", "maps"])
def test_what_a_sample_has_does_not_depend_on_its_weight_in_the_batch(shape: str) -> None:
    """Of the trained kind, where differentiated statistics take all away: the sum of normalised values is constant."""
    head, size, _ = SHAPES[shape]
    model, x = model_of(head, size)
    feature = model["backbone"](x)
    outputs = [one(feature) for one in model["heads"].values()]
    fixed, through = (task_saliencies(outputs, feature, cross_sample=how) for how in ("fix", "ignore"))
    assert not torch.allclose(fixed, through)
    with pytest.raises(ConfigurationError, match="unknown cross_sample 'warn'"):
        task_saliencies(outputs, feature, cross_sample="warn")
    model.eval()
    outputs = [one(feature) for one in model["heads"].values()]
    fixed, through = (task_saliencies(outputs, feature, cross_sample=how) for how in ("fix", "ignore"))
    assert torch.equal(fixed, through)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_instance_norm_keeps_its_own_statistics(size: int, affine: bool) -> None:
    norm = nn.InstanceNorm1d(4, affine=affine)
    head = nn.Sequential(nn.Conv1d(3, 4, 1), norm, nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 1))
    x = torch.randn(size, 3, 8, dtype=torch.float64, requires_grad=True)
    outputs = [copy.deepcopy(head).double()(x), head.double()(x)]
    fixed, through = (task_saliencies(outputs, x, channel_axis=1, cross_sample=how) for how in ("fix", "ignore"))
    assert torch.equal(fixed, through)


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


def penalty_and_gradients(model: nn.ModuleDict, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """With the losses in the same backward pass."""
    regularizer = SaliencyRegularizer(
        model, "heads", strength=STRENGTH, relations="fixed", **{"metric": "l1", **options}
    )
    feature = model["backbone"](x)
    outputs = [one(feature) for one in model["heads"].values()]
    penalty = regularizer()
    gradients = torch.autograd.grad(sum(one.square().mean() for one in outputs) + penalty, list(model.parameters()))
    regularizer.remove()
    return penalty.detach(), list(gradients)


@pytest.mark.parametrize("cross_sample", ["fix", "ignore"])
@pytest.mark.parametrize("shape", ["vectors", "two of them", "maps"])
def test_behind_a_checkpoint(shape: str, cross_sample: str) -> None:
    head, size, options = SHAPES[shape]
    model, x = model_of(head, size)
    plain = penalty_and_gradients(model, x, cross_sample=cross_sample, **options)
    for task, one in list(model["heads"].items()):
        model["heads"][task] = Checkpointed(one)
    found = penalty_and_gradients(model, x, cross_sample=cross_sample, **options)
    torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-13)
    assert cross_sample == "ignore" or plain[0] > 1e-3


@pytest.mark.parametrize("kernel", [1, 3])
def test_one_sample_is_that_sample_repeated(kernel: int) -> None:
    """The same statistics, so the same saliencies: dense heads, which alone have statistics of one sample."""

    def dense() -> nn.Module:
        first = nn.Conv2d(3, 4, kernel, padding=kernel // 2)
        return nn.Sequential(first, nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 1))

    model, x = model_of(dense, (1, 3, 5, 5))
    alone = penalty_and_gradients(model, x)
    repeated = penalty_and_gradients(model, x.repeat(3, 1, 1, 1))
    torch.testing.assert_close(alone, repeated, rtol=1e-9, atol=1e-11)
    assert alone[0] > 1e-3


@pytest.mark.parametrize("head", [vectors, Functional])
@pytest.mark.parametrize("max_tasks", [None, 2])
def test_surgery_does_not_change_the_penalty(head: Callable[[], nn.Module], max_tasks: int | None) -> None:
    found = []
    for surgery in (None, PCGrad(), lambda gramian: torch.ones(3, dtype=gramian.dtype)):
        model, x = model_of(head, (7, 6))
        regularizer = SaliencyRegularizer(
            model,
            "heads",
            strength=STRENGTH,
            surgery=surgery,
            relations="fixed",
            max_tasks_per_step=max_tasks,
            metric="l1",
        )
        feature = model["backbone"](x)
        losses = [one(feature).square().mean() for one in model["heads"].values()]
        penalty = regularizer()
        (sum(losses) + penalty).backward()
        found.append((penalty.detach(), [parameter.grad for parameter in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    for plain, passed in zip(found[0][1], found[2][1]):  # a surgery that weighs nothing
        torch.testing.assert_close(plain, passed, rtol=1e-9, atol=1e-11)


def test_accumulation_and_a_later_switch_to_eval_mode() -> None:
    model, x = model_of(vectors, (7, 6))
    regularizer = SaliencyRegularizer(model, "heads", strength=STRENGTH, relations="fixed", metric="sqeuclidean")
    factor = float(regularizer.relations.matrix()[0, 1])
    for step in range(3):
        model.train(step != 1)
        for batch in (x[:4], x[4:]):
            feature = model["backbone"](batch)
            for one in model["heads"].values():
                one(feature)
            penalty = regularizer()
            with Off(regularizer):
                if step == 1:
                    outputs = [one(feature) for one in model["heads"].values()]
                    saliencies = torch.stack(
                        [torch.autograd.grad(one.sum(), feature, retain_graph=True)[0] for one in outputs]
                    )
                    expected = STRENGTH * task_distances(saliencies, metric="sqeuclidean").triu(1).sum()
                else:
                    expected = expected_penalty(model, feature)
            torch.testing.assert_close(penalty.detach(), factor * expected.detach(), rtol=1e-10, atol=1e-12)
            penalty.backward()


class Off:
    def __init__(self, regularizer: SaliencyRegularizer) -> None:
        self.regularizer = regularizer

    def __enter__(self) -> None:
        self.regularizer.enabled = False

    def __exit__(self, *_: object) -> None:
        self.regularizer.enabled = True


def test_autocast() -> None:
    model, x = model_of(vectors, (7, 6))
    model, x = model.float(), x.float()
    regularizer = SaliencyRegularizer(model, "heads", strength=STRENGTH, metric="l1")
    penalties = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            feature = model["backbone"](x)
            for one in model["heads"].values():
                one(feature)
            penalties.append(regularizer())
    penalties[1].backward()
    torch.testing.assert_close(penalties[0], penalties[1], rtol=0.05, atol=0)
    assert torch.isfinite(model["backbone"].weight.grad).all()


def ddp(rank: int) -> list[Tensor]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            model, self.x = model_of(vectors, (8, 6))
            self.backbone, self.heads = model["backbone"], model["heads"]

        def forward(self, x: Tensor) -> list[Tensor]:
            feature = self.backbone(x)
            return [one(feature) for one in self.heads.values()]

    net = Net()
    model = nn.parallel.DistributedDataParallel(net)
    regularizer = SaliencyRegularizer(model, "heads", strength=STRENGTH, relations="fixed", metric="sqeuclidean")
    outputs = model(net.x[4 * rank : 4 * rank + 4])
    penalty = regularizer()
    with Off(regularizer):
        parts = nn.ModuleDict({"backbone": net.backbone, "heads": net.heads})
        expected = expected_penalty(parts, net.backbone(net.x[4 * rank : 4 * rank + 4]))
    (sum(output.sum() for output in outputs) + penalty).backward()
    return [penalty.detach(), expected.detach() * regularizer.relations.matrix()[0, 1], net.heads["a"][1].weight.grad]


def test_two_processes() -> None:
    first, second = run_on_two_processes(ddp)
    for penalty, expected, _ in (first, second):
        torch.testing.assert_close(penalty, expected)
    assert torch.equal(first[2], second[2])


class OverTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last, self.share = nn.BatchNorm1d(6), nn.Linear(6, 1), 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).tanh()
        return self.last(x - self.share * x.mean(0))


@pytest.mark.parametrize("share", [0.5, 1.0])  # with all of the mean, changes of one sample cancel over the batch
def test_what_mixes_samples_beside_a_batch_norm_is_still_told(share: float) -> None:
    model, x = model_of(OverTheBatch, (7, 6))
    for head in model["heads"].values():
        head.share = share

    def run(regularizer: SaliencyRegularizer) -> None:
        feature = model["backbone"](x)
        for one in model["heads"].values():
            one(feature)
        regularizer()
        regularizer.remove()

    with pytest.warns(UserWarning, match="the penalty compares noise. Attention over the batch"):
        run(SaliencyRegularizer(model, "heads", strength=0.1, metric="l1"))
    with pytest.raises(CrossSampleError, match="pass cross_sample='fix'"):
        run(SaliencyRegularizer(model, "heads", cross_sample="error", strength=0.1, metric="l1"))


@pytest.mark.parametrize("surgery", [None, PCGrad])
def test_behind_a_checkpoint_nothing_is_counted_twice(surgery: Any) -> None:
    """What a checkpoint saved is read outside of the backward pass, for which the head runs again."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"backbone": nn.Linear(3, 6), "heads": nn.ModuleDict({name: Checkpointed() for name in "ab"})}
    )
    options = {} if surgery is None else {"surgery": surgery()}
    regularizer = SaliencyRegularizer(model, heads="heads", **{"strength": 0.1, "metric": "l1", **options})
    for count in (1, 2, 3):
        feature = model["backbone"](torch.randn(7, 3)).tanh()
        outputs = [checkpoint(head, feature, use_reentrant=False) for head in model["heads"].values()]
        before = [head.inner[1].running_mean.clone() for head in model["heads"].values()]
        penalty = regularizer()
        for head, mean in zip(model["heads"].values(), before):
            # The first call measures, and surgery looks at what is behind: each in a backward pass.
            assert count == 1 or surgery or torch.equal(head.inner[1].running_mean, mean)
        assert penalty > 0
        if count == 1:
            (penalty + sum(output.square().mean() for output in outputs)).backward()
