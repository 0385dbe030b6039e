"""Wrong use of surgery on the parameters leaves all gradients as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, errors

from .support import TASKS, Net, assert_same, data, expected, gradients, losses_of, make, order_of

pytestmark = pytest.mark.usefixtures("float64")

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
