"""Padding does not enter."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.integrations.transformers import reference
from tests.integrations.transformers.tiny import HEADS, LENGTHS, batch, built, labels

from .support import CLOSE, assert_all_close, real, regularizer_of


@pytest.mark.parametrize("heads", [name for name in HEADS if name != "pooler"])
def test_hidden_states_of_padding_do_not_enter(heads: str) -> None:
    """Whatever they are: neither in losses and penalty, nor in the gradients of the heads."""
    inputs, own = batch(), labels(HEADS[heads])
    gone = (inputs["attention_mask"] == 0)[..., None]
    found = []
    for value in (None, 1e6, math.nan, math.inf):
        model = built(heads)

        def fill(module: nn.Module, args: Any, output: Any, value: float | None = value) -> Any:
            if value is not None:
                output.last_hidden_state = output.last_hidden_state.masked_fill(gone, value)
            return output

        model.encoder.register_forward_hook(fill)
        regularizer = regularizer_of(model)
        output = model(**inputs, labels=own)
        total = output.loss + regularizer()
        assert total.isfinite()
        grads = torch.autograd.grad(total, list(model.heads.parameters()), allow_unused=True)
        found.append(
            [total, *(grad for grad in grads if grad is not None), *real(model, output.logits, inputs).values()]
        )
    for other in found[1:]:
        assert len(other) == len(found[0])
        for one, two in zip(other, found[0]):
            torch.testing.assert_close(one, two, **CLOSE)


@pytest.mark.parametrize("heads", HEADS)
def test_words_behind_the_end_do_not_enter(heads: str) -> None:
    model, inputs, own = built(heads), batch(), labels(HEADS[heads])
    gone = inputs["attention_mask"] == 0
    assert inputs["input_ids"][gone].any()
    found = []
    for ids in (inputs["input_ids"], inputs["input_ids"].masked_fill(gone, 0)):
        with regularizer_of(model) as regularizer:
            output = model(input_ids=ids, attention_mask=inputs["attention_mask"], labels=own)
            found.append([output.loss, regularizer(), *real(model, output.logits, inputs).values()])
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, **CLOSE)


def test_without_a_mask_every_token_counts() -> None:
    for heads in ("mean", "mixed"):
        model, inputs = built(heads), batch()
        with regularizer_of(model) as regularizer:
            logits = model(input_ids=inputs["input_ids"]).logits
            found = regularizer()
        everything = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        assert_all_close(logits, reference.padded_logits(model, everything))
        torch.testing.assert_close(found, reference.penalty(model, everything), **CLOSE)


def test_a_mask_by_hand_takes_precedence() -> None:
    model, inputs = built("mixed"), batch()
    mask = inputs["attention_mask"].bool()
    mask[:, 0] = False  # what a tokenizer puts in front
    with regularizer_of(model) as regularizer:
        model(**inputs)
        found = regularizer(mask=mask).item()
    expected = 0.0
    for text in reference.alone(inputs):
        feature, logits = reference.at_feature(model, text)
        rows = [
            torch.autograd.grad(reference.scalar(own, model.head_configs[task].problem), feature, retain_graph=True)[0][
                0, 1:
            ].mean(0)
            for task, own in logits.items()
        ]
        expected += sum((one - two).abs().sum().item() for one, two in itertools.combinations(rows, 2)) / len(LENGTHS)
    assert math.isclose(found, expected, rel_tol=1e-10)
