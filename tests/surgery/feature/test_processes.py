"""Surgery at the feature map on two processes: that of the joined batch."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import FeatureSurgery, PCGrad, RelationWeights, SaliencyRegularizer
from tests.reference.slow_fork import slow_step
from tests.support.two_processes import run_on_two_processes
from tests.support.zoo import TASKS, build

from .support import named_outputs, pcgrad

SEEDS = {"tanh heads": 2, "linear columns": 1, "mlp columns": 2, "pooling heads": 2}  # with conflicts


def no_layout_hint() -> None:
    """A hint on speed: a second derivative leaves a [1, C] gradient with other strides than its parameter has."""
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


def inputs_of(name: str) -> Tensor:
    torch.manual_seed(0)
    shape = build(name).inputs.shape[1:]
    return torch.randn(8, *shape, dtype=torch.float64)


def task_losses(outputs: dict[str, Tensor], wanted: Tensor | None = None) -> dict[str, Tensor]:
    wanted = targets() if wanted is None else wanted
    return {
        task: (1 + index) * (output.reshape(len(output), -1).sum(1) - wanted[:, index]).square().mean()
        for index, (task, output) in enumerate(outputs.items())
    }


def mean_losses(outputs: dict[str, Tensor], wanted: Tensor, absent: tuple[str, ...] = ()) -> Tensor:
    return torch.stack([loss for task, loss in task_losses(outputs, wanted).items() if task not in absent]).sum()


def targets() -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def one_rank(rank: int, name: str, strength: float, how: str) -> dict[str, Tensor]:
    no_layout_hint()
    entry = build(name, SEEDS[name])
    model: nn.Module = entry.model
    if how == "ddp":
        model = DistributedDataParallel(entry.model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(entry.model.backbone, mesh=init_device_mesh("cpu", (2,)))
    options = {"heads": "heads", **entry.options}
    if strength:
        regularizer = SaliencyRegularizer(
            model,
            strength=strength,
            relations=RelationWeights(3, "fixed"),
            surgery=PCGrad(),
            **{"metric": "l1", **options},
        )
    else:
        surgery = FeatureSurgery(model, **options)
    mine = slice(4 * rank, 4 * rank + 4)
    outputs = named_outputs(model(inputs_of(name)[mine]))
    loss = mean_losses(outputs, targets()[mine])
    (loss + regularizer() if strength else loss).backward()
    report = regularizer.report.surgery if strength else surgery.report
    gradients: dict = {name: parameter.grad for name, parameter in entry.model.named_parameters()}
    if how == "fsdp":
        for name, gradient in gradients.items():
            if name.startswith("backbone"):
                gradients[name] = gradient.full_tensor()
            else:  # not sharded, so that nobody has averaged it
                dist.all_reduce(gradient)
                gradient /= 2
    return {
        **gradients,
        "weights": report.weights,
        "gramian": report.gramian,
    }


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_equal_one(how: str) -> None:
    """With DistributedDataParallel, and with a backbone that FSDP2 has sharded."""
    if how == "fsdp" and not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("FSDP2 is a part of torch from 2.6 on")
    for name in SEEDS if how == "ddp" else ("tanh heads", "linear columns"):
        for strength in (0.0, 0.7):
            entry = build(name, SEEDS[name])

            expected = slow_step(entry.model, inputs_of(name), task_losses, pcgrad, strength)
            assert expected.conflicts > 0, name
            first, second = run_on_two_processes(one_rank, name, strength, how)
            for key, value in first.items():
                assert torch.equal(value, second[key]), key
            for key, wanted in expected.gradients.items():
                torch.testing.assert_close(first[key], wanted, rtol=1e-10, atol=1e-10, msg=f"{name} {key}")
            flat = [gradient.flatten() for gradient in expected.task_gradients]
            torch.testing.assert_close(
                first["gramian"], torch.stack([torch.stack([a @ b for a in flat]) for b in flat])
            )


def absent_on_one_rank(rank: int, weighting_name: str, strength: float) -> list[Tensor]:
    no_layout_hint()
    entry = build("tanh heads", SEEDS["tanh heads"])
    model = DistributedDataParallel(entry.model, find_unused_parameters=True)
    weighting = PCGrad() if weighting_name == "PCGrad" else lambda gramian: gramian.sum(0).sigmoid()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    regularizer = SaliencyRegularizer(
        model, "heads", strength=strength, optimizer=optimizer, surgery=weighting, metric="l1"
    )
    found = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        inputs = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        absent = {0: (), 1: ("second",), 2: TASKS[:2], 3: TASKS}[step if rank else 0]
        outputs = model(inputs)
        rest = torch.zeros((), dtype=torch.float64) if absent == TASKS else mean_losses(outputs, targets()[:4], absent)
        optimizer.zero_grad()
        # A process without any loss: its outputs stay in the graph, as DistributedDataParallel wants it anyway.
        nothing = 0 * sum(output.sum() for output in outputs.values()) if absent == TASKS else 0
        (rest + nothing + regularizer()).backward()
        optimizer.step()
        found += [parameter.detach().clone() for parameter in model.parameters()]
        found.append(regularizer.report.surgery.weights)
    return found


def test_a_task_absent_on_one_process() -> None:
    for weighting in ("PCGrad", "callable"):
        for strength in (0.0, 0.2):
            first, second = run_on_two_processes(absent_on_one_rank, weighting, strength)
            for ours, theirs in zip(first, second):
                assert bool(torch.isfinite(ours).all())
                assert torch.equal(ours, theirs)


def fifty_steps(rank: int) -> list[Tensor]:
    no_layout_hint()
    torch.manual_seed(0)
    entry = build("tanh heads", SEEDS["tanh heads"])
    model = DistributedDataParallel(entry.model.float())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    regularizer = SaliencyRegularizer(
        model, "heads", strength=0.1, optimizer=optimizer, relations="fixed", surgery=PCGrad(), metric="l1"
    )
    for step in range(50):
        generator = torch.Generator().manual_seed(10 * step + rank)
        inputs = torch.randn(4, 5, generator=generator)
        optimizer.zero_grad()
        (mean_losses(model(inputs), targets()[:4].float()) + regularizer()).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_parameters_stay_the_same_to_the_bit() -> None:
    first, second = run_on_two_processes(fifty_steps)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second))


def random_weighting(rank: int) -> Tensor:
    """Each process draws its own weights: those of the first one count."""
    entry = build("tanh heads", SEEDS["tanh heads"])
    torch.manual_seed(rank)
    surgery = FeatureSurgery(entry.model, "heads", weighting=lambda gramian: torch.rand(len(gramian)))
    mean_losses(entry.model(inputs_of("tanh heads")[:4]), targets()[:4]).backward()
    return surgery.report.weights


def test_weightings_that_differ_are_taken_from_the_first_process() -> None:
    first, second = run_on_two_processes(random_weighting)
    assert torch.equal(first, second)
