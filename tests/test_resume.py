"""Saving, loading and going on equals never having stopped, bit for bit."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from saliency_reg import RelationWeights, SaliencyRegularizer

from .training import assert_same_state, batch, make_model, train


def build(rule: str, seed: int = 0):
    model, optimizer = make_model(seed)
    relations = RelationWeights(3, rule, learning_rate=0.5 if rule == "projected" else 1e-3)
    regularizer = SaliencyRegularizer(
        model, strength=0.2, relations=relations, optimizer=optimizer, start_step=2, warmup_steps=10
    )
    return model, optimizer, regularizer


@pytest.mark.parametrize("rule", ["entropic", "projected", "authors", "fixed"])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_changing_formats_does_not_change_state(dtype: torch.dtype) -> None:
    model, optimizer, regularizer = build("entropic")
    train(model, optimizer, range(3), regularizer)
    before = {name: value.clone() for name, value in regularizer.state_dict().items()}
    regularizer.to(dtype)
    for name, value in regularizer.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
