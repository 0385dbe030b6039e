"""Training with Hugging Face accelerate: steps, checkpoints, trackers."""

from __future__ import annotations

import doctest
import importlib
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, RelationWeights, SaliencyRegularizer
from saliency_reg.errors import (
    CaptureError,
    ConfigurationError,
    MissingPackageError,
    SaliencyRegError,
    StateMismatchError,
    TaskError,
    WrongTypeError,
)
from saliency_reg.integrations import accelerate as integration
from saliency_reg.integrations.accelerate import backward, log_report, register
from tests.support.training import TASKS, Net, assert_same_state, batch, make_model
from tests.support.two_processes import run_on_two_processes

accelerate: Any = pytest.importorskip("accelerate")
Tracker: Any = pytest.importorskip("accelerate.tracking").GeneralTracker


@contextmanager
def fresh_state() -> Iterator[None]:
    """What accelerate keeps for the whole process is forgotten before and after."""
    state = importlib.import_module("accelerate.state")
    before = dict(os.environ)
    try:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
        yield
    finally:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    with fresh_state():
        yield


@contextmanager
def one_of_two(rank: int, **options: Any) -> Iterator[Any]:
    """An Accelerator that finds the two processes of :func:`run_on_two_processes`."""
    # A hint on speed: a second derivative leaves a [1, C] gradient with other strides than its parameter has.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with fresh_state():
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="localhost")
        accelerator = accelerate.Accelerator(cpu=True, **options)
        assert (accelerator.num_processes, accelerator.process_index) == (2, rank)
        yield accelerator


def losses_of(outputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    return {task: (output - y).square().mean() for task, output in outputs.items()}


def steps_with(
    accelerator: Any, model: nn.Module, optimizer: Any, regularizer: SaliencyRegularizer, steps: range, shift: int = 0
) -> list[Tensor]:
    """One batch a step, as a user of accelerate writes it."""
    found = []
    for step in steps:
        x, y = batch(step + shift)
        with accelerator.accumulate(model):
            losses = losses_of(model(x), y)
            loss = sum(losses.values()) + regularizer(losses=losses)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.detach())
    return found


def plain_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, regularizer: SaliencyRegularizer, steps: range
) -> list[Tensor]:
    """The same without accelerate."""
    found = []
    for step in steps:
        x, y = batch(step)
        loss = sum(losses_of(model(x), y).values()) + regularizer()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.detach())
    return found


# Steps.

WAYS = ("before prepare", "after prepare", "registered before, attached after", "optimizer of the constructor")


def prepared(
    accelerator: Any, way: str, wrapped: bool, **options: Any
) -> tuple[nn.Module, Any, SaliencyRegularizer, Net]:
    """Model and optimizer of accelerate, and a regularizer that came to them in one of the ways."""
    plain_model, plain_optimizer = make_model()

    def build(model: nn.Module, optimizer: Any = None) -> SaliencyRegularizer:
        return SaliencyRegularizer(model, "heads", strength=0.5, optimizer=optimizer, **options)

    if way == "before prepare":
        regularizer = build(plain_model)
        register(regularizer, accelerator, optimizer=plain_optimizer)
    if way == "optimizer of the constructor":
        regularizer = build(plain_model, plain_optimizer)
    if way == "registered before, attached after":
        regularizer = build(plain_model)
        register(regularizer, accelerator)
    model, optimizer = accelerator.prepare(plain_model, plain_optimizer)
    if way == "after prepare":
        regularizer = build(model if wrapped else accelerator.unwrap_model(model))
    if way != "before prepare":
        register(regularizer, accelerator, optimizer=None if way == "optimizer of the constructor" else optimizer)
    return model, optimizer, regularizer, plain_model


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_numbers_of_a_plain_loop(way: str) -> None:
    own_model, own_optimizer = make_model()
    own = SaliencyRegularizer(own_model, "heads", strength=0.5, optimizer=own_optimizer)
    torch.manual_seed(1)
    expected = plain_steps(own_model, own_optimizer, own, range(5))
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, regularizer, _ = prepared(accelerator, way, wrapped=True)
    torch.manual_seed(1)
    found = steps_with(accelerator, model, optimizer, regularizer, range(5))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert_same_state(regularizer, own)
    assert_same_state(model, own_model)
    assert int(regularizer.relations.updates) == 5


def numbers_of(rank: int, way: str, wrapped: bool) -> dict[str, Any]:
    with one_of_two(rank, gradient_accumulation_steps=2) as accelerator:
        model, optimizer, regularizer, plain_model = prepared(accelerator, way, wrapped)
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        torch.manual_seed(1)
        found = steps_with(accelerator, model, optimizer, regularizer, range(4), shift=10 * rank)
        return {
            "losses": torch.stack(found),
            "relations": regularizer.relations.matrix(),
            "updates": int(regularizer.relations.updates),
            "weights": plain_model.heads["left"].out.weight.detach(),
        }


def test_every_way_gives_the_same_numbers_in_two_processes() -> None:
    ways = [(way, True) for way in WAYS] + [("after prepare", False)]
    first, *others = [run_on_two_processes(numbers_of, way, wrapped) for way, wrapped in ways]
    for found in [first, *others]:
        for rank in range(2):
            assert found[rank]["updates"] == 2  # of 4 batches
            for name in ("losses", "relations", "weights"):
                assert torch.equal(found[rank][name], first[rank][name]), name
        assert torch.equal(found[0]["weights"], found[1]["weights"])


@pytest.mark.parametrize("way", WAYS)
def test_relations_move_once_for_all_micro_batches(way: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer, regularizer, _ = prepared(accelerator, way, wrapped=True)
    moves, steps = [], []
    for step in range(7):
        steps_with(accelerator, model, optimizer, regularizer, range(step, step + 1))
        moves.append(int(regularizer.relations.updates))
        steps.append(int(regularizer.steps))
    assert moves == steps == [0, 0, 1, 1, 1, 2, 2]


def test_the_last_batches_of_a_loader_are_a_step_too() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, regularizer, _ = prepared(accelerator, "before prepare", wrapped=True)
    data = torch.utils.data.TensorDataset(*batch(0))
    loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=3, drop_last=True))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    moves = []
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sum(losses_of(model(x), y).values()) + regularizer())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        moves.append(int(regularizer.relations.updates))
    assert moves == [0, 1, 1, 2, 3]


def test_backward_divides_the_penalty_with_the_loss() -> None:
    torch.manual_seed(0)
    model = Net().eval()  # no dropout, fixed statistics
    x, y = batch(0)
    own = SaliencyRegularizer(model, "heads", strength=0.5)
    for part in range(2):
        rows = slice(8 * part, 8 * part + 8)
        ((sum(losses_of(model(x[rows]), y[rows]).values()) + own()) / 2).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    own.remove()
    model.zero_grad()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    regularizer = SaliencyRegularizer(model, "heads", strength=0.5)
    register(regularizer, accelerator)
    model = accelerator.prepare(model)
    for part in range(2):
        rows = slice(8 * part, 8 * part + 8)
        with accelerator.accumulate(model):
            accelerator.backward(sum(losses_of(model(x[rows]), y[rows]).values()) + regularizer())
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def fp16_on_cpu() -> Any:
    """accelerate has a loss scale on accelerators only; this one has it on the CPU, before anything is prepared."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator.native_amp = True
    return accelerator


FUSED_ON_CPU = pytest.param(
    True, marks=pytest.mark.skipif(torch.__version__ < "2.4", reason="fused optimizers for CPU came with torch 2.4")
)


@pytest.mark.parametrize("way", ["before prepare", "after prepare"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fused", [False, FUSED_ON_CPU])
def test_steps_that_the_loss_scale_skips_do_not_count(way: str, clip: bool, fused: bool) -> None:
    accelerator = fp16_on_cpu()
    plain, _ = make_model()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, fused=fused)
    regularizer = SaliencyRegularizer(plain, "heads", strength=0.1)
    if way == "before prepare":
        register(regularizer, accelerator, optimizer=optimizer)
    model, optimizer = accelerator.prepare(plain, optimizer)
    if way == "after prepare":
        register(regularizer, accelerator, optimizer=optimizer)
    counted, moved = [], []
    for step, factor in enumerate([1.0, float("inf"), 1.0]):
        x, y = batch(step)
        outputs = model(x)
        with accelerator.autocast():
            loss = (sum(losses_of(outputs, y).values()) + regularizer()) * factor
        accelerator.backward(loss)
        if clip:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        before = plain.heads["left"].out.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(before, plain.heads["left"].out.weight) == (step == 1)
        counted.append(int(regularizer.steps))
        moved.append(int(regularizer.relations.updates))
    assert counted == moved == [1, 1, 2]


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(way: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer, regularizer, _ = prepared(accelerator, way, wrapped=True)
    torch.manual_seed(1)
    found = steps_with(accelerator, model, optimizer, regularizer, range(3))
    own_model, own_optimizer = make_model()
    own = SaliencyRegularizer(own_model, "heads", strength=0.5, optimizer=own_optimizer)
    torch.manual_seed(1)
    expected = plain_steps(own_model, own_optimizer, own, range(3))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0.03, atol=0)
    assert regularizer.report is not None
    assert regularizer.report.distances.dtype == torch.float32
    assert int(regularizer.relations.updates) == 3


# Surgery.


def test_parameter_surgery_divides_scales_and_gathers() -> None:
    torch.manual_seed(0)
    x, y = batch(0)
    models = [Net().eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options: dict[str, Any] = {"shared": "backbone", "tasks": TASKS}
    own = ParameterSurgery(models[0], PCGrad(seed=3), **options)
    for part in range(2):
        rows = slice(8 * part, 8 * part + 8)
        losses = {task: loss / 2 for task, loss in losses_of(models[0](x[rows]), y[rows]).items()}
        own.backward(losses, accumulate=part == 0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    surgery = ParameterSurgery(models[1], PCGrad(seed=3), **options)
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.0)
    register(surgery, accelerator, optimizer=optimizer)
    model, optimizer = accelerator.prepare(models[1], optimizer)
    for part in range(2):
        rows = slice(8 * part, 8 * part + 8)
        with accelerator.accumulate(model):
            losses = losses_of(model(x[rows]), y[rows])
            backward(surgery, accelerator, losses if part else list(losses.values()))
            optimizer.step()
    assert accelerator.scaler.get_scale() == 1024.0
    assert surgery.report is not None
    assert int(surgery.steps) == 1
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(b.grad, a.grad)  # unscaled by the step


def test_parameter_surgery_adds_the_penalty_by_its_share() -> None:
    torch.manual_seed(0)
    x, y = batch(0)
    model = Net().eval()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.5)
    surgery = ParameterSurgery(model, lambda gramian: torch.ones(len(gramian)), shared="backbone")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    (sum(losses_of(model(x), y).values()) + regularizer()).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    for _ in range(2):
        with accelerator.accumulate(model):
            losses = losses_of(model(x), y)
            backward(surgery, accelerator, losses, regularizer())
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def surgery_of(rank: int) -> dict[str, Any]:
    with one_of_two(rank, gradient_accumulation_steps=2) as accelerator:
        plain, optimizer = make_model()
        surgery = ParameterSurgery(plain, shared="backbone")
        register(surgery, accelerator, optimizer=optimizer)
        model, optimizer = accelerator.prepare(plain, optimizer)
        for step in range(4):
            x, y = batch(step + 10 * rank)
            with accelerator.accumulate(model):
                backward(surgery, accelerator, losses_of(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        return {"weight": plain.backbone[0].weight.detach(), "steps": int(surgery.steps)}


def test_parameter_surgery_in_two_processes() -> None:
    first, second = run_on_two_processes(surgery_of)
    assert first["steps"] == second["steps"] == 2
    assert torch.equal(first["weight"], second["weight"])


# Checkpoints.


def resumable(accelerator: Any, seed: int, **options: Any) -> tuple[nn.Module, Any, SaliencyRegularizer]:
    plain, plain_optimizer = make_model(seed)
    regularizer = SaliencyRegularizer(
        plain, "heads", strength=0.5, warmup_steps=6, surgery=PCGrad(), max_tasks_per_step=2, **options
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
            regularizer = SaliencyRegularizer(model, "heads")
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
            SaliencyRegularizer(first, "heads"),
            SaliencyRegularizer(second, ["a", "b"]),
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
        register(SaliencyRegularizer(heads, list(tasks), **options), accelerator)
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
    alone = SaliencyRegularizer(None, tasks=TASKS)
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
    by_hand = SaliencyRegularizer(None, tasks=TASKS)
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


# Engines.


class EngineOptimizer:
    """As an engine wraps an optimizer whose steps it takes itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()


class Lomo(torch.optim.SGD):
    """Named as one that updates in the backward pass."""


def engine_optimizers() -> dict[str, Callable[[torch.optim.Optimizer], Any]]:
    def of_deepspeed(optimizer: torch.optim.Optimizer) -> Any:
        engine = type("DeepSpeedZeroOptimizer", (EngineOptimizer,), {"__module__": "deepspeed.runtime.zero.stage"})
        return importlib.import_module("accelerate.utils.deepspeed").DeepSpeedOptimizerWrapper(engine(optimizer))

    return {
        "DeepSpeedOptimizerWrapper": of_deepspeed,
        "MegatronLMOptimizerWrapper": type("MegatronLMOptimizerWrapper", (EngineOptimizer,), {}),
        "FusedAdam": type("FusedAdam", (EngineOptimizer,), {"__module__": "deepspeed.ops.adam"}),
        "Lomo": lambda optimizer: Lomo(optimizer.param_groups, lr=0.1),
    }


@pytest.mark.parametrize("name", ["DeepSpeedOptimizerWrapper", "MegatronLMOptimizerWrapper", "FusedAdam", "Lomo"])
def test_optimizers_of_engines_are_known_without_the_engine(name: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, "heads")
    wrapped = engine_optimizers()[name](optimizer)
    with pytest.raises(ConfigurationError, match=rf"{name}.*if accelerator.sync_gradients.*regularizer.step\(\)"):
        register(regularizer, accelerator, optimizer=wrapped)
    assert not accelerator._custom_objects


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_engines(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = accelerate.DistributedType[engine]
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", property(lambda self: kind))
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, "heads")
    with pytest.raises(ConfigurationError, match=rf"{engine}.*without optimizer=.*regularizer.step\(\)"):
        register(regularizer, accelerator, optimizer=optimizer)
    register(regularizer, accelerator)
    model(batch(0)[0])
    regularizer()
    regularizer.step()
    accelerator.save_state(str(tmp_path))
    saved = regularizer.relations.matrix()
    regularizer.load_state_dict(SaliencyRegularizer(None, tasks=TASKS).state_dict())
    accelerator.load_state(str(tmp_path))
    assert torch.equal(regularizer.relations.matrix(), saved)
    assert int(regularizer.steps) == 1
    following = SaliencyRegularizer(None, tasks=TASKS, optimizer=optimizer)
    with pytest.raises(ConfigurationError, match="Build the regularizer without optimizer="):
        register(following, accelerator)
    surgery = ParameterSurgery(model)
    with pytest.raises(ConfigurationError, match="Use FeatureSurgery"):
        register(surgery, accelerator)
    with pytest.raises(ConfigurationError, match="Use FeatureSurgery"):
        backward(surgery, accelerator, losses_of(model(batch(0)[0]), batch(0)[1]))


# Compiling.


def test_a_model_that_prepare_compiles_is_refused_in_time() -> None:
    for backend in ("inductor", "aot_eager"):
        with fresh_state():
            accelerator = accelerate.Accelerator(cpu=True, dynamo_backend=backend)
            model, optimizer = make_model()
            regularizer = SaliencyRegularizer(model, "heads")
            with pytest.raises(ConfigurationError, match=rf"dynamo_backend='{backend}'.*model.backbone.compile\(\)"):
                register(regularizer, accelerator, optimizer=optimizer)
            register(FeatureSurgery(make_model()[0], "heads"), accelerator)  # needs no second derivative
    with fresh_state():
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR"  # as accelerate launch sets it
        accelerator = accelerate.Accelerator(cpu=True)
        with pytest.raises(ConfigurationError, match="ACCELERATE_DYNAMO_BACKEND"):
            register(regularizer, accelerator)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_backbone_compiled_alone_works(when: str) -> None:
    found = []
    for compiled in (False, True):
        with fresh_state():
            accelerator = accelerate.Accelerator(cpu=True)
            plain, plain_optimizer = make_model()
            plain.eval()
            if compiled and when == "before":
                plain.backbone.compile(backend="aot_eager")
            regularizer = SaliencyRegularizer(plain, "heads", strength=0.5)
            register(regularizer, accelerator, optimizer=plain_optimizer)
            model, optimizer = accelerator.prepare(plain, plain_optimizer)
            if compiled and when == "after":
                plain.backbone.compile(backend="aot_eager")
            found.append(torch.stack(steps_with(accelerator, model, optimizer, regularizer, range(3))))
            assert int(regularizer.relations.updates) == 3
            assert list(model.state_dict()) == list(Net().state_dict())
    torch.testing.assert_close(*found)


# Trackers.


def tensorboard_run(folder: Path) -> Any:
    pytest.importorskip("tensorboard")
    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers("run")
    return accelerator


def events_of(folder: Path) -> Any:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / "run"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def pixels_of(encoded: bytes) -> Tensor:
    with pytest.importorskip("PIL.Image").open(io.BytesIO(encoded)) as image:
        return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(
            image.height, image.width, 3
        )


MATRIX = torch.tensor([[0.0, 0.7, 0.2], [0.7, 0.0, 0.1], [0.2, 0.1, 0.0]])


def with_fixed_relations(tasks: tuple[str, ...] = TASKS, **options: Any) -> SaliencyRegularizer:
    size = len(tasks)
    matrix = MATRIX if size == 3 else torch.rand(size, size, generator=torch.Generator().manual_seed(0))
    matrix = (matrix + matrix.T).fill_diagonal_(0)
    relations = RelationWeights(size, "fixed", matrix=matrix)
    return SaliencyRegularizer(None, tasks=tasks, relations=relations, strength=0.5, **options)


def called(regularizer: SaliencyRegularizer, **options: Any) -> SaliencyRegularizer:
    feature = torch.ones(4, 2, requires_grad=True)
    outputs = {task: (index + 1) / 2 * feature.square().sum(1) for index, task in enumerate(regularizer.tasks)}
    regularizer(outputs=outputs, features=feature, **options)
    return regularizer


def test_scalars_in_tensorboard(tmp_path: Path) -> None:
    accelerator = tensorboard_run(tmp_path)
    model, optimizer, regularizer, _ = prepared(accelerator, "before prepare", wrapped=True, surgery=PCGrad())
    sent = []
    for step in range(3):
        steps_with(accelerator, model, optimizer, regularizer, range(step, step + 1))
        sent.append(log_report(regularizer, accelerator, step, image_every=None))
    report = regularizer.report
    assert report is not None
    assert report.surgery is not None
    accelerator.end_training()
    events = events_of(tmp_path)
    assert not events.Tags()["images"]
    assert set(events.Tags()["scalars"]) == set(sent[-1])
    for name in sent[-1]:
        assert [event.step for event in events.Scalars(name)] == [0, 1, 2]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([one[name] for one in sent])
    pairs = [float(report.distances[i, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    weights = [float(report.relations[i, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert sent[-1] == pytest.approx(
        {
            "saliency/penalty": float(report.penalty),
            "saliency/share": report.share,
            "saliency/strength": 0.5,
            "saliency/distance_mean": sum(pairs) / 3,
            "saliency/relation_mean": 1 / 3,
            "saliency/relation_max": max(weights),
            "saliency/relation_min": min(weights),
            "saliency/distance/left-right": pairs[0],
            "saliency/distance/left-up": pairs[1],
            "saliency/distance/right-up": pairs[2],
            "saliency/relation/left-right": weights[0],
            "saliency/relation/left-up": weights[1],
            "saliency/relation/right-up": weights[2],
            "saliency/surgery/conflicts": report.surgery.conflicts,
            **{
                f"saliency/surgery/weight/{task}": weight
                for task, weight in zip(TASKS, report.surgery.weights.tolist())
            },
        }
    )


def test_the_matrix_is_an_image_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    accelerator = tensorboard_run(tmp_path)
    log_report(called(with_fixed_relations()), accelerator, 3)
    accelerator.end_training()
    events = events_of(tmp_path)
    assert events.Tags()["images"] == ["saliency/relations"]
    (event,) = events.Images("saliency/relations")
    assert event.step == 3
    image = pixels_of(event.encoded_image_string)
    assert image.shape == (3 * 64, 3 * 64, 3)
    cells = image.view(3, 64, 3, 64, 3).permute(0, 2, 1, 3, 4).reshape(3, 3, 64 * 64, 3)
    assert (cells == cells[:, :, :1]).all()  # one colour a cell
    brightness = cells[:, :, 0].float().mean(-1)
    assert brightness[0, 1] > brightness[0, 2] > brightness[1, 2]
    assert torch.equal(brightness, brightness.T)
    grey = cells.diagonal()[0]
    assert (grey == grey[:1]).all()
    assert len(set(cells[0, 0, 0].tolist())) == 1


def test_the_image_with_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    accelerator = tensorboard_run(tmp_path)
    tasks = ("left", "a name that is far too long for the margin of a picture", "$\\no mathematics$ \u4e16")
    log_report(called(with_fixed_relations(tasks)), accelerator, 0)
    accelerator.end_training()
    (event,) = events_of(tmp_path).Images("saliency/relations")
    image = pixels_of(event.encoded_image_string)
    assert min(image.shape[:2]) >= 300
    colours, counts = image.view(-1, 3).unique(dim=0, return_counts=True)
    cells = [tuple(colour) for colour in colours[counts.argsort(descending=True)].tolist()]
    bright, grey = (253, 231, 36), (211, 211, 211)  # of the largest relation, and of no relation
    assert bright in cells[:6]
    assert grey in cells[:6]
    where = (image == torch.tensor(bright)).all(-1).nonzero().float()
    off = (image == torch.tensor(grey)).all(-1).nonzero().float()
    assert len(where) > 2 * 20**2
    assert len(off) / len(where) == pytest.approx(3 / 2, rel=0.1)
    row, column = (where.mean(0) - off.mean(0)).tolist()
    assert row < -10  # both cells of the pair (0, 1) are above and left of the middle of the diagonal
    assert column < -10


def test_names_in_the_picture_cost_no_matplotlib_state() -> None:
    """No backend is chosen, and no figure is left open."""
    pytest.importorskip("matplotlib")
    code = (
        "import sys, torch; from saliency_reg import SaliencyRegularizer; "
        "from saliency_reg.integrations import accelerate; from saliency_reg.integrations.shared import relation_image; "
        "assert not {'accelerate', 'matplotlib', 'tensorboard'} & set(sys.modules), 'import'; "
        "r = SaliencyRegularizer(None, tasks=['a', 'b']); f = torch.ones(4, 2, requires_grad=True); "
        "r(outputs={'a': f.sum(1), 'b': 2 * f.sum(1)}, features=f); "
        "print(relation_image.image_of(r.report).shape, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(350, 400, 3) False"


class Recorder(Tracker):
    """Somebody's own tracker, which takes images as those of accelerate do."""

    requires_logging_directory = False
    tracker = None

    def __init__(self, name: str = "recorder") -> None:
        self.name = name
        super().__init__()
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        self.scalars.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        self.images.append((step, values))


class Scalars(Tracker):
    """One that takes no images."""

    name, requires_logging_directory, tracker = "scalars", False, None

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        assert all(isinstance(value, float) for value in values.values())


def recording(*trackers: Any) -> Any:
    accelerator = accelerate.Accelerator(cpu=True, log_with=list(trackers))
    accelerator.init_trackers("run")
    return accelerator


def test_images_go_out_from_time_to_time() -> None:
    recorder = Recorder()
    accelerator = recording(recorder, Scalars())
    regularizer = called(with_fixed_relations())
    for step in (7, 8, 16, 17, 18, 40, 5, 6):
        log_report(regularizer, accelerator, step, image_every=10)
    assert [step for step, _ in recorder.images] == [7, 17, 40, 5]  # 5: the run was started anew
    assert [step for step, _ in recorder.scalars] == [7, 8, 16, 17, 18, 40, 5, 6]
    log_report(called(with_fixed_relations()), accelerator, 6)
    assert recorder.images[-1][0] == 6  # each regularizer has its own
    ((name, (image,)),) = recorder.images[-1][1].items()
    assert name == "saliency/relations"
    assert image.dtype.name == "uint8"
    assert image.shape[2] == 3


def test_trackers_that_take_a_single_image() -> None:
    trackers = [Recorder("aim"), Recorder("clearml"), Recorder("wandb")]
    log_report(called(with_fixed_relations()), recording(*trackers), 0, prefix="faces")
    shapes = [[getattr(value, "shape", len(value)) for value in one.images[0][1].values()] for one in trackers]
    assert len(shapes[0][0]) == len(shapes[1][0]) == 3
    assert shapes[2] == [1]
    assert "faces/penalty" in trackers[0].scalars[0][1]


def test_the_image_of_many_tasks() -> None:
    recorder = Recorder()
    tasks = tuple(f"attribute {index}" for index in range(40))
    log_report(called(with_fixed_relations(tasks)), recording(recorder), 0)
    (image,) = recorder.images[0][1]["saliency/relations"]
    assert 480 <= max(image.shape) <= 2000


def test_a_limit_of_pairs() -> None:
    recorder = Recorder()
    accelerator = recording(recorder)
    regularizer = called(with_fixed_relations())

    def pairs(**options: Any) -> list[str]:
        sent = log_report(regularizer, accelerator, 0, **options)
        return [name.rpartition("/")[2] for name in sent if name.startswith("saliency/relation/")]

    assert pairs(max_pairs=2) == ["left-right", "left-up"]  # the largest relations
    assert pairs(max_pairs=0) == []
    many = called(with_fixed_relations(tuple(f"task {index}" for index in range(12))))
    sent = log_report(many, accelerator, 0)
    assert sum(name.startswith("saliency/distance/") for name in sent) == 50
    strongest = many.relations.matrix().argmax()
    first = f"saliency/relation/task_{strongest // 12}-task_{strongest % 12}"
    assert sent[first] == sent["saliency/relation_max"]


def test_names_that_trackers_do_not_take() -> None:
    def pairs(*tasks: str) -> list[str]:
        with fresh_state():
            sent = log_report(called(with_fixed_relations(tasks)), recording(Recorder()), 0)
        return sorted(name for name in sent if name.startswith("saliency/distance/"))

    assert pairs("face/smiling", "look: young?", "5_o_Clock") == [
        "saliency/distance/face_smiling-5_o_Clock",
        "saliency/distance/face_smiling-look_young_",
        "saliency/distance/look_young_-5_o_Clock",
    ]
    assert len(set(pairs("a b", "a_b", "a/b"))) == 3
    assert len(set(pairs("a-b", "c", "a"))) == 3
    assert len(set(pairs("a", "b-a", "a-b"))) == 3


def test_values_that_are_not_finite_are_left_out() -> None:
    recorder = Recorder()
    accelerator = recording(recorder)
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=1.0)
    feature = model.backbone(batch(0)[0])
    for task in ("left", "up"):
        model.heads[task](feature)
    regularizer(losses=torch.zeros(()))
    sent = log_report(regularizer, accelerator, 0)
    assert "saliency/distance/left-up" in sent
    assert not {"saliency/distance/left-right", "saliency/share"} & set(sent)  # did not run; infinite
    assert sent["saliency/distance_mean"] == sent["saliency/distance/left-up"]
    bad = torch.full((16, 6), float("nan"))
    model(bad)
    regularizer()
    sent = log_report(regularizer, accelerator, 1, image_every=1)
    assert "saliency/penalty" not in sent
    assert sent["saliency/strength"] == 1.0
    assert all(torch.isfinite(torch.tensor(list(values.values()))).all() for _, values in recorder.scalars)
    assert len(recorder.images) == 2


@pytest.mark.parametrize("kind", ["feature", "parameters"])
def test_figures_of_surgery_alone(kind: str) -> None:
    recorder = Recorder()
    accelerator = recording(recorder)
    model, optimizer = make_model()
    surgery = FeatureSurgery(model, "heads") if kind == "feature" else ParameterSurgery(model, shared="backbone")
    register(surgery, accelerator, optimizer=optimizer)
    with pytest.raises(CaptureError, match="has no report yet"):
        log_report(surgery, accelerator, 0)
    x, y = batch(0)
    losses = losses_of(model(x), y)
    if kind == "feature":
        accelerator.backward(sum(losses.values()))
    else:
        backward(surgery, accelerator, losses)
    sent = log_report(surgery, accelerator, 0)
    assert set(sent) == {"saliency/surgery/conflicts", *(f"saliency/surgery/weight/{task}" for task in TASKS)}
    assert not recorder.images


def test_without_a_tracker_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "figures_of", None)
    monkeypatch.setattr(integration, "_send_image", None)
    assert log_report(called(with_fixed_relations()), accelerate.Accelerator(cpu=True), 0) == {}


def log_on(rank: int, folder: str) -> dict[str, Any]:
    pytest.importorskip("tensorboard")
    own = Path(folder) / str(rank)
    with one_of_two(rank, log_with="tensorboard", project_dir=str(own)) as accelerator:
        accelerator.init_trackers("run")
        if rank:
            read, integration.figures_of = integration.figures_of, None
        try:
            model, optimizer, regularizer, _ = prepared(accelerator, "before prepare", wrapped=True)
            steps_with(accelerator, model, optimizer, regularizer, range(2), shift=10 * rank)
            sent = log_report(regularizer, accelerator, 1)
        finally:
            if rank:
                integration.figures_of = read
        for tracker in accelerator.trackers:
            tracker.finish()
        return {"sent": sent, "files": sorted(path.name for path in own.rglob("*") if path.is_file())}


def test_only_one_process_reads_and_writes(tmp_path: Path) -> None:
    first, second = run_on_two_processes(log_on, str(tmp_path))
    assert second == {"sent": {}, "files": []}
    assert len(first["files"]) == 1
    events = events_of(tmp_path / "0")
    assert set(events.Tags()["scalars"]) == set(first["sent"])
    assert events.Tags()["images"] == ["saliency/relations"]


# Wrong use.


def test_wrong_arguments() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, "heads")
    with pytest.raises(WrongTypeError, match=r"found Accelerator. Use register\(regularizer, accelerator\)"):
        register(accelerator, regularizer)
    with pytest.raises(WrongTypeError, match=r"must be an accelerate.Accelerator, found Net"):
        register(regularizer, model)
    with pytest.raises(WrongTypeError, match=r"optimizer must be a torch.optim.Optimizer"):
        register(regularizer, accelerator, optimizer=torch.optim.lr_scheduler.StepLR(optimizer, 1))
    with pytest.raises(WrongTypeError, match=r"Call accelerator.backward\(loss\)"):
        backward(regularizer, accelerator, {})
    with pytest.raises(TaskError):
        backward(ParameterSurgery(model, shared="backbone"), accelerator, {})
    with pytest.raises(WrongTypeError):
        backward(ParameterSurgery(model, shared="backbone"), accelerator, 3)
    with pytest.raises(ConfigurationError, match="closure"):
        register(FeatureSurgery(make_model()[0], "heads"), accelerator, optimizer=torch.optim.LBFGS(model.parameters()))
    assert not accelerator._custom_objects
    with pytest.raises(CaptureError, match="has no report yet"):
        log_report(regularizer, accelerator, 0)
    with pytest.raises(WrongTypeError, match=r"step must be an int, found 0.5 \(float\)"):
        log_report(regularizer, accelerator, 0.5)
    with pytest.raises(ConfigurationError, match="image_every must be at least 1, found 0"):
        log_report(regularizer, accelerator, 0, image_every=0)
    with pytest.raises(ConfigurationError, match="max_pairs must be at least 0, found -1"):
        log_report(regularizer, accelerator, 0, max_pairs=-1)


def test_a_prepared_regularizer_is_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    regularizer = accelerator.prepare(SaliencyRegularizer(None, tasks=TASKS))
    with pytest.raises(ConfigurationError, match="Prepare the model, the optimizer and the loaders only"):
        register(regularizer, accelerator)


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    regularizer = SaliencyRegularizer(None, tasks=TASKS)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingPackageError, match=r'pip install "saliency-reg\[accelerate\]"') as caught:
        register(regularizer, object())
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, SaliencyRegError)


def test_examples() -> None:
    found = doctest.testmod(integration, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 20
    assert not found.failed
