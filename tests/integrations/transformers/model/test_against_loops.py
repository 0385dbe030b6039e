"""A multi-task model against loops over texts and tasks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saliency_reg.integrations.transformers import HeadConfig
from saliency_reg.integrations.transformers.model.pooling import SequencePooling
from tests.integrations.transformers import reference
from tests.integrations.transformers.tiny import ENCODERS, HEADS, LENGTHS, batch, built, labels
from tests.support.attachment import is_clean

from .support import CLOSE, assert_all_close, real, regularizer_of


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if own is None else own for (name, p), own in zip(parameters.items(), found)}


@pytest.mark.parametrize(
    ("heads", "side"),
    # BERT's own pooler reads the first position, padding or not.
    [(heads, side) for heads in HEADS for side in ("right", "left") if (heads, side) != ("pooler", "left")],
)
def test_a_text_in_a_batch_has_the_logits_that_it_has_alone(heads: str, side: str) -> None:
    model, inputs = built(heads), batch(side=side)
    found = model(**inputs).logits
    shapes = {
        task: [3, *([7] if head.level == "token" else []), *([head.num_labels] if head.num_labels > 1 else [])]
        for task, head in HEADS[heads].items()
    }
    assert {task: list(own.shape) for task, own in found.items()} == shapes
    assert_all_close(real(model, found, inputs), reference.padded_logits(model, inputs))


@pytest.mark.parametrize("heads", HEADS)
def test_losses_penalty_and_gradients_are_the_loop(heads: str) -> None:
    model, inputs, own = built(heads), batch(), labels(HEADS[heads])
    logits = reference.padded_logits(model, inputs)
    losses = reference.task_losses(model, logits, own)
    loss, penalty = reference.weighted(model, losses), reference.penalty(model, inputs)
    assert penalty.item() > 1e-3
    with regularizer_of(model) as regularizer:
        output = model(**inputs, labels=own)
        found = regularizer()
    assert_all_close(output.losses, losses)
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    torch.testing.assert_close(found, penalty, **CLOSE)
    assert_all_close(gradients(model, output.loss + found), gradients(model, loss + penalty))
    assert is_clean(model)


@pytest.mark.parametrize("heads", ["mean", "token", "mixed"])
def test_losses_of_samples_are_the_loop(heads: str) -> None:
    model, inputs, own = built(heads), batch(), labels(HEADS[heads], missing=0.6)
    logits = model(**inputs).logits
    found = model.sample_losses(logits, own)
    assert list(found) == list(HEADS[heads])
    for task, losses in found.items():
        for sample, loop in enumerate(reference.label_losses(HEADS[heads][task], logits[task], own[task])):
            mean = sum(loss.item() for loss in loop) / max(len(loop), 1)
            assert math.isclose(losses[sample].item(), mean, rel_tol=1e-10, abs_tol=1e-10)


@pytest.mark.parametrize("heads", ["mean", "mixed"])
def test_saliencies_of_losses_are_the_loop(heads: str) -> None:
    model, inputs, own = built(heads), batch(), labels(HEADS[heads], missing=0.0)
    with regularizer_of(model, target="loss") as regularizer:
        output = model(**inputs, labels=own)
        found = regularizer(losses=model.sample_losses(output.logits, own))
    expected = 0.0
    for sample, text in enumerate(reference.alone(inputs)):
        feature, logits = reference.at_feature(model, text)
        saliencies = []
        for task, head in HEADS[heads].items():
            logit = logits[task].squeeze(-1) if head.num_labels == 1 else logits[task]
            label = own[task][sample : sample + 1]
            label = label[:, : LENGTHS[sample]] if head.level == "token" else label
            (loop,) = reference.label_losses(head, logit, label)
            (gradient,) = torch.autograd.grad(sum(loop[1:], start=loop[0]) / len(loop), feature, retain_graph=True)
            saliencies.append(gradient[0] if gradient.ndim == 2 else gradient[0].mean(0))
        expected += sum(float((one - two).abs().sum()) for one, two in itertools.combinations(saliencies, 2)) / 3
    assert expected > 1e-3
    assert math.isclose(found.item(), expected, rel_tol=1e-10)


@pytest.mark.parametrize("encoder", ["distilbert", "t5"])
@pytest.mark.parametrize("heads", ["mean", "mixed"])
def test_other_encoders_are_the_loop(encoder: str, heads: str) -> None:
    model, inputs, own = built(heads, ENCODERS[encoder]()), batch(), labels(HEADS[heads])
    losses = reference.task_losses(model, reference.padded_logits(model, inputs), own)
    with regularizer_of(model) as regularizer:
        output = model(**inputs, labels=own)
        torch.testing.assert_close(regularizer(), reference.penalty(model, inputs), **CLOSE)
    assert_all_close(output.losses, losses)


def test_options_reach_the_regularizer() -> None:
    model, inputs = built("mixed"), batch()
    mean: list[float] = []
    last: list[float] = []
    for found, options in ((mean, {"pool": "sum"}), (last, {"metric": "sqeuclidean", "reduction": "sum"})):
        with regularizer_of(model, **options) as regularizer:
            model(**inputs)
            found.append(regularizer().item())
            assert (regularizer.metric, regularizer.reduction) == (
                options.get("metric", "l1"),
                options.get("reduction", "mean"),
            )
    sums = squares = 0.0
    for text in reference.alone(inputs):
        feature, logits = reference.at_feature(model, text)
        rows = [
            torch.autograd.grad(reference.scalar(own, model.head_configs[task].problem), feature, retain_graph=True)[0][
                0
            ]
            for task, own in logits.items()
        ]
        for one, two in itertools.combinations(rows, 2):
            sums += (one.sum(0) - two.sum(0)).abs().sum().item() / len(LENGTHS)
            squares += (one.mean(0) - two.mean(0)).square().sum().item()
    assert math.isclose(mean[0], sums, rel_tol=1e-10)
    assert math.isclose(last[0], squares, rel_tol=1e-10)


@pytest.mark.parametrize("choice", ["auto", "max", "logsumexp", "sum"])
def test_one_value_at_each_token_is_no_class(choice: str) -> None:
    """``[B, L]`` of a token head is not ``[B, K]``."""
    heads = {"a": HeadConfig(level="token", hidden=(8,)), "b": HeadConfig(3, level="token", hidden=(8,))}
    model, inputs = built(heads), batch()
    classes: Callable[[Tensor], Tensor] = {
        "auto": lambda own: own.amax(-1) - own.mean(-1),
        "max": lambda own: own.amax(-1),
        "logsumexp": lambda own: own.logsumexp(-1),
        "sum": lambda own: own.sum(-1),
    }[choice]
    expected = 0.0
    for text in reference.alone(inputs):
        feature, logits = reference.at_feature(model, text)
        one, two = (
            torch.autograd.grad(value.sum(), feature, retain_graph=True)[0][0].mean(0)
            for value in (logits["a"], classes(logits["b"]))
        )
        expected += (one - two).abs().sum().item() / len(LENGTHS)
    with regularizer_of(model, scalarize=choice) as regularizer:
        model(**inputs)
        assert math.isclose(regularizer().item(), expected, rel_tol=1e-10)
    for given in ({"a": "sum", "b": choice}, {"b": choice}):
        with regularizer_of(model, scalarize=given) as regularizer:
            model(**inputs)
            assert math.isclose(regularizer().item(), expected, rel_tol=1e-10)


@pytest.mark.parametrize("kind", ["mean", "first", "last"])
def test_poolings_are_the_loop(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, 3, dtype=torch.float64, generator=generator)
    masks = {
        "right": torch.arange(5) < torch.tensor([5, 1, 2, 3, 4, 5])[:, None],
        "left": torch.arange(5) >= torch.tensor([0, 4, 3, 2, 1, 0])[:, None],
        "holes": torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0]]).bool().repeat(2, 1),
        "nothing real": torch.zeros(6, 5).bool(),
    }
    pooling = SequencePooling(kind)
    torch.testing.assert_close(pooling(hidden), reference.pooled(kind, hidden), **CLOSE)
    for mask in masks.values():
        filled = hidden.masked_fill(~mask[..., None], math.nan).requires_grad_()
        found = pooling(filled, mask)
        torch.testing.assert_close(found, reference.pooled(kind, hidden, mask), **CLOSE)
        (gradient,) = torch.autograd.grad(found.sum(), filled)
        assert not gradient[~mask].any()  # which NaN would not pass


def test_passing_on() -> None:
    hidden, pooler, mask = torch.randn(2, 3, 4), torch.randn(2, 4), torch.tensor([[True, True, False]] * 2)
    assert SequencePooling("none")(hidden) is hidden
    assert SequencePooling("pooler")(hidden, mask, pooler) is pooler
    found = SequencePooling("none")(hidden.masked_fill(~mask[..., None], math.nan), mask)
    assert torch.equal(found[:, :2], hidden[:, :2])
    assert not found[:, 2].any()
