"""What cannot work is refused where it is said, with what to pass instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from saliency_reg import (
    ConfigurationError,
    HeadNotFoundError,
    HeadPenalty,
    MissingArgumentError,
    ShapeError,
    TaskError,
    WrongTypeError,
)
from tests.support.two_processes import run_on_two_processes

from .support import Heads, linear_heads, make

SGD = torch.optim.SGD


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ConfigurationError, "'lasso', 'l21', 'mean', 'mrn', 'mtrl'", {"kind": "ridge"}),
        (ConfigurationError, "strength", {"strength": -1.0}),
        (WrongTypeError, "strength", {"strength": "auto"}),
        (ConfigurationError, "has no ridge", {"ridge": 0.1}),
        (ConfigurationError, "has no shrinkage", {"kind": "mean", "shrinkage": 0.1}),
        (ConfigurationError, "has no update_steps", {"update_steps": 3}),
        (ConfigurationError, "shrinkage", {"kind": "mrn", "shrinkage": 1.0}),
        (ConfigurationError, "update_steps", {"kind": "mrn", "update_steps": 0}),
        (MissingArgumentError, "Pass optimizer=", {"optimizer": None}),
        (MissingArgumentError, "Pass optimizer=", {"kind": "mtrl", "optimizer": None}),
        (WrongTypeError, "torch.optim.Optimizer", {"optimizer": "sgd"}),
        (WrongTypeError, "nn.Module", {"model": 3}),
        (HeadNotFoundError, "haeds", {"heads": "haeds"}),
        (ConfigurationError, "'heads.a.weight'", {"optimizer": SGD([nn.Parameter(torch.ones(1))], lr=0.1)}),
        (ConfigurationError, "'heads.a.weight'", {"kind": "mean", "optimizer": SGD([nn.Parameter(torch.ones(1))])}),
    ],
)
def test_arguments(error: type[Exception], words: str, options: dict[str, Any]) -> None:
    model = linear_heads()
    optimizer = SGD(model.parameters(), lr=0.1)
    given = {"model": model, "heads": "heads", "kind": "lasso", "strength": 0.1, "optimizer": optimizer, **options}
    with pytest.raises(error) as caught:
        HeadPenalty(**given)
    assert words in str(caught.value)
    assert not optimizer._optimizer_step_post_hooks


def widths(task: str) -> int:
    return {"a": 4, "b": 5, "c": 4}[task]


class OwnHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2))


@pytest.mark.parametrize(
    ("kind", "error", "words", "make_head"),
    [
        ("l21", ShapeError, "kind='lasso'", lambda task: nn.Linear(widths(task), 1)),
        ("mean", ShapeError, "kind='lasso' or 'l21'", lambda task: nn.Linear(4, widths(task))),
        ("mrn", ShapeError, "heads.b.weight [5, 4]", lambda task: nn.Linear(4, widths(task))),
        ("l21", ConfigurationError, "groups=2", lambda task: nn.Conv1d(4, 4, 1, groups=2)),
        ("lasso", HeadNotFoundError, "no Linear or convolution", lambda task: nn.LayerNorm(4)),
        ("lasso", ConfigurationError, "begins with a GRU", lambda task: nn.Sequential(nn.GRU(4, 4), nn.Linear(4, 1))),
        ("lasso", ConfigurationError, "begins with a OwnHead", lambda task: OwnHead()),
        ("lasso", ConfigurationError, "LazyLinear", lambda task: nn.LazyLinear(1)),
        ("lasso", ConfigurationError, "no parameter", lambda task: weight_norm(nn.Linear(4, 1))),
        ("lasso", ConfigurationError, "frozen", lambda task: nn.Linear(4, 1).requires_grad_(False)),
    ],
)
def test_heads(kind: str, error: type[Exception], words: str, make_head: Any) -> None:
    with pytest.raises(error) as caught:
        make(Heads(make_head), kind)
    assert words in str(caught.value)


def test_weights_that_are_shared() -> None:
    model = linear_heads()
    model.heads["b"].weight = model.heads["a"].weight
    with pytest.raises(TaskError, match="share a weight"):
        make(model, "lasso")


def test_one_head_of_several_layers_or_outputs() -> None:
    model = nn.ModuleDict({"heads": nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))})
    with pytest.raises(ConfigurationError, match="'heads.0' .Linear., 'heads.2' .Linear."):
        make(model, "lasso")
    model = nn.ModuleDict({"heads": nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2)))})
    with pytest.raises(TaskError, match="6 outputs for 3 tasks.*columns="):
        make(model, "lasso", tasks=["a", "b", "c"])
    model = nn.ModuleDict({"heads": nn.Linear(4, 6)})
    with pytest.raises(ShapeError, match="the rows of 'a' 4"):
        make(model, "mean", columns={"a": slice(0, 4), "b": slice(4, 6)})
    make(model, "l21", columns={"a": slice(0, 4), "b": slice(4, 6)})


def test_rates_that_differ_or_are_none() -> None:
    model = linear_heads()
    groups = [{"params": list(head.parameters()), "lr": lr} for head, lr in zip(model.heads.values(), (0.1, 0.1, 0.2))]
    with pytest.raises(ConfigurationError, match=r"\[0.1, 0.2\].*kind='lasso'"):
        HeadPenalty(model, "heads", kind="l21", strength=0.1, optimizer=SGD(groups, lr=0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ConfigurationError, match="no learning rate"):
        HeadPenalty(model, "heads", kind="l21", strength=0.1, optimizer=optimizer)


def test_relations_of_a_kind_that_learns_none() -> None:
    penalty, _ = make(linear_heads(), "mean")
    assert penalty.covariance is None
    with pytest.raises(ConfigurationError, match="mtrl"):
        penalty.relations  # noqa: B018


def test_weights_that_were_replaced() -> None:
    model = linear_heads()
    penalty, optimizer = make(model, "lasso")
    model.heads["b"].weight = nn.Parameter(torch.ones(1, 7))
    with pytest.raises(ConfigurationError, match=r"'heads.b.weight' is a Parameter of shape \[1, 7\]"):
        penalty()
    model.heads["b"].weight = nn.Parameter(torch.ones(1, 4))
    assert float(penalty()) > 0.1 * 4
    with pytest.raises(ConfigurationError, match="does not have 'heads.b.weight'"):
        optimizer.step()


def sharded(rank: int, way: str) -> list[str]:
    """Refusals of a penalty that was built before the sharding, and of one that is built after it."""
    fsdp = torch.distributed.fsdp
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({task: nn.Linear(4, 2) for task in "ab"}))
    penalty = HeadPenalty(model, "1", kind="mean", strength=0.1)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    if way == "backbone":
        fsdp.fully_shard(model[0], mesh=mesh)
    elif way == "FSDP2":
        fsdp.fully_shard(model, mesh=mesh)
    else:
        model = fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=way == "FSDP1 orig")
    messages = []
    for call in (
        penalty,
        lambda: HeadPenalty(
            model, "1" if way in ("FSDP2", "backbone") else "_fsdp_wrapped_module.1", kind="mean", strength=0.1
        ),
    ):
        try:
            call()
        except ConfigurationError as error:
            messages.append(str(error))
    return messages


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="an older torch")
def test_sharded_heads_are_refused_and_a_sharded_backbone_is_not() -> None:
    for way in ("FSDP2", "FSDP1", "FSDP1 orig"):
        for messages in run_on_two_processes(sharded, way):
            assert len(messages) == 2, (way, messages)
            assert all("backbone alone" in message for message in messages), messages
    assert run_on_two_processes(sharded, "backbone") == [[], []]
