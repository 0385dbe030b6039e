"""FSDP2 where the processes do not do the same: what a process decides for itself must not change who gathers when."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.errors import ConfigurationError
from tests.support.two_processes import run_on_two_processes
from tests.support.zoo import TASKS

from .support import HAS_FSDP2, STRENGTH, Selective, build_model, losses_of

pytestmark = pytest.mark.skipif(not HAS_FSDP2, reason="FSDP2 is a part of torch from 2.6 on")


def model_with_heads_that_can_be_silent() -> Selective:
    """ReLU heads that answer nothing where the first input is negative, so that it cannot be told what they read."""
    model = build_model()
    with torch.no_grad():
        model.backbone[0].weight.zero_()[:, 0] = 1.0
        model.backbone[0].bias.zero_()
        for task in TASKS:
            model.heads[task][1] = nn.ReLU()
            model.heads[task][0].weight.abs_()
            model.heads[task][0].bias.zero_()
    return model


def batch(rank: int, step: int, what: str) -> tuple[Tensor, Tensor]:
    size = 4
    if rank and what == "one sample at first" and step == 0:
        size = 1
    if rank and what == "no samples later" and step == 1:
        size = 0
    generator = torch.Generator().manual_seed(10 * step + rank)
    inputs = torch.rand(size, 5, generator=generator, dtype=torch.float64)
    if rank and what == "silent heads":
        inputs[0] *= -1
    return inputs, torch.rand(size, len(TASKS), generator=generator, dtype=torch.float64)


def train(rank: int, how: str, what: str, surgery: bool) -> list[Tensor]:
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    inner = model_with_heads_that_can_be_silent() if what == "silent heads" else build_model()
    model: nn.Module = inner
    if how == "not sharded":
        model = DistributedDataParallel(inner)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for module in (inner.backbone, *(inner.heads.values() if how == "each head" else ())):
            fully_shard(module, mesh=mesh)
        fully_shard(inner, mesh=mesh)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    regularizer = SaliencyRegularizer(
        model, "heads", strength=STRENGTH, optimizer=optimizer, surgery=PCGrad() if surgery else None, metric="l1"
    )
    for step in range(3):
        inputs, targets = batch(rank, step, what)
        outputs = model(inputs)
        nothing = 0 * sum(output.sum() for output in outputs.values())
        losses = losses_of(outputs, targets) if len(inputs) else {}
        loss = sum(losses.values(), start=nothing) + regularizer()
        optimizer.zero_grad()
        if what != "a step without a backward pass" or step != 1:
            loss.backward()
            optimizer.step()
        elif how == "not sharded":
            loss.backward()  # DistributedDataParallel wants one; nothing comes of it
            optimizer.zero_grad()
    return [
        parameter.detach().full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
        for parameter in inner.parameters()
    ] + [regularizer.relations.matrix()]


@pytest.mark.parametrize("surgery", [False, True], ids=["plain", "with surgery"])
@pytest.mark.parametrize("how", ["each head", "with the model"])
@pytest.mark.parametrize(
    "what", ["silent heads", "one sample at first", "no samples later", "a step without a backward pass"]
)
def test_equals_a_model_that_is_not_sharded(what: str, how: str, surgery: bool) -> None:
    expected, _ = run_on_two_processes(train, "not sharded", what, surgery)
    first, second = run_on_two_processes(train, how, what, surgery)
    for ours, theirs, wanted in zip(first, second, expected):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


def fsdp1(rank: int) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(build_model(), use_orig_params=True, device_id=torch.device("cpu"))
        regularizer = SaliencyRegularizer(model, "heads", strength=STRENGTH, metric="l1")
        inputs, _ = batch(rank, 0, "")
        model(inputs)
        try:
            regularizer()
        except ConfigurationError as error:
            return str(error)
    return "no error of ours"


def test_fsdp1_is_refused() -> None:
    for text in run_on_two_processes(fsdp1):
        assert "fsdp_version=2" in text
