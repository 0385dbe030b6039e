"""Saving, loading and going on equals never having stopped, bit for bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer
from tests.support.training import assert_same_state, batch, make_model, train


def build(rule: str, seed: int = 0):
    model, optimizer = make_model(seed)
    relations = RelationWeights(3, rule, learning_rate=0.5 if rule == "projected" else 1e-3)
    regularizer = SaliencyRegularizer(
        model, strength=0.2, relations=relations, optimizer=optimizer, start_step=2, warmup_steps=10, metric="l1"
    )
    return model, optimizer, regularizer


@pytest.mark.parametrize("rule", ["entropic", "per_task", "projected", "authors", "fixed"])
def test_resumed_training_is_the_uninterrupted_one(rule: str) -> None:
    model, optimizer, regularizer = build(rule)
    train(model, optimizer, range(8), regularizer)
    checkpoint = io.BytesIO()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "regularizer": regularizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(state, checkpoint)
    expected = train(model, optimizer, range(8, 16), regularizer)

    resumed, resumed_optimizer, resumed_regularizer = build(rule, seed=99)
    checkpoint.seek(0)
    loaded = torch.load(checkpoint, weights_only=True)
    resumed.load_state_dict(loaded["model"])
    resumed_optimizer.load_state_dict(loaded["optimizer"])
    resumed_regularizer.load_state_dict(loaded["regularizer"])
    torch.set_rng_state(loaded["random"])
    found = train(resumed, resumed_optimizer, range(8, 16), resumed_regularizer)

    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert_same_state(resumed, model)
    assert_same_state(resumed_regularizer, regularizer)
    assert resumed_regularizer.current_strength == regularizer.current_strength


def test_a_checkpoint_between_micro_batches_keeps_their_distances() -> None:
    model, _, regularizer = build("entropic")
    model(batch(0)[0])
    regularizer()
    twin_model, _, twin = build("entropic")
    twin.load_state_dict(regularizer.state_dict())
    regularizer.step()
    twin.step()
    assert torch.equal(twin.relations.matrix(), regularizer.relations.matrix())
    assert not torch.equal(twin.relations.matrix(), RelationWeights(3).matrix())
    del twin_model


def test_state_holds_tensors_only_and_no_parameters() -> None:
    _, _, regularizer = build("entropic")
    state = regularizer.state_dict()
    assert set(state) == {
        "task_names",
        "steps",
        "steps_as_float",
        "saliency_seen",
        "sampler.calls",
        "sampler.seed_in_use",
        "relations.running_distances",
        "relations.running_weights",
        "relations.updates",
        "pending.distances",
        "pending.samples",
    }
    assert all(isinstance(value, Tensor) for value in state.values())
    assert list(regularizer.parameters()) == []


class MayDie(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu() ** 2)


@pytest.mark.parametrize("way", ["state", "state within a model"])
def test_a_head_that_dies_later_is_compared_alike_by_a_resumed_run(way: str) -> None:
    """Zero is a saliency of a head that had another one, and it is not told."""

    def make() -> tuple[nn.ModuleDict, torch.optim.Optimizer, SaliencyRegularizer]:
        torch.manual_seed(0)
        heads = nn.ModuleDict({"a": MayDie(), "b": MayDie(), "c": MayDie()})
        model = nn.ModuleDict({"backbone": nn.Linear(5, 6), "heads": heads}).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        return model, optimizer, SaliencyRegularizer(model, "heads", strength=0.1, optimizer=optimizer, metric="l1")

    def run(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, own: SaliencyRegularizer, steps: range) -> list:
        reports = []
        for step in steps:
            if step == 4:
                nn.init.constant_(model["heads"]["c"].first.bias, -100.0)
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            feature = model["backbone"](x)
            loss = sum(head(feature).square().mean() for head in model["heads"].values())
            optimizer.zero_grad()
            (loss + own()).backward()
            optimizer.step()
            reports.append(own.report.distances)
        return reports

    first = make()
    run(*first, range(4))
    saved = [copy.deepcopy(own.state_dict()) for own in first]
    expected = run(*first, range(4, 8))
    again = make()
    if way == "state":
        again[2].load_state_dict(saved[2])
    else:
        again[0].regularizer = again[2]
        saved[0].update({f"regularizer.{name}": value for name, value in saved[2].items()})
    again[0].load_state_dict(saved[0])
    again[1].load_state_dict(saved[1])
    found = run(*again, range(4, 8))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert not torch.stack(found).isnan().any()
    assert_same_state(again[2], first[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_changing_formats_does_not_change_state(dtype: torch.dtype) -> None:
    model, optimizer, regularizer = build("entropic")
    train(model, optimizer, range(3), regularizer)
    before = {name: value.clone() for name, value in regularizer.state_dict().items()}
    regularizer.to(dtype)
    for name, value in regularizer.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
