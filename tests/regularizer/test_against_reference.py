"""Value and gradient of the penalty, against loops over samples and tasks, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer, task_distances, task_saliencies
from saliency_reg.saliency.distances import METRICS
from tests.reference.slow import slow_distances, slow_penalty, slow_pool, slow_saliency
from tests.support.zoo import TASKS, ZOO, Entry, build

POOLS = ("sum", "mean", None)
TOLERANCE = 1e-10


def centred(output: Tensor) -> Tensor:
    return (output.amax(1) - output.mean(1)).sum()


# One sample's output [1, K, positions...] to its scalar, written apart from the library.
SCALARS = {
    "auto": lambda output, target: centred(output),
    "max": lambda output, target: output.amax(1).sum(),
    "logsumexp": lambda output, target: output.exp().sum(1).log().sum(),
    "sum": lambda output, target: output.sum(),
    "label": lambda output, target: output.gather(1, target.unsqueeze(1)).sum(),
    "label_log_probability": lambda output, target: -F.cross_entropy(output, target, reduction="sum"),
}


def classes_second(output: Tensor, entry: Entry) -> Tensor:
    """Token outputs [B, L, K] hold their classes last; the reference wants them on axis 1."""
    return output.movedim(-1, 1) if output.ndim == 3 else output


def task_loss(output: Tensor, target: Tensor, classes: int) -> Tensor:
    """Per-sample losses [B], smooth, so that every gradient exists."""
    if classes == 1:
        sign = 1 - 2 * target.reshape(len(target), -1).to(output.dtype)
        return F.softplus(output.reshape(len(target), -1) * sign).sum(1)
    return F.cross_entropy(output, target, reduction="none").reshape(len(target), -1).sum(1)


def make_targets(entry: Entry) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(entry.inputs), *entry.positions)
    return {task: torch.randint(max(entry.classes, 2), shape, generator=generator) for task in TASKS}


def weights_of(seed: int = 2) -> Tensor:
    raw = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu(1)
    return (raw + raw.T) / raw.sum()


def reference(entry: Entry, scalarize: str, target: str, targets: dict[str, Tensor], mask: Tensor | None):
    """Per-task, per-sample gradients of a clean copy of the model, and that copy."""
    model = copy.deepcopy(entry.model)
    gradients: list[list[Tensor]] = [[] for _ in TASKS]
    for b in range(len(entry.inputs)):
        feature = model.feature_map(entry.inputs[b : b + 1])
        outputs = model.from_feature(feature.clone())
        for t, task in enumerate(TASKS):
            output, label = classes_second(outputs[task], entry), targets[task][b : b + 1]

            def scalar(value: Tensor, label: Tensor = label) -> Tensor:
                if target == "loss":
                    return task_loss(value, label, entry.classes).sum()
                return value.sum() if entry.classes == 1 else SCALARS[scalarize](value, label)

            gradients[t].append(slow_saliency(output, feature, scalar))
    return model, gradients


def reference_penalty(entry: Entry, gradients, pool, metric, reduction, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    pooled = [
        [slow_pool(g, pool, entry.channel_axis, None if mask is None else mask[b]) for b, g in enumerate(row)]
        for row in gradients
    ]
    if mask is not None:  # rows of padding alone are no samples
        pooled = [[own for b, own in enumerate(row) if bool(mask[b].any())] for row in pooled]
    distances = slow_distances(pooled, metric, reduction)
    return slow_penalty(distances, weights_of()), distances


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    found, expected = found.detach(), expected.detach()
    scale = max(float(expected.abs().max()), 1e-3)
    error = float((found - expected).abs().max()) / scale
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


def compare(name: str, scalarize: str, target: str, *, masked: bool = False, losses_are: str = "mean") -> None:
    entry = build(name)
    targets = make_targets(entry)
    mask = None
    if masked:
        mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
        if entry.inputs.ndim == 4:
            mask = mask.reshape(3, 2, 2)
    reference_model, gradients = reference(entry, scalarize, target, targets, mask)
    for first, metric in enumerate(METRICS):
        for second, pool in enumerate(POOLS):
            reduction = ("mean", "sum")[(first + second) % 2]
            expected, expected_distances = reference_penalty(entry, gradients, pool, metric, reduction, mask)
            expected_gradients = torch.autograd.grad(
                expected, list(reference_model.parameters()), retain_graph=True, allow_unused=True
            )
            model = copy.deepcopy(entry.model)
            options = {"heads": "heads", **entry.options}
            regularizer = SaliencyRegularizer(
                model,
                **options,
                target=target,
                scalarize=scalarize,
                metric=metric,
                pool=pool,
                reduction=reduction,
                loss_reduction="sum" if losses_are == "sum" else "mean",
                strength=0.7,
                relations=RelationWeights(3, "fixed", matrix=weights_of()),
            )
            outputs = model(entry.inputs)
            losses = None
            if target == "loss":
                by_task = outputs if isinstance(outputs, dict) else dict(zip(TASKS, outputs.unbind(1)))
                per_sample = {
                    task: task_loss(classes_second(output, entry), targets[task], entry.classes)
                    for task, output in by_task.items()
                }
                reduce = {"mean": torch.mean, "sum": torch.sum, "per sample": lambda loss: loss}[losses_are]
                losses = {task: reduce(loss) for task, loss in per_sample.items()}
            labels = targets if scalarize.startswith("label") else None
            penalty = regularizer(losses=losses, targets=labels, mask=mask)
            case = f"{name}, {scalarize}, {target}, {metric}, pool={pool}"
            assert_close(penalty / 0.7, expected, f"value of {case}")
            assert regularizer.report is not None
            assert_close(regularizer.report.distances, expected_distances, f"distances of {case}")
            found = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
            for (parameter, _), ours, theirs in zip(model.named_parameters(), found, expected_gradients):
                ours = torch.zeros(()) if ours is None else ours
                theirs = torch.zeros(()) if theirs is None else theirs * 0.7
                assert_close(ours, theirs, f"gradient of {parameter} in {case}")


@pytest.mark.parametrize("scalarize", SCALARS)
@pytest.mark.parametrize("name", [name for name in ZOO if "3 classes" in name])
def test_classes(name: str, scalarize: str) -> None:
    compare(name, scalarize, "output")


@pytest.mark.parametrize("name", [name for name in ZOO if "3 classes" not in name])
def test_single_outputs(name: str) -> None:
    compare(name, "auto", "output")


@pytest.mark.parametrize("scalarize", SCALARS)
def test_single_outputs_are_their_own_scalar(scalarize: str) -> None:
    compare("tanh heads", scalarize, "output")


@pytest.mark.parametrize("name", ZOO)
def test_losses(name: str) -> None:
    compare(name, "auto", "loss")


@pytest.mark.parametrize("losses_are", ["sum", "per sample"])
@pytest.mark.parametrize("name", ["relu heads", "mlp columns", "dense heads, 3 classes"])
def test_kinds_of_losses(name: str, losses_are: str) -> None:
    compare(name, "auto", "loss", losses_are=losses_are)


@pytest.mark.parametrize("order", [("third", "first", "second"), ("second", "third")])
def test_outputs_given_by_hand_in_any_order(order: tuple[str, ...]) -> None:
    entry = build("tanh heads")
    feature = entry.model.feature_map(entry.inputs)
    outputs = entry.model.from_feature(feature)
    regularizer = SaliencyRegularizer(
        None, tasks=TASKS, strength=1.0, relations=RelationWeights(3, "fixed", matrix=weights_of()), metric="l1"
    )
    penalty = regularizer(outputs={task: outputs[task] for task in order}, features=feature)
    rows = [TASKS.index(task) for task in order]
    distances = task_distances(task_saliencies([outputs[task] for task in order], feature))
    expected = (distances * weights_of()[rows][:, rows]).triu(1).sum()
    torch.testing.assert_close(penalty, expected)
    assert regularizer.report is not None
    for i, first in zip(rows, range(len(rows))):
        for j, second in zip(rows, range(len(rows))):
            torch.testing.assert_close(regularizer.report.distances[i, j], distances[first, second].detach())


@pytest.mark.parametrize("target", ["output", "loss"])
@pytest.mark.parametrize("name", ["token heads", "token heads, 3 classes", "pooling heads", "dense heads"])
def test_mask(name: str, target: str) -> None:
    compare(name, "auto", target, masked=True)


@pytest.mark.parametrize("name", ["relu heads", "pooling heads", "linear heads", "linear columns", "trunk"])
def test_frozen_backbone(name: str) -> None:
    """The penalty and the heads' gradients are those of the trainable backbone."""
    entry = build(name)
    options = {"heads": "heads", **entry.options}
    found = {}
    for frozen in (False, True):
        model = copy.deepcopy(entry.model)
        if frozen:
            backbone = model.stem if name == "trunk" else model.backbone
            backbone.requires_grad_(False)
        regularizer = SaliencyRegularizer(model, **{"metric": "l1", **options}, strength=1.0)
        model(entry.inputs)
        penalty = regularizer()
        penalty.backward()
        heads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        found[frozen] = (penalty, heads)
    assert torch.equal(found[False][0], found[True][0])
    assert found[True][1]
    for parameter, gradient in found[True][1].items():
        assert torch.equal(gradient, found[False][1][parameter]), parameter


def test_separate_heads_need_one_autograd_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(len(a[0])) or original(*a, **k))
    entry = build("tanh heads")
    regularizer = SaliencyRegularizer(entry.model, heads="heads", strength=0.1, metric="l1")
    for _ in range(3):
        calls.clear()
        entry.model(entry.inputs)
        regularizer()
    assert calls == [3]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["tanh heads", "tanh heads, 3 classes", "pooling heads", "trunk", "cascade"])
def test_second_derivatives_by_finite_differences(name: str, metric: str) -> None:
    """gradcheck of the penalty is a check of second derivatives of the heads."""
    entry = build(name)
    entry.inputs = entry.inputs[:2]
    scalarize = "logsumexp" if entry.classes > 1 else "auto"
    parameters = dict(entry.model.named_parameters())

    def penalty(*values: Tensor) -> Tensor:
        replaced = dict(zip(parameters, values))
        feature = torch.func.functional_call(_Part(entry.model, "feature_map"), _inner(replaced), (entry.inputs,))
        outputs = torch.func.functional_call(_Part(entry.model, "from_feature"), _inner(replaced), (feature,))
        saliencies = task_saliencies(outputs, feature, scalarize=scalarize)
        return (task_distances(saliencies, metric=metric) * weights_of()).sum()

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(penalty, values, atol=1e-6)


def _inner(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in parameters.items()}


class _Part(nn.Module):
    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *args: Tensor):
        return getattr(self.model, self.method)(*args)


def test_saliencies_pass_gradgradcheck() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()

    def saliencies(feature: Tensor) -> Tensor:
        return task_saliencies(head(feature).unbind(1), feature)

    feature = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(saliencies, feature)
    assert torch.autograd.gradgradcheck(saliencies, feature)
