"""Steps with Hugging Face accelerate: every way to attach, accumulation, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from saliency_reg.integrations.accelerate import register
from tests.support.training import Net, assert_same_state, batch, make_model
from tests.support.two_processes import run_on_two_processes

from .support import losses_of, one_of_two, prepared, steps_with

accelerate: Any = pytest.importorskip("accelerate")
Tracker: Any = pytest.importorskip("accelerate.tracking").GeneralTracker


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


WAYS = ("before prepare", "after prepare", "registered before, attached after", "optimizer of the constructor")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_numbers_of_a_plain_loop(way: str) -> None:
    own_model, own_optimizer = make_model()
    own = SaliencyRegularizer(own_model, "heads", strength=0.5, optimizer=own_optimizer, metric="l1")
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
    own = SaliencyRegularizer(model, "heads", strength=0.5, metric="l1")
    for part in range(2):
        rows = slice(8 * part, 8 * part + 8)
        ((sum(losses_of(model(x[rows]), y[rows]).values()) + own()) / 2).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    own.remove()
    model.zero_grad()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    regularizer = SaliencyRegularizer(model, "heads", strength=0.5, metric="l1")
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
    regularizer = SaliencyRegularizer(plain, "heads", strength=0.1, metric="l1")
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
    own = SaliencyRegularizer(own_model, "heads", strength=0.5, optimizer=own_optimizer, metric="l1")
    torch.manual_seed(1)
    expected = plain_steps(own_model, own_optimizer, own, range(3))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0.03, atol=0)
    assert regularizer.report is not None
    assert regularizer.report.distances.dtype == torch.float32
    assert int(regularizer.relations.updates) == 3
