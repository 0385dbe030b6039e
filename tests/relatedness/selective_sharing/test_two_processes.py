"""Two gloo processes decide as one with the joined batches, and train on as it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import ConfigurationError, SelectiveSharing
from tests.support.two_processes import run_on_two_processes

from .support import Model, sgd, train

#: One model and one training; in the second window without DistributedDataParallel.
STEPS = (range(30), range(30, 33))


def build() -> tuple[Model, torch.optim.Optimizer, SelectiveSharing]:
    torch.manual_seed(3)
    model = Model().double()
    optimizer = sgd(model)
    return model, optimizer, SelectiveSharing(model, heads="heads", optimizer=optimizer)


def trained(rank: int) -> dict[str, Any]:
    half = slice(16 * rank, 16 * (rank + 1))
    model, optimizer, sharing = build()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ConfigurationError, match="Pass the model inside"):
        SelectiveSharing(wrapped, heads="module.heads")
    train(wrapped, optimizer, STEPS[0], part=half)
    similarity = sharing.similarity()
    groups = sharing.share(sharing.groups(theta=0.5))
    wrapped = DistributedDataParallel(model)  # anew
    train(wrapped, optimizer, STEPS[1], part=half)
    # Each by itself: the gradients differ, and are added up.
    apart, own_optimizer, own = build()
    train(apart, own_optimizer, range(1), part=half)
    return {
        "similarity": similarity,
        "groups": groups,
        "model": model.state_dict(),
        "survivors": sharing.survivors,
        "apart": own.similarity(),
    }


def test_two_processes_are_one_with_the_joined_batches() -> None:
    first, second = run_on_two_processes(trained, timeout=240.0)
    model, optimizer, sharing = build()
    train(model, optimizer, STEPS[0])
    similarity = sharing.similarity()
    groups = sharing.share(sharing.groups(theta=0.5))
    assert first["groups"] == second["groups"] == groups
    assert 3 <= len(groups) < 9
    train(model, optimizer, STEPS[1])
    one, one_optimizer, alone = build()
    train(one, one_optimizer, range(1))
    for found in (first, second):
        assert torch.equal(found["similarity"], first["similarity"])
        assert torch.equal(found["apart"], first["apart"])
        torch.testing.assert_close(found["similarity"], similarity, rtol=0, atol=1e-10)
        torch.testing.assert_close(found["apart"], alone.similarity(), rtol=0, atol=1e-10)
        assert found["survivors"].tolist() == sharing.survivors.tolist()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found["model"][name], value, rtol=0, atol=1e-10)
            assert torch.equal(found["model"][name], first["model"][name])
