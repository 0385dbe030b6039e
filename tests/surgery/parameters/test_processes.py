"""Surgery on the parameters in two processes equals one process on the joined batch."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import ParameterSurgery, PCGrad, SaliencyRegError
from tests.reference.slow_surgery import conflicting_pairs, flat_gradient
from tests.support.two_processes import RankFailedError, run_on_two_processes

TASKS = ("a", "b", "c", "d")
BATCH = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.Linear(6, 8)
        self.upper = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = torch.tanh(self.upper(torch.tanh(self.lower(x))))
        return {task: head(feature) for task, head in self.heads.items()}


def make() -> Net:
    torch.manual_seed(0)
    return Net().double()


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x, 3 * torch.randn(BATCH, 4, generator=generator, dtype=torch.float64)


def losses_of(model: nn.Module, step: int, rank: int | None, ranks: int = 2) -> dict[str, Tensor]:
    x, y = data(step)
    part = slice(None) if rank is None else slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    outputs = model(x[part])
    return {task: (outputs[task][:, 0] - y[part, t]).square().mean() for t, task in enumerate(TASKS)}


def penalty_of(losses: dict[str, Tensor], model: nn.Module) -> Tensor:
    extra = torch.stack([p.pow(3).sum() for p in model.parameters()]).sum()
    return 0.1 * torch.stack(list(losses.values())).sum() + 0.01 * extra


def train(model: nn.Module, options: dict[str, Any], rank: int | None, steps: int = 3) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    surgery = ParameterSurgery(model, PCGrad(), optimizer=optimizer, **options)
    for step in range(steps):
        optimizer.zero_grad()
        if options.get("every") == 2 and step == 1:  # two micro-batches, too
            for micro in range(2):
                number = micro if rank is None else rank * 2 + micro
                losses = {
                    task: loss / 2 for task, loss in losses_of(model, step, number, 2 if rank is None else 4).items()
                }
                surgery.backward(losses, penalty_of(losses, model) / 2, accumulate=micro == 0)
        else:
            losses = losses_of(model, step, rank)
            surgery.backward(losses, penalty_of(losses, model))
        optimizer.step()
    assert surgery.report.conflicts > 0
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"measure": "upper"},
    {"chunk_size": 3},
    {"every": 2},
    {"shared": ["lower", "upper"]},
]


def equals_one_process(rank: int, wrap: str) -> list[dict[str, Tensor]]:
    found = []
    for options in OPTIONS:
        model: nn.Module = make()
        if wrap:
            model = DistributedDataParallel(
                model, find_unused_parameters=wrap == "unused", gradient_as_bucket_view=True
            )
        found.append(train(model, options, rank))
    return found


@pytest.mark.parametrize("wrap", ["", "DDP", "unused"])
def test_two_processes_equal_one(wrap: str) -> None:
    both = run_on_two_processes(equals_one_process, wrap)
    for options, here, there in zip(OPTIONS, *both):
        wanted = train(make(), options, None)
        for name, value in wanted.items():
            assert torch.equal(here[name], there[name]), (options, name)
            torch.testing.assert_close(here[name], value, rtol=1e-10, atol=1e-10, msg=f"{options} {name}")


def test_projecting_before_the_mean_would_be_seen() -> None:
    model = make()
    shared = [*model.lower.parameters(), *model.upper.parameters()]
    means = []
    for rank in (0, 1, None):
        rows = torch.stack([flat_gradient(loss, shared) for loss in losses_of(model, 0, rank).values()])
        assert conflicting_pairs(rows) > 0
        means.append(PCGrad()(rows @ rows.T) @ rows)
    assert ((means[0] + means[1]) / 2 - means[2]).abs().max() > 1e-3


#: Tasks with a loss in each step, on rank 0 and rank 1.
PRESENT = [
    (TASKS, ("a", "c", "d")),
    (("a", "b"), ("c", "d")),  # nothing is shared on one process alone
    (("a",), ("b",)),
    (("b",), ("b",)),
    ((), ("a", "d")),
    (("a", "b", "c"), ("b", "c")),
]


def absent(rank: int, options: dict[str, Any], wrap: bool) -> list[dict[str, Tensor | None]]:
    inner = make()
    model = DistributedDataParallel(inner, find_unused_parameters=True) if wrap else inner
    surgery = ParameterSurgery(model, tasks=TASKS, **options)
    found = []
    for step, tasks in enumerate(PRESENT):
        model.zero_grad()
        losses = losses_of(model, step, rank)
        surgery.backward({task: losses[task] for task in tasks[rank]})
        found.append({name: parameter.grad for name, parameter in inner.named_parameters()})
    return found


@pytest.mark.parametrize("options", [{}, {"measure": "upper"}, {"chunk_size": 1}, {"every": 2}], ids=str)
@pytest.mark.parametrize("wrap", [False, True])
def test_a_task_absent_on_one_process(options: dict[str, Any], wrap: bool) -> None:
    both = run_on_two_processes(absent, options, wrap)
    model = make()
    surgery = ParameterSurgery(model, tasks=TASKS, **options)
    for step, present in enumerate(PRESENT):
        model.zero_grad()
        parts = [losses_of(model, step, rank) for rank in range(2)]
        losses: dict[str, Tensor] = {}
        for rank in range(2):
            for task in present[rank]:
                losses[task] = losses.get(task, 0) + parts[rank][task] / 2
        surgery.backward(losses)
        for name, parameter in model.named_parameters():
            here, there = both[0][step][name], both[1][step][name]
            if parameter.grad is None:
                assert here is None, (step, name)
                assert there is None, (step, name)
            else:
                assert torch.equal(here, there)
                torch.testing.assert_close(here, parameter.grad, rtol=1e-10, atol=1e-10, msg=f"{step} {name}")


def many_steps(rank: int) -> tuple[list[Tensor], float]:
    model = DistributedDataParallel(make().float(), find_unused_parameters=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    surgery = ParameterSurgery(model, optimizer=optimizer)
    conflicts = 0.0
    for step in range(50):
        generator = torch.Generator().manual_seed(2 * step + rank)
        optimizer.zero_grad()
        outputs = model(torch.randn(8, 6, generator=generator))
        losses = {
            task: (output - torch.randn(8, 1, generator=generator)).square().mean() for task, output in outputs.items()
        }
        if step % 5 == rank:
            del losses["b"]
        surgery.backward(losses, 1e-3 * outputs["a"].square().mean())
        optimizer.step()
        conflicts += surgery.report.conflicts
    return [parameter.detach() for parameter in model.parameters()], conflicts


def test_bit_identical_over_fifty_steps() -> None:
    (here, conflicts), (there, _) = run_on_two_processes(many_steps)
    assert conflicts > 1
    for one, other in zip(here, there):
        assert torch.equal(one, other)


def refused(rank: int, case: str) -> tuple[str, str, bool]:
    model = make()
    losses: Any = losses_of(model, 0, rank)
    options: dict[str, Any] = {}
    wrapped: nn.Module = model
    if case == "one rank's loss" and rank == 1:
        losses["b"] = losses["b"].detach()
    elif case == "one rank's first losses" and rank == 1:
        losses = sum(losses.values())
    elif case == "different tasks":
        options["tasks"] = TASKS if rank == 0 else TASKS[::-1]
    elif case == "outside":
        scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        losses = {task: loss * scale for task, loss in losses.items()}
    elif case == "static graph":
        wrapped = DistributedDataParallel(model, static_graph=True)
        losses = losses_of(wrapped, 0, rank)
    elif case == "not connected":
        losses["a"] = model.heads["a"].weight.sum()
    surgery = ParameterSurgery(wrapped, **options)
    try:
        surgery.backward(losses)
    except SaliencyRegError as error:
        if case.startswith("one rank") or case == "outside":  # and goes on
            surgery.backward(losses_of(model, 0, rank))
            assert model.lower.weight.grad is not None
            model.zero_grad()
        clean = all(parameter.grad is None for parameter in model.parameters())
        return type(error).__name__, str(error), clean
    return "", "", False


@pytest.mark.parametrize(
    ("case", "kinds", "text"),
    [
        ("one rank's loss", ["SurgeryError", "NotConnectedError"], "task 'b' carries no graph"),
        ("one rank's first losses", ["SurgeryError", "WrongTypeError"], "do not add them up"),
        ("different tasks", ["TaskError"] * 2, "the processes have different tasks"),
        ("outside", ["ConfigurationError"] * 2, r"leaf tensor of shape \[\].*nn.ModuleList"),
        ("static graph", ["ConfigurationError"] * 2, "Pass static_graph=False"),
        ("not connected", ["NotConnectedError"] * 2, "task 'a' does not depend"),
    ],
)
def test_all_processes_refuse_together(case: str, kinds: list[str], text: str) -> None:
    both = run_on_two_processes(refused, case)
    assert [kind for kind, _, _ in both] == kinds
    assert all(clean for _, _, clean in both)
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(both[1][1])
    if kinds[0] == "SurgeryError":
        assert "another process refused its losses" in both[0][1]


def names_of_first_call(rank: int) -> Any:
    model = make()
    losses = losses_of(model, 0, rank)
    surgery = ParameterSurgery(model)
    surgery.backward({task: losses[task] for task in (("b", "c") if rank == 0 else ("d", "a", "c"))})
    return surgery.tasks


def test_tasks_are_agreed_on_in_the_first_call() -> None:
    assert run_on_two_processes(names_of_first_call) == [("b", "c", "d", "a")] * 2


def random_weighting(rank: int) -> Tensor:
    torch.manual_seed(rank)
    model = make()
    surgery = ParameterSurgery(model, lambda gramian: torch.rand(len(gramian)) + rank)
    surgery.backward(losses_of(model, 0, rank))
    return surgery.report.weights


def test_random_weightings_are_those_of_the_first_process() -> None:
    here, there = run_on_two_processes(random_weighting)
    assert torch.equal(here, there)


def own_group(rank: int) -> Tensor | None:
    model = make()
    group = dist.new_group([0, 1])
    surgery = ParameterSurgery(model, process_group=group)
    surgery.backward(losses_of(model, 0, rank))
    return model.lower.weight.grad


def test_a_given_process_group() -> None:
    here, there = run_on_two_processes(own_group)
    model = make()
    ParameterSurgery(model).backward(losses_of(model, 0, None))
    assert torch.equal(here, there)
    torch.testing.assert_close(here, model.lower.weight.grad, rtol=1e-10, atol=1e-10)


def sharded(rank: int, kind: str) -> list[str]:
    fsdp = torch.distributed.fsdp
    model: nn.Module = make()
    messages = []
    surgery = ParameterSurgery(model)
    if kind == "FSDP2":
        fsdp.fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    else:
        model = fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    for build in (lambda: ParameterSurgery(model), lambda: surgery.backward(losses_of(model, 0, rank))):
        try:
            build()
        except SaliencyRegError as error:
            messages.append(f"{type(error).__name__} {error}")
    return messages


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="an older torch")
@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2"])
def test_sharded_parameters_are_refused(kind: str) -> None:
    for messages in run_on_two_processes(sharded, kind):
        assert len(messages) == 2
        assert all("ConfigurationError the model has sharded parameters" in message for message in messages), messages
        assert all("surgery=PCGrad()" in message for message in messages)


# The helper itself.


def fails(rank: int, how: str) -> int:
    if rank == 1 and how == "raises":
        raise ValueError("no luck")
    if rank == 1 and how == "dies":
        os._exit(3)
    if rank == 1 and how == "hangs":
        time.sleep(1000)
    return rank


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("raises", "rank 1: (.|\n)*ValueError: no luck"),
        ("dies", "rank 1: the process died with exit code 3"),
        ("hangs", "rank 1: no answer in time\n(.|\n)*in fails"),
    ],
)
def test_a_failing_process_fails_the_test(how: str, text: str) -> None:
    assert run_on_two_processes(fails, "") == [0, 1]  # from here on, they are running
    with pytest.raises(RankFailedError, match=text):
        run_on_two_processes(fails, how, timeout=2 if how == "hangs" else 60)
