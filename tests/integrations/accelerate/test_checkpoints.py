"""``save_state`` and ``load_state`` of Hugging Face accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, SaliencyRegularizer
from saliency_reg.errors import StateMismatchError
from saliency_reg.integrations.accelerate import register
from tests.support.training import TASKS, assert_same_state, batch, make_model
from tests.support.two_processes import run_on_two_processes

from .support import fresh_state, one_of_two, prepared, steps_with

accelerate: Any = pytest.importorskip("accelerate")
Tracker: Any = pytest.importorskip("accelerate.tracking").GeneralTracker


def resumable(accelerator: Any, seed: int, **options: Any) -> tuple[nn.Module, Any, SaliencyRegularizer]:
    plain, plain_optimizer = make_model(seed)
    regularizer = SaliencyRegularizer(
        plain,
        "heads",
        strength=0.5,
        warmup_steps=6,
        surgery=PCGrad(),
        max_tasks_per_step=2,
        **{"metric": "l1", **options},
    )
    register(regularizer, accelerator, optimizer=plain_optimizer)
    model, optimizer = accelerator.prepare(plain, plain_optimizer)
    return model, optimizer, regularizer


@pytest.mark.parametrize("rule", ["entropic", "projected", "authors"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, rule: str) -> None:
    with fresh_state():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        run = resumable(accelerator, seed=0, relations=rule)
        steps_with(accelerator, *run, range(6))
        accelerator.save_state(str(tmp_path / "state"))
        draws = torch.get_rng_state()
        expected = steps_with(accelerator, *run, range(6, 12))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    resumed = resumable(accelerator, seed=5, relations=rule)
    torch.manual_seed(77)
    accelerator.load_state(str(tmp_path / "state"))
    if tuple(map(int, accelerate.__version__.split(".")[:2])) < (1, 3):  # it could not read what it had saved
        torch.set_rng_state(draws)
    assert int(resumed[2].steps) == int(resumed[2].relations.updates) == 3
    found = steps_with(accelerator, *resumed, range(6, 12))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert_same_state(resumed[2], run[2])
    assert_same_state(resumed[0], run[0])
    assert resumed[2].current_strength == run[2].current_strength == 0.5


def test_distances_that_wait_for_a_step_are_kept(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    regularizers = []
    for seed in (0, 1):
        with fresh_state():
            accelerator = accelerate.Accelerator(cpu=True)
            model, _ = make_model(seed)
            regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
            register(regularizer, accelerator)
            if seed == 0:
                model(batch(0)[0])
                regularizer()
                accelerator.save_state(str(tmp_path))
            else:
                accelerator.load_state(str(tmp_path))
            regularizers.append(regularizer)
    assert regularizers[1].pending.samples.any()
    for regularizer in regularizers:
        regularizer.step()
        assert int(regularizer.relations.updates) == 1
    assert_same_state(*regularizers)


class Counter:
    """Somebody's own object."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_several_objects_and_their_order(tmp_path: Path) -> None:
    def objects() -> tuple[Counter, SaliencyRegularizer, SaliencyRegularizer, ParameterSurgery, FeatureSurgery]:
        first, _ = make_model()
        second = nn.ModuleDict({name: nn.Linear(4, 1) for name in "ab"})
        third, _ = make_model()
        surgery = ParameterSurgery(first, tasks=TASKS)
        feature = FeatureSurgery(third, "heads", weighting=PCGrad(seed=4))
        return (
            Counter(),
            SaliencyRegularizer(first, "heads", strength=0.1, metric="l1"),
            SaliencyRegularizer(second, ["a", "b"], strength=0.1, metric="l1"),
            surgery,
            feature,
        )

    def registered(order: list[int], found: tuple[Any, ...]) -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        for index in order:
            if index == 0:
                accelerator.register_for_checkpointing(found[0])
            else:
                register(found[index], accelerator)
        return accelerator

    saved = objects()
    with fresh_state():
        accelerator = registered([0, 1, 2, 3, 4], saved)
        for count, one in enumerate(saved[1:3], start=1):
            for _ in range(count):
                one.step()
        saved[3].steps.fill_(3)
        saved[0].count = 9
        accelerator.save_state(str(tmp_path))
    assert len(list(tmp_path.glob("custom_checkpoint_*.pkl"))) == 5
    loaded = objects()
    with fresh_state():
        registered([0, 1, 2, 3, 4], loaded).load_state(str(tmp_path))
    assert loaded[0].count == 9
    assert [int(one.steps) for one in loaded[1:4]] == [1, 2, 3]
    for order in ([0, 2, 1, 3, 4], [1, 0, 2, 3, 4], [0, 1, 2, 4, 3], [0, 3, 2, 1, 4]):
        with fresh_state():
            accelerator = registered(order, objects())
            with pytest.raises(StateMismatchError, match=r"same order|same tasks"):
                accelerator.load_state(str(tmp_path))
    with fresh_state():
        accelerator = registered([1, 2, 3, 4], objects())
        with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
            accelerator.load_state(str(tmp_path))


def test_other_tasks_and_other_rules_are_refused(tmp_path: Path) -> None:
    def with_tasks(tasks: str, **options: Any) -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in tasks})
        register(SaliencyRegularizer(heads, list(tasks), **{"strength": 0.1, "metric": "l1", **options}), accelerator)
        return accelerator

    with fresh_state():
        with_tasks("ab").save_state(str(tmp_path))
    with pytest.raises(StateMismatchError, match="'a', 'b'.*'a', 'c'"):
        with_tasks("ac").load_state(str(tmp_path))
    with fresh_state(), pytest.raises(StateMismatchError):
        with_tasks("ab", relations="authors").load_state(str(tmp_path))


def test_the_checkpoint_is_a_plain_state_dict(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, regularizer, _ = prepared(accelerator, "before prepare", wrapped=True)
    steps_with(accelerator, model, optimizer, regularizer, range(3))
    accelerator.save_state(str(tmp_path))
    alone = SaliencyRegularizer(None, tasks=TASKS, strength=0.1, metric="l1")
    alone.load_state_dict(torch.load(tmp_path / "custom_checkpoint_0.pkl"))
    assert_same_state(alone, regularizer)


def test_registering_twice_and_by_hand(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, regularizer, _ = prepared(accelerator, "before prepare", wrapped=True)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    register(regularizer, accelerator)
    register(regularizer, accelerator, optimizer=optimizer)
    steps_with(accelerator, model, optimizer, regularizer, range(1))
    assert int(regularizer.steps) == 1
    register(regularizer, accelerator, optimizer=other)  # no longer the first one
    steps_with(accelerator, model, optimizer, regularizer, range(1))
    assert int(regularizer.steps) == 1
    other.step()
    assert int(regularizer.steps) == 2
    by_hand = SaliencyRegularizer(None, tasks=TASKS, strength=0.1, metric="l1")
    accelerator.register_for_checkpointing(by_hand)
    register(by_hand, accelerator)
    accelerator.save_state(str(tmp_path))
    assert len(list(tmp_path.glob("custom_checkpoint_*.pkl"))) == 2
    accelerator.load_state(str(tmp_path))


def save_or_load(rank: int, folder: str, save: bool) -> dict[str, Any]:
    with one_of_two(rank) as accelerator:
        model, optimizer, regularizer = resumable(accelerator, seed=0)
        if save:
            steps_with(accelerator, model, optimizer, regularizer, range(3), shift=10 * rank)
            accelerator.save_state(folder)
            accelerator.wait_for_everyone()
        else:
            accelerator.load_state(folder)
        state = {name: value.clone() for name, value in regularizer.state_dict().items()}
        steps_with(accelerator, model, optimizer, regularizer, range(3, 5), shift=10 * rank)
        return state


@pytest.mark.parametrize("processes", ["2 to 1", "1 to 2", "2 to 2"])
def test_another_number_of_processes(tmp_path: Path, processes: str) -> None:
    before, _, after = processes.split()
    folder = str(tmp_path / "state")
    states = []
    for number, save in ((before, True), (after, False)):
        if number == "2":
            found = run_on_two_processes(save_or_load, folder, save)
            assert found[0].keys() == found[1].keys()
            assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
            states.append(found[0])
        else:
            with fresh_state():
                accelerator = accelerate.Accelerator(cpu=True)
                run = resumable(accelerator, seed=0)
                if save:
                    steps_with(accelerator, *run, range(3))
                    accelerator.save_state(folder)
                else:
                    accelerator.load_state(folder)
                states.append({name: value.clone() for name, value in run[2].state_dict().items()})
                steps_with(accelerator, *run, range(3, 5))
    assert int(states[0]["steps"]) == 3
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
