"""Sharded modules between a feature map and the heads, and their checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, RelationWeights, SaliencyRegularizer
from tests.reference.slow_ranks import slow_joined_step
from tests.support.two_processes import run_on_two_processes
from tests.support.zoo import TASKS, mlp

from .support import HAS_FSDP2, STRENGTH, Selective, build_model, losses_of, one_call, share


class WithTrunk(Selective):
    """Something between the named feature map and the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(nn.Tanh(), 6)

    def from_feature(self, feature: Tensor, ran: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        return super().from_feature(self.trunk(feature), ran)


def with_trunk() -> WithTrunk:
    torch.manual_seed(0)
    return WithTrunk().double()


def sharded_trunk(rank: int, shard: bool) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = with_trunk()
    mesh = init_device_mesh("cpu", (2,))
    for module in (model.backbone, *([model.trunk] if shard else []), model):
        fully_shard(module, mesh=mesh)
    regularizer = SaliencyRegularizer(model, "heads", feature="backbone", strength=STRENGTH, metric="l1")
    one_call(model, regularizer, share(rank, size=4 - rank)).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def saved_and_loaded(rank: int, folder: str) -> tuple[Tensor, Tensor, int, bool]:
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def parts() -> tuple[Selective, SaliencyRegularizer, torch.optim.Optimizer]:
        model = build_model()
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.backbone, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return (
            model,
            SaliencyRegularizer(model, "heads", optimizer=optimizer, surgery=PCGrad(), strength=0.1, metric="l1"),
            optimizer,
        )

    model, regularizer, optimizer = parts()
    for _ in range(3):
        optimizer.zero_grad()
        one_call(model, regularizer, share(rank)).backward()
        optimizer.step()
    checkpoint.save(
        {"model": get_model_state_dict(model), "regularizer": regularizer.state_dict()}, checkpoint_id=folder
    )
    fresh_model, fresh, _ = parts()
    state = {"model": get_model_state_dict(fresh_model), "regularizer": fresh.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(fresh_model, state["model"])
    fresh.load_state_dict(state["regularizer"])
    same = all(
        torch.equal(ours.full_tensor(), theirs.full_tensor())
        for ours, theirs in zip(model.parameters(), fresh_model.parameters())
    )
    return regularizer.relations.matrix(), fresh.relations.matrix(), int(fresh.surgery.weighting.calls), same


@pytest.mark.skipif(not HAS_FSDP2, reason="FSDP2 is a part of torch from 2.6 on")
class TestFullySharded:
    @pytest.mark.parametrize("shard", [True, False], ids=["by itself", "with the model"])
    def test_a_sharded_module_between_feature_and_heads(self, shard: bool) -> None:
        expected = slow_joined_step(
            with_trunk(), TASKS, [share(0), share(1, size=3)], losses_of, RelationWeights(3).matrix(), STRENGTH
        )
        for gradients in run_on_two_processes(sharded_trunk, shard):
            for name, wanted in expected.gradients.items():
                torch.testing.assert_close(gradients[name], wanted, rtol=1e-10, atol=1e-10, msg=name)

    def test_distributed_checkpoint(self, tmp_path: Path) -> None:
        for before, after, calls, same in run_on_two_processes(saved_and_loaded, str(tmp_path)):
            assert torch.equal(before, after)
            assert not torch.equal(before, RelationWeights(3).matrix())
            assert calls == 3
            assert same
