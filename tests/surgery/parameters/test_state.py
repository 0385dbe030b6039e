"""What surgery on the parameters keeps: states, copies, pickles."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch

from saliency_reg import ParameterSurgery, errors

from .support import TASKS, Net, losses_of, make, penalty_of

pytestmark = pytest.mark.usefixtures("float64")


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
