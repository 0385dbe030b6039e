"""Surgery on the parameters: a textbook loop gives the same gradients, and wrong use leaves all of them as they were."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, SaliencyRegularizer, errors
from tests.reference.slow_surgery import conflicting_pairs, flat_gradient, split_like, textbook_pcgrad

TASKS = ("a", "b", "c", "d")
SAMPLES = 24


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """Four tasks on a backbone of two layers; one parameter that nothing uses."""

    def __init__(self, tasks: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        self.lower = nn.Linear(6, 8)
        self.upper = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in tasks})
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = torch.tanh(self.upper(torch.tanh(self.lower(x))))
        return {task: head(feature) for task, head in self.heads.items()}


def make(seed: int = 0, tasks: tuple[str, ...] = TASKS) -> Net:
    torch.manual_seed(seed)
    return Net(tasks)


def data(step: int = 0, tasks: tuple[str, ...] = TASKS) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(SAMPLES, 6, generator=generator)
    return x, {task: 3 * torch.randn(SAMPLES, 1, generator=generator) for task in tasks}


def losses_of(model: nn.Module, step: int = 0, part: slice = slice(None), factor: float = 1.0) -> dict[str, Tensor]:
    tasks = tuple(model.heads)
    x, targets = data(step, tasks)
    outputs = model(x[part])
    return {task: factor * (outputs[task] - targets[task][part]).square().mean() for task in tasks}


def penalty_of(model: Net) -> Tensor:
    """Reaches the backbone, the heads, and the parameter that no loss reaches."""
    return torch.stack([parameter.pow(3).sum() for parameter in model.parameters()]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def expected(
    model: Net, losses: dict[str, Tensor], order: Tensor, penalty: Tensor | None = None, measure: str = "er."
) -> dict[str, Tensor | None]:
    """Textbook gradients, with the weights found on the parameters whose names hold ``measure``."""
    shared = {name: p for name, p in model.named_parameters() if name.startswith(("lower", "upper"))}
    rows = [flat_gradient(loss, list(shared.values())) for loss in losses.values()]
    chosen = torch.cat([torch.full((p.numel(),), measure in name) for name, p in shared.items()])
    assert conflicting_pairs([row[chosen] for row in rows]) > 0
    if bool(chosen.all()):
        combined = textbook_pcgrad(rows, order)
    else:
        # The textbook result lies in the span of the task gradients: its coordinates there are the weights.
        inside = torch.stack([row[chosen] for row in rows])
        result = textbook_pcgrad(list(inside), order)
        weights = torch.linalg.lstsq(inside.T, result.unsqueeze(1)).solution[:, 0]
        combined = (weights.unsqueeze(1) * torch.stack(rows)).sum(0)
    found: dict[str, Tensor | None] = dict(zip(shared, split_like(combined, list(shared.values()))))
    for name, parameter in model.named_parameters():
        if name not in shared:
            found[name] = torch.autograd.grad(sum(losses.values()), parameter, retain_graph=True, allow_unused=True)[0]
        if penalty is not None:
            (extra,) = torch.autograd.grad(penalty, parameter, retain_graph=True)
            found[name] = extra if found[name] is None else found[name] + extra
    return found


def assert_same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name] is not None, name
            torch.testing.assert_close(
                found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


def order_of(call: int = 0, tasks: int = len(TASKS)) -> Tensor:
    return PCGrad().order(tasks, call)


# The values.


@pytest.mark.parametrize("with_penalty", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared": ["lower", "upper"]},
        {"tasks": TASKS, "shared": "lower", "measure": "lower.weight"},
        {"measure": "upper"},
        {"measure": "lower"},
        {"chunk_size": 1},
        {"chunk_size": 3},
        {"chunk_size": 2, "measure": "upper"},
    ],
    ids=str,
)
def test_equals_a_textbook_loop(options: dict[str, Any], with_penalty: bool) -> None:
    model = make()
    if "measure" in options and "." in options["measure"]:
        options = {
            "shared": [*model.lower.parameters(), model.upper],
            "measure": [model.lower.weight, model.lower.bias],
        }
    surgery = ParameterSurgery(model, PCGrad(), **options)
    measure = {"upper": "upper.", "lower": "lower."}.get(str(options.get("measure")), "er.")
    if isinstance(options.get("measure"), list):
        measure = "lower."
    for step in range(3):
        model.zero_grad()
        losses = losses_of(model, step)
        penalty = penalty_of(model) if with_penalty else None
        wanted = expected(model, losses, order_of(step), penalty, measure)
        surgery.backward(losses, penalty)
        assert_same(gradients(model), wanted)
        assert (model.unused.weight.grad is None) is not with_penalty


def test_the_textbook_itself_is_not_the_plain_sum() -> None:
    model = make()
    losses = losses_of(model)
    plain = torch.autograd.grad(sum(losses.values()), model.lower.weight, retain_graph=True)[0]
    assert (expected(model, losses, order_of())["lower.weight"] - plain).abs().max() > 1e-3
    assert (
        expected(model, losses, order_of())["lower.weight"]
        - expected(model, losses, order_of(), None, "upper.")["lower.weight"]
    ).abs().max() > 1e-3


def test_adds_to_what_is_there() -> None:
    model = make()
    losses = losses_of(model)
    wanted = expected(model, losses, order_of())
    before = {name: torch.randn_like(p) for name, p in model.named_parameters() if "bias" not in name}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name].clone() if name in before else None
    places = {name: parameter.grad for name, parameter in model.named_parameters()}
    ParameterSurgery(model).backward(losses)
    for name, value in before.items():
        wanted[name] = value if wanted[name] is None else wanted[name] + value
        assert gradients(model)[name] is places[name]
    assert_same(gradients(model), wanted)


def test_equals_torchjd_for_two_tasks() -> None:
    autojac = pytest.importorskip("torchjd.autojac")
    aggregation = pytest.importorskip("torchjd.aggregation")
    model, twin = make(tasks=("a", "b")), make(tasks=("a", "b"))
    surgery = ParameterSurgery(model)
    conflicts = 0.0
    for step in range(20):
        model.zero_grad()
        twin.zero_grad()
        surgery.backward(losses_of(model, step))
        conflicts += surgery.report.conflicts
        x, targets = data(step, ("a", "b"))
        feature = torch.tanh(twin.upper(torch.tanh(twin.lower(x))))
        losses = [(twin.heads[task](feature) - targets[task]).square().mean() for task in ("a", "b")]
        autojac.mtl_backward(losses, features=feature)
        autojac.jac_to_grad([*twin.lower.parameters(), *twin.upper.parameters()], aggregation.PCGrad())
        assert_same(gradients(model), gradients(twin))
    assert 0 < conflicts < 20


def test_other_weightings() -> None:
    model = make()
    losses = losses_of(model)
    shared = [*model.lower.parameters(), *model.upper.parameters()]
    rows = [flat_gradient(loss, shared) for loss in losses.values()]

    seen = []

    def halves(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return torch.tensor([0.5, 0.0, 2.0, -1.0])

    ParameterSurgery(model, halves).backward(list(losses.values()))
    found = torch.cat([parameter.grad.reshape(-1) for parameter in shared])
    torch.testing.assert_close(found, 0.5 * rows[0] + 2 * rows[2] - rows[3])
    torch.testing.assert_close(seen[-1], torch.stack(rows) @ torch.stack(rows).T)


@pytest.mark.parametrize("name", ["UPGrad", "MGDA", "AlignedMTL", "IMTLG", "CAGrad"])
def test_weightings_of_torchjd(name: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    for module in {"CAGrad": ["cvxpy", "clarabel"], "UPGrad": ["quadprog", "qpsolvers"]}.get(name, []):
        pytest.importorskip(module)
    build = {"CAGrad": lambda: aggregation.CAGrad(c=0.5)}.get(name, lambda: getattr(aggregation, name)())
    model = make()
    losses = losses_of(model)
    shared = [*model.lower.parameters(), *model.upper.parameters()]
    rows = torch.stack([flat_gradient(loss, shared) for loss in losses.values()])
    surgery = ParameterSurgery(model, build())
    surgery.backward(losses)
    found = torch.cat([parameter.grad.reshape(-1) for parameter in shared])
    torch.testing.assert_close(found, build()(rows), rtol=1e-4, atol=1e-6)


def test_report() -> None:
    model = make()
    surgery = ParameterSurgery(model)
    assert surgery.report is None
    losses = losses_of(model)
    rows = torch.stack(
        [flat_gradient(loss, [*model.lower.parameters(), *model.upper.parameters()]) for loss in losses.values()]
    )
    surgery.backward(losses)
    report = surgery.report
    assert report.tasks == TASKS
    torch.testing.assert_close(report.gramian, rows @ rows.T)
    torch.testing.assert_close(report.weights, PCGrad()(rows @ rows.T))
    assert report.conflicts == conflicting_pairs(rows) / 6


# Which parameters.


def test_a_task_may_be_missing() -> None:
    model = make()
    surgery = ParameterSurgery(model, tasks=TASKS)
    for call, absent in enumerate([("b",), ("b", "d")]):
        model.zero_grad()
        losses = {task: loss for task, loss in losses_of(model, 1).items() if task not in absent}
        order = order_of(call)
        rows = [task for task in range(4) if TASKS[task] not in absent]
        # The order among those that are there: a zero gradient changes nothing.
        among = [[rows.index(int(other)) for other in order[task] if int(other) in rows] for task in rows]
        wanted = expected(model, losses, among)
        surgery.backward(losses)
        assert_same(gradients(model), wanted)
        assert all(gradients(model)[f"heads.{task}.weight"] is None for task in absent)
        assert surgery.report.weights.isnan().tolist() == [task in absent for task in TASKS]


def test_a_single_task_gets_its_plain_gradient_and_none_only_the_penalty() -> None:
    for options in ({}, {"shared": ["lower", "upper"]}, {"measure": "upper"}, {"chunk_size": 2}):
        model = make()
        surgery = ParameterSurgery(model, tasks=TASKS, **options)
        surgery.backward({"b": losses_of(model)["b"]}, penalty_of(model))
        twin = make()
        (losses_of(twin)["b"] + penalty_of(twin)).backward()
        assert_same(gradients(model), gradients(twin))
        model.zero_grad()
        twin.zero_grad()
        surgery.backward({}, penalty_of(model))
        penalty_of(twin).backward()
        assert_same(gradients(model), gradients(twin))
        assert surgery.report is None


class Uneven(Net):
    """Tasks a and b share a part that c and d do not have; d reads the lower layer."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = torch.tanh(self.lower(x))
        high = torch.tanh(self.upper(low))
        part = torch.tanh(self.middle(high))
        inputs = {"a": part, "b": part + low, "c": high, "d": low}
        return {task: self.heads[task](feature) for task, feature in inputs.items()}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"measure": ["lower", "upper"]}], ids=str)
def test_partly_shared_modules(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Uneven()
    losses = losses_of(model)
    shared = [*model.lower.parameters(), *model.upper.parameters(), *model.middle.parameters()]
    measured = shared if "measure" not in options else shared[:4]
    gramian = torch.stack([flat_gradient(loss, measured) for loss in losses.values()])
    weights = PCGrad()(gramian @ gramian.T)
    assert (weights - 1).abs().max() > 0.1
    wanted = split_like(sum(w * flat_gradient(loss, shared) for w, loss in zip(weights, losses.values())), shared)
    ParameterSurgery(model, **options).backward(losses)
    for parameter, value in zip(shared, wanted):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-10, atol=1e-10)


def test_explicit_shared_leaves_the_rest_plain() -> None:
    model = make()
    losses = losses_of(model)
    shared = list(model.upper.parameters())
    wanted = textbook_pcgrad([flat_gradient(loss, shared) for loss in losses.values()], order_of())
    plain = torch.autograd.grad(sum(losses.values()), list(model.lower.parameters()), retain_graph=True)
    ParameterSurgery(model, shared=model.upper).backward(losses)
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in shared]), wanted, rtol=1e-10, atol=1e-10)
    for parameter, value in zip(model.lower.parameters(), plain):
        torch.testing.assert_close(parameter.grad, value)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"measure": "upper"}], ids=str)
def test_learned_loss_weights_outside_of_the_model(options: dict[str, Any]) -> None:
    model = make()
    scales = nn.Parameter(torch.linspace(0.5, 2, 4))
    losses = {task: loss * scales[i] for i, (task, loss) in enumerate(losses_of(model).items())}
    wanted = expected(model, losses, order_of(), None, {"upper": "upper."}.get(options.get("measure", ""), "er."))
    (plain,) = torch.autograd.grad(sum(losses.values()), scales, retain_graph=True)
    ParameterSurgery(model, **options).backward(losses)
    assert_same(gradients(model), wanted)
    torch.testing.assert_close(scales.grad, plain)


def test_one_gradient_for_two_parameters_is_not_one_tensor() -> None:
    class Biases(Net):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(1))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {task: output + (self.one + self.two) for task, output in super().forward(x).items()}

    torch.manual_seed(0)
    model = Biases()
    surgery = ParameterSurgery(model, shared=["lower", "upper"])
    losses = losses_of(model)
    (plain,) = torch.autograd.grad(sum(losses.values()), model.one, retain_graph=True)
    surgery.backward(losses)
    torch.testing.assert_close(model.one.grad, plain)
    torch.testing.assert_close(model.two.grad, plain)
    assert model.one.grad.untyped_storage().data_ptr() != model.two.grad.untyped_storage().data_ptr()
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in model.parameters())


def test_memory_format_and_sparse_gradients() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4, sparse=True)
            self.own = nn.Embedding(10, 4, sparse=True)
            self.convolution = nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last)

    torch.manual_seed(0)
    model = Words()
    words = torch.tensor([[1, 2, 2], [4, 5, 1], [7, 8, 9]])
    for options in ({}, {"chunk_size": 1}):
        model.zero_grad()
        image = model.convolution(model.table(words).permute(2, 0, 1)).tanh()
        losses = [(image * (k + 1)).cos().sum() + (model.own(words).sum().sin() if k == 0 else 0) for k in range(3)]
        shared = [model.table.weight, *model.convolution.parameters()]
        rows = [[g.to_dense() for g in torch.autograd.grad(loss, shared, retain_graph=True)] for loss in losses]
        flat = [torch.cat([g.reshape(-1) for g in row]) for row in rows]
        wanted = split_like(textbook_pcgrad(flat, order_of(0, 3)), shared)
        ParameterSurgery(model, **options).backward(losses)
        for parameter, value in zip(shared, wanted):
            torch.testing.assert_close(parameter.grad.to_dense(), value)
        assert model.own.weight.grad.is_sparse
        assert model.convolution.weight.grad.stride() == model.convolution.weight.stride()


def test_frozen_part() -> None:
    model = make()
    model.lower.requires_grad_(False)
    losses = losses_of(model)
    shared = list(model.upper.parameters())
    wanted = textbook_pcgrad([flat_gradient(loss, shared) for loss in losses.values()], order_of())
    ParameterSurgery(model).backward(losses)
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in shared]), wanted, rtol=1e-10, atol=1e-10)
    assert model.lower.weight.grad is None


# Steps.


@pytest.mark.parametrize("options", [{}, {"measure": "upper"}, {"chunk_size": 2}], ids=str)
def test_every_third_step(options: dict[str, Any]) -> None:
    model = make()
    surgery = ParameterSurgery(model, every=3, **options)
    shared = [*model.lower.parameters(), *model.upper.parameters()]
    measured = list(model.upper.parameters()) if "measure" in options else shared
    for step in range(8):
        model.zero_grad()
        losses = losses_of(model, step)
        if step % 3 == 0:
            rows = torch.stack([flat_gradient(loss, measured) for loss in losses.values()])
            weighting = PCGrad()
            weighting.calls.fill_(step // 3)
            weighting.load_state_dict(weighting.state_dict())
            weights = weighting(rows @ rows.T)
        wanted = sum(w * flat_gradient(loss, shared) for w, loss in zip(weights, losses.values()))
        plain = torch.autograd.grad(
            sum(losses.values()) + penalty_of(model), model.heads["b"].weight, retain_graph=True
        )[0]
        extra = flat_gradient(penalty_of(model), shared)
        surgery.backward(losses, penalty_of(model))
        torch.testing.assert_close(
            torch.cat([p.grad.reshape(-1) for p in shared]), wanted + extra, rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(model.heads["b"].weight.grad, plain)
        torch.testing.assert_close(surgery.report.weights, weights)


class Counting(torch.autograd.Function):
    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Counting.passes += 1
        return gradient


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, [5, 5, 5]),
        ({"every": 2}, [5, 1, 5]),
        ({"measure": "upper"}, [1, 1, 1]),
        ({"chunk_size": 2}, [7, 7, 7]),
    ],
    ids=str,
)
def test_passes_through_the_backbone(options: dict[str, Any], passes: list[int]) -> None:
    model = make()
    model.lower.register_forward_hook(lambda module, args, output: Counting.apply(output))
    surgery = ParameterSurgery(model, **options)
    found = []
    for step in range(3):
        Counting.passes = 0
        x, targets = data(step)
        outputs = model(x)
        penalty = 1e-3 * sum(output.square().sum() for output in outputs.values())
        surgery.backward({task: (outputs[task] - targets[task]).square().mean() for task in TASKS}, penalty)
        found.append(Counting.passes)
    assert found == passes


@pytest.mark.parametrize(
    ("options", "most"), [({}, 3), ({"chunk_size": 1}, 1), ({"chunk_size": 2}, 2), ({"measure": "upper"}, 3)], ids=str
)
def test_how_many_task_gradients_are_held(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], most: int) -> None:
    """At most T, or ``chunk_size + 1`` including the one that is being taken."""
    model = make()
    surgery = ParameterSurgery(model, **options)
    grad, counts = torch.autograd.grad, []
    alive: list[weakref.ref[Tensor]] = []

    def counted(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        counts.append(sum(reference() is not None for reference in alive))
        found = grad(*args, **kwargs)
        alive.extend(weakref.ref(gradient) for gradient in found if gradient.shape == model.upper.weight.shape)
        return found

    losses = losses_of(model)
    monkeypatch.setattr(torch.autograd, "grad", counted)
    surgery.backward(losses)
    assert max(counts) == most


@pytest.mark.parametrize("with_penalty", [False, True])
@pytest.mark.parametrize("options", [{}, {"measure": "upper"}, {"every": 2}, {"every": 2, "measure": "upper"}], ids=str)
def test_accumulation_equals_the_big_batch(options: dict[str, Any], with_penalty: bool) -> None:
    model, twin = make(), make()
    surgery, whole = ParameterSurgery(model, **options), ParameterSurgery(twin, **options)
    parts = [slice(0, 8), slice(8, 16), slice(16, 24)]
    for step in range(4):
        model.zero_grad()
        twin.zero_grad()
        for number, part in enumerate(parts):
            assert model.lower.weight.grad is None
            penalty = penalty_of(model) / 3 if with_penalty else None
            surgery.backward(losses_of(model, step, part, 1 / 3), penalty, accumulate=number < 2)
        whole.backward(losses_of(twin, step), penalty_of(twin) if with_penalty else None)
        assert_same(gradients(model), gradients(twin))
        assert model.lower.weight.grad is not None


@pytest.mark.parametrize(
    "options", [{}, {"every": 2}, {"measure": "upper"}, {"shared": ["lower", "upper"], "every": 2}], ids=str
)
def test_micro_batches_with_one_task_each(options: dict[str, Any]) -> None:
    model, twin = make(), make()
    surgery, whole = ParameterSurgery(model, tasks=TASKS, **options), ParameterSurgery(twin, **options)
    for step in range(3):
        model.zero_grad()
        twin.zero_grad()
        for number, task in enumerate(TASKS):
            surgery.backward({task: losses_of(model, step)[task]}, accumulate=number < 3)
        whole.backward(losses_of(twin, step))
        assert_same(gradients(model), gradients(twin))


def train(model: Net, surgery: ParameterSurgery, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        surgery.backward(losses_of(model, step), 1e-2 * penalty_of(model))
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"tasks": TASKS, "every": 3, "measure": "upper"}], ids=str)
@pytest.mark.parametrize("stop", [0, 4])
def test_resumes_bit_for_bit(options: dict[str, Any], stop: int) -> None:
    def build(seed: int) -> tuple[Net, Any, ParameterSurgery]:
        model = make(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        return model, optimizer, ParameterSurgery(model, optimizer=optimizer, **options)

    model, optimizer, surgery = build(0)
    train(model, surgery, optimizer, range(stop))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), surgery.state_dict()], file)
    train(model, surgery, optimizer, range(stop, stop + 5))

    other, other_optimizer, other_surgery = build(9)
    file.seek(0)
    for part, state in zip((other, other_optimizer, other_surgery), torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    train(other, other_surgery, other_optimizer, range(stop, stop + 5))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name]), name
    assert torch.equal(surgery.weights, other_surgery.weights)
    assert int(other_surgery.steps) == stop + 5


def test_state_is_buffers_and_the_weighting() -> None:
    model = make()
    surgery = ParameterSurgery(model)
    surgery.backward(losses_of(model))
    assert set(surgery.state_dict()) == {
        "task_names",
        "weights",
        "steps",
        "weighting.calls",
        "weighting.seed_in_use",
    }
    assert list(surgery.parameters()) == []
    other = ParameterSurgery(model, tasks=["x", "y"])
    with pytest.raises(
        errors.StateMismatchError, match=r"saved for the tasks \['a', 'b', 'c', 'd'\], but.*\['x', 'y'\]"
    ):
        other.load_state_dict(surgery.state_dict())
    fresh = ParameterSurgery(model)
    fresh.load_state_dict(surgery.state_dict())
    assert fresh.tasks == TASKS
    with pytest.raises(errors.TaskError, match=r"\['x'\], which are not tasks"):
        fresh.backward({"x": losses_of(model)["a"]})
    named = ParameterSurgery(model, tasks=["x", "y"])
    named.load_state_dict(ParameterSurgery(model).state_dict())
    assert named.tasks == ("x", "y")


# Mixed precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_equals_float32(dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    model, twin = make(), make()
    optimizer, plain = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    surgery, exact = ParameterSurgery(model, optimizer=optimizer), ParameterSurgery(twin, optimizer=plain)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", dtype=dtype):
        losses, penalty = losses_of(model), 1e-2 * penalty_of(model)
    surgery.backward({task: scaler.scale(loss) for task, loss in losses.items()}, scaler.scale(penalty))
    scaler.step(optimizer)
    scaler.update()
    exact.backward(losses_of(twin), 1e-2 * penalty_of(twin))
    plain.step()
    assert surgery.report.conflicts > 0
    scale = max(float((value - before[name]).abs().max()) for name, value in twin.state_dict().items())
    for name, value in twin.state_dict().items():
        assert (model.state_dict()[name] - value).abs().max() < 8 * torch.finfo(dtype).eps * scale, name
        assert value.shape == () or name.startswith("unused") or not torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"measure": "upper"}, {"chunk_size": 2}], ids=str)
def test_a_loss_that_overflows_skips_the_step_and_trains_on(options: dict[str, Any], bad: float) -> None:
    torch.set_default_dtype(torch.float32)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    surgery = ParameterSurgery(model, optimizer=optimizer, **options)
    for step in range(4):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            losses = losses_of(model, step)
        losses["c"] = losses["c"] * (bad if step == 0 else 1)
        surgery.backward({task: scaler.scale(loss) for task, loss in losses.items()})
        assert bool(torch.isfinite(model.lower.weight.grad).all()) is (step > 0)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before["lower.weight"], model.lower.weight) is (step == 0)
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


# Graphs.


@pytest.mark.parametrize("options", [{}, {"measure": "upper"}, {"chunk_size": 2}], ids=str)
def test_the_backbones_graph_is_freed(options: dict[str, Any]) -> None:
    model = make()
    kept = []

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        result = output * 1.0
        hidden = result.exp()  # saves its result
        kept.append(hidden.grad_fn)
        return hidden

    model.lower.register_forward_hook(note)
    losses = losses_of(model)
    ParameterSurgery(model, **options).backward(losses, penalty_of(model))
    with pytest.raises(RuntimeError, match="freed|been released|second time"):
        torch.autograd.grad(losses["a"], model.lower.weight)
    with pytest.raises(RuntimeError):
        _ = kept[0]._saved_result


def test_with_the_penalty_of_a_regularizer() -> None:
    class Smooth(Net):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict(
                {task: nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1)) for task in TASKS}
            )

    torch.manual_seed(0)
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    regularizer = SaliencyRegularizer(model, heads="heads", strength=3.0, optimizer=optimizer)
    surgery = ParameterSurgery(model, optimizer=optimizer)
    for step in range(3):
        optimizer.zero_grad()
        losses = losses_of(model, step)
        penalty = regularizer()
        (reach,) = torch.autograd.grad(penalty, model.lower.weight, retain_graph=True)
        assert reach.abs().max() > 1e-6
        rows = [flat_gradient(loss, [model.lower.weight]) for loss in losses.values()]
        surgery.backward(losses, penalty)
        wanted = sum(w * row for w, row in zip(surgery.report.weights, rows)).view(8, 6) + reach
        torch.testing.assert_close(model.lower.weight.grad, wanted)
        optimizer.step()
    assert not torch.equal(surgery.weights, torch.ones(4))


def test_checkpointed_backbone() -> None:
    model, twin = make(), make()
    layer = model.lower.forward
    model.lower.forward = lambda x: checkpoint(layer, x, use_reentrant=False)
    ParameterSurgery(model).backward(losses_of(model))
    ParameterSurgery(twin).backward(losses_of(twin))
    assert_same(gradients(model), gradients(twin))


# Wrong use.

Losses = dict[str, Tensor]


def _compiled(model: Net) -> Losses:
    return losses_of_outputs(torch.compile(model, backend="aot_eager"))


def _compiled_by_inductor(model: Net) -> Losses:
    model.lower = torch.compile(model.lower)
    return losses_of(model)


def losses_of_outputs(model: Callable[[Tensor], Any]) -> Losses:
    x, targets = data()
    outputs = model(x)
    return {task: (outputs[task] - targets[task]).square().mean() for task in TASKS}


def _forked(model: Net) -> Losses:
    surgery = FeatureSurgery(model, heads="heads")
    losses = losses_of(model)
    surgery.remove()
    return losses


def _reentrant(model: Net) -> Losses:
    layer = model.upper.forward
    model.upper.forward = lambda x: checkpoint(layer, x, use_reentrant=True)
    return losses_of(model)


class DTensor(nn.Parameter):
    """Stands in for the real one."""


def _sharded_later(model: Net) -> Losses:
    model.upper.bias = DTensor(torch.zeros(8))
    return losses_of(model)


CALLS: dict[str, tuple[Callable[[Net], Any], type[Exception], type[Exception], str]] = {
    "a sum of losses": (
        lambda m: sum(losses_of(m).values()), errors.WrongTypeError, TypeError, "found one tensor of shape.*do not add them up",
    ),
    "no losses at all": (lambda m: None, errors.WrongTypeError, TypeError, "found NoneType"),
    "not a tensor": (
        lambda m: {**losses_of(m), "b": 0.5}, errors.WrongTypeError, TypeError, "loss of task 'b' must be a 0-dim tensor.*found float",
    ),
    "per-sample losses": (
        lambda m: {**losses_of(m), "b": m(data()[0])["b"]}, errors.ShapeError, ValueError, r"task 'b' has the shape \[24, 1\].*\.mean\(\)",
    ),
    "no graph": (
        lambda m: {**losses_of(m), "c": torch.tensor(1.0)}, errors.NotConnectedError, RuntimeError, "task 'c' carries no graph.*leave a task",
    ),
    "not connected": (
        lambda m: {**losses_of(m), "c": m.unused.weight.sum()},
        errors.NotConnectedError, RuntimeError, "task 'c' does not depend on any of the 4 shared parameters.*second argument",
    ),
    "one loss": (
        lambda m: {"a": losses_of(m)["a"]}, errors.TaskError, ValueError, r"found 1 loss\(es\) \['a'\], expected at least two",
    ),
    "nothing shared": (
        lambda m: {task: m.heads[task].weight.sum() for task in TASKS},
        errors.NotConnectedError, RuntimeError, "a, b, c, d have no parameter of the model in common",
    ),
    "compiled": (_compiled, errors.ConfigurationError, ValueError, r"torch\.compile.*wrong gradients.*surgery=PCGrad\(\)"),
    "compiled by inductor": (_compiled_by_inductor, errors.ConfigurationError, ValueError, r"torch\.compile"),
    "both levels": (_forked, errors.ConfigurationError, ValueError, "both levels of surgery at once"),
    "reentrant checkpoint": (_reentrant, errors.ConfigurationError, ValueError, "use_reentrant=False"),
    "sharded": (_sharded_later, errors.ConfigurationError, ValueError, r"found DTensor.*surgery=PCGrad\(\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_wrong_losses(case: str) -> None:
    make_losses, error, builtin, text = CALLS[case]
    model = make()
    losses = make_losses(model)
    for parameter in model.lower.parameters():
        parameter.grad = torch.ones_like(parameter)
    surgery = ParameterSurgery(model) if case != "sharded" else _built_before(model)
    with pytest.raises(error, match=text) as caught:
        surgery.backward(losses)
    assert isinstance(caught.value, builtin)
    assert surgery.report is None
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, torch.ones_like(gradient)) if name.startswith("lower") else gradient is None
    # It goes on as if nothing had been.
    if case not in ("reentrant checkpoint", "sharded", "compiled by inductor"):
        model.zero_grad()
        good = losses_of(model)
        wanted = expected(model, good, order_of())
        surgery.backward(good)
        assert_same(gradients(model), wanted)


def _built_before(model: Net) -> ParameterSurgery:
    sharded, model.upper.bias = model.upper.bias, nn.Parameter(torch.zeros(8))
    surgery = ParameterSurgery(model)
    model.upper.bias = sharded
    return surgery


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a", "b"), r"names \['c', 'd'\], which are not tasks. The tasks are \['a', 'b'\].*name all"),
        (("a", "b", "c", "e"), r"names \['d'\]"),
    ],
)
def test_names_that_do_not_match(names: tuple[str, ...], text: str) -> None:
    model = make()
    surgery = ParameterSurgery(model, tasks=names)
    with pytest.raises(errors.TaskError, match=text):
        surgery.backward(losses_of(model))
    with pytest.raises(errors.TaskError, match="4 entries for 2 tasks|4 entries for 4|which are not"):
        ParameterSurgery(model, tasks=names[:2]).backward(list(losses_of(model).values()))
    assert all(gradient is None for gradient in gradients(model).values())


BUILDING: dict[str, tuple[Callable[[Net], Any], type[Exception], type[Exception], str]] = {
    "no model": (lambda m: ParameterSurgery(PCGrad), errors.WrongTypeError, TypeError, r"must be a torch.nn.Module"),
    "one task": (lambda m: ParameterSurgery(m, tasks=["a"]), errors.TaskError, ValueError, r"found 1 task"),
    "no weighting": (lambda m: ParameterSurgery(m, "pcgrad"), errors.WrongTypeError, TypeError, "found str.*PCGrad"),
    "a class": (lambda m: ParameterSurgery(m, PCGrad), errors.WrongTypeError, TypeError, "the class PCGrad"),
    "a wrong shape": (
        lambda m: ParameterSurgery(m, lambda g: g, tasks=TASKS), errors.ShapeError, ValueError, r"returned the shape \[4, 4\]",
    ),
    "no such module": (
        lambda m: ParameterSurgery(m, shared="uper"),
        errors.ModuleNotFoundInModelError, LookupError, "no module for shared= 'uper'. Did you mean 'upper'",
    ),
    "another model's module": (
        lambda m: ParameterSurgery(m, shared=nn.Linear(2, 2)), errors.ConfigurationError, ValueError, "shared has a parameter of shape",
    ),
    "no parameters": (
        lambda m: ParameterSurgery(m, shared=[]), errors.ConfigurationError, ValueError, "shared names no parameter",
    ),
    "a number": (lambda m: ParameterSurgery(m, measure=3), errors.WrongTypeError, TypeError, "measure must be a module"),
    "measured but not shared": (
        lambda m: ParameterSurgery(m, shared="upper", measure="lower"),
        errors.ConfigurationError, ValueError, "measure has parameters that shared does not have: lower",
    ),
    "every 0": (lambda m: ParameterSurgery(m, every=0), errors.ConfigurationError, ValueError, "every must be at least 1"),
    "every 1.5": (lambda m: ParameterSurgery(m, every=1.5), errors.WrongTypeError, TypeError, "every must be an int"),
    "chunks of 0": (
        lambda m: ParameterSurgery(m, chunk_size=0), errors.ConfigurationError, ValueError, "chunk_size must be at least 1",
    ),
    "LBFGS": (
        lambda m: ParameterSurgery(m, optimizer=torch.optim.LBFGS(m.parameters())),
        errors.ConfigurationError, ValueError, "LBFGS evaluates a closure",
    ),
    "no optimizer": (
        lambda m: ParameterSurgery(m, optimizer=3), errors.WrongTypeError, TypeError, "must be a torch.optim.Optimizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BUILDING)
def test_wrong_arguments(case: str) -> None:
    build, error, builtin, text = BUILDING[case]
    with pytest.raises(error, match=text) as caught:
        build(make())
    assert isinstance(caught.value, builtin)


def test_a_measured_part_that_is_not_shared() -> None:
    model = make()
    with pytest.raises(errors.ConfigurationError, match="none of the parameters of measure= is shared"):
        ParameterSurgery(model, measure="heads.a").backward(losses_of(model))
    with pytest.raises(errors.NotConnectedError, match="none of the parameters of shared="):
        ParameterSurgery(model, shared="unused").backward(losses_of(model))


def test_a_weighting_that_fails_in_a_step_writes_nothing() -> None:
    model = make()
    calls = []

    def failing(gramian: Tensor) -> Tensor:
        calls.append(gramian)
        return gramian[0, :2] if len(calls) == 2 else gramian.new_ones(len(gramian))

    surgery = ParameterSurgery(model, failing, tasks=TASKS)
    assert len(calls) == 1  # tried once
    with pytest.raises(errors.ShapeError, match=r"returned the shape \[2\]"):
        surgery.backward(losses_of(model))
    assert all(gradient is None for gradient in gradients(model).values())
    surgery.backward(losses_of(model))
    torch.testing.assert_close(surgery.report.weights, torch.ones(4))


def test_wrong_penalties() -> None:
    model = make()
    surgery = ParameterSurgery(model)
    with pytest.raises(errors.ShapeError, match=r"the penalty has the shape \[8\]"):
        surgery.backward(losses_of(model), model.lower.bias)
    with pytest.raises(errors.WrongTypeError, match="the penalty must be a 0-dim tensor"):
        surgery.backward(losses_of(model), "0.1")
    surgery.backward(losses_of(model), 0.0)
    surgery.backward(losses_of(model), torch.zeros(()))


def test_accumulation_with_chunks_is_refused() -> None:
    model = make()
    surgery = ParameterSurgery(model, chunk_size=2)
    with pytest.raises(errors.ConfigurationError, match="has to keep all of them until the last micro-batch"):
        surgery.backward(losses_of(model), accumulate=True)


def test_an_error_in_the_middle_of_an_accumulation_keeps_what_was_there() -> None:
    model, twin = make(), make()
    surgery = ParameterSurgery(model)
    surgery.backward(losses_of(model, 0, slice(0, 12), 0.5), accumulate=True)
    with pytest.raises(errors.TaskError):
        surgery.backward([1.0], accumulate=True)
    surgery.backward(losses_of(model, 0, slice(12, 24), 0.5))
    ParameterSurgery(twin).backward(losses_of(twin))
    assert_same(gradients(model), gradients(twin))


def test_losses_whose_graph_is_gone_write_nothing() -> None:
    model = make()
    surgery = ParameterSurgery(model)
    losses = losses_of(model)
    surgery.backward(losses)
    before = {name: None if g is None else g.clone() for name, g in gradients(model).items()}
    with pytest.raises(RuntimeError, match="second time"):
        surgery.backward(losses)
    assert_same(gradients(model), before, 0)


# The optimizer.


def test_a_step_needs_a_backward() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgery = ParameterSurgery(model, optimizer=optimizer)
    weight = model.lower.weight.clone()
    sum(losses_of(model).values()).backward()
    with pytest.raises(errors.SurgeryError, match=r"without surgery\.backward\(losses\) since the last step"):
        optimizer.step()
    surgery.backward(losses_of(model), accumulate=True)
    with pytest.raises(errors.SurgeryError, match=r"in the middle of an accumulation.*discard\(\)"):
        optimizer.step()
    assert torch.equal(weight, model.lower.weight)
    surgery.discard()
    surgery.backward(losses_of(model))
    optimizer.step()
    assert not torch.equal(weight, model.lower.weight)
    with pytest.raises(errors.SurgeryError):
        optimizer.step()
    surgery.remove()
    surgery.remove()
    optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_closure_that_calls_backward() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        losses = losses_of(model)
        surgery.backward(losses)
        return float(sum(losses.values()).detach())

    with ParameterSurgery(model, optimizer=optimizer) as surgery:
        values = [optimizer.step(closure) for _ in range(2)] + [optimizer.step(closure=closure)]
        assert values[2] < values[0]
    assert not optimizer._optimizer_step_pre_hooks


def test_garbage_collection_copies_and_pickles() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgery = ParameterSurgery(model, optimizer=optimizer)
    surgery.backward(losses_of(model))
    optimizer_copy = copy.deepcopy(optimizer)
    assert not getattr(optimizer_copy, "_optimizer_step_pre_hooks", None)
    optimizer_copy.step()
    for twin in (copy.deepcopy(surgery), pickle.loads(pickle.dumps(surgery))):
        assert torch.equal(twin.weights, surgery.weights)
        with pytest.raises(errors.SurgeryError, match="a copy, which belongs to no model"):
            twin.backward(losses_of(model))
    alive = weakref.ref(surgery)
    del surgery, twin
    gc.collect()
    assert alive() is None
    assert not optimizer._optimizer_step_pre_hooks
    optimizer.step()


def test_the_state_follows_no_number_format() -> None:
    model = make()
    surgery = ParameterSurgery(model)
    surgery.backward(losses_of(model))
    surgery.half()
    assert surgery.weights.dtype == torch.float64
    assert surgery.steps.dtype == torch.int64
