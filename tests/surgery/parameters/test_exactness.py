"""Surgery on the parameters: a textbook loop gives the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saliency_reg import ParameterSurgery, PCGrad
from tests.reference.slow_surgery import conflicting_pairs, flat_gradient

from .support import TASKS, assert_same, data, expected, gradients, losses_of, make, order_of, penalty_of

pytestmark = pytest.mark.usefixtures("float64")


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
