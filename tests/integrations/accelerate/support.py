"""A small training with Hugging Face accelerate."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from saliency_reg.integrations.accelerate import register
from tests.support.training import Net, batch, make_model

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


def prepared(
    accelerator: Any, way: str, wrapped: bool, **options: Any
) -> tuple[nn.Module, Any, SaliencyRegularizer, Net]:
    """Model and optimizer of accelerate, and a regularizer that came to them in one of the ways."""
    plain_model, plain_optimizer = make_model()

    def build(model: nn.Module, optimizer: Any = None) -> SaliencyRegularizer:
        return SaliencyRegularizer(model, "heads", strength=0.5, optimizer=optimizer, **{"metric": "l1", **options})

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
