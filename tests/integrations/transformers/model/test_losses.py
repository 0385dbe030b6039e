"""Losses of tasks with missing labels are those of a loop over labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saliency_reg.integrations.transformers import HeadConfig
from saliency_reg.integrations.transformers.model.losses import known_labels, losses_per_sample, task_loss, zero_loss
from tests.integrations.transformers.reference import label_losses
from tests.integrations.transformers.tiny import LENGTHS
from tests.integrations.transformers.tiny import labels as some_labels

HEADS = [
    HeadConfig(level=level, num_labels=outputs, problem=problem)
    for level in ("sequence", "token")
    for outputs, problem in [
        (1, "binary"),
        (1, "multi_label"),
        (3, "multi_label"),
        (2, "single_label"),
        (5, "single_label"),
        (1, "regression"),
        (2, "regression"),
    ]
]


def some_logits(head: HeadConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = [len(LENGTHS), max(LENGTHS)][: 2 if head.level == "token" else 1]
    shape += [head.num_labels] if head.num_labels > 1 else []
    return 3 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("missing", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head.level}-{head.problem}-{head.num_labels}")
def test_the_loss_is_the_loop(head: HeadConfig, missing: float) -> None:
    logits = some_logits(head).requires_grad_()
    own = some_labels({"a": head}, missing=missing)["a"]
    loop = label_losses(head, logits, own)
    everything = [loss for sample in loop for loss in sample]
    assert (len(everything) == 1) == (missing == 1.0)
    total, known = task_loss("a", head, logits, own)
    assert int(known) == len(everything)
    expected = sum(everything, start=torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-10, atol=1e-10)
    by_sample = losses_per_sample("a", head, logits, own)
    assert by_sample.shape == (len(LENGTHS),)
    for sample, losses in enumerate(loop):
        mean = sum(loss.item() for loss in losses) / max(len(losses), 1)
        assert math.isclose(by_sample[sample].item(), mean, rel_tol=1e-10, abs_tol=1e-10)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32],
)
def test_number_formats_of_labels(dtype: torch.dtype) -> None:
    head = HeadConfig()
    logits = some_logits(head)
    values = torch.tensor([1, 0, 1])
    expected, _ = task_loss("a", head, logits, values.double())
    total, known = task_loss("a", head, logits, values.to(dtype))
    assert int(known) == 3
    torch.testing.assert_close(total, expected, rtol=0, atol=0)
    if dtype not in (torch.bool, torch.uint8):
        total, known = task_loss("a", head, logits, torch.tensor([1, -100, 1]).to(dtype))
        assert int(known) == 2
        torch.testing.assert_close(total, task_loss("a", head, logits, torch.tensor([1.0, math.nan, 1.0]))[0])


def test_no_class_is_taken_for_a_missing_label() -> None:
    """As an unsigned byte -100 is 156."""
    classes = torch.tensor([156, 155, 3], dtype=torch.uint8)
    assert known_labels(classes).all()
    head, logits = HeadConfig(200), torch.randn(3, 200, dtype=torch.float64)
    found, known = task_loss("a", head, logits, classes)
    assert int(known) == 3
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, classes.long(), reduction="sum"))


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head.level}-{head.problem}-{head.num_labels}")
def test_a_column_of_labels(head: HeadConfig) -> None:
    logits, own = some_logits(head), some_labels({"a": head})["a"]
    for found, expected in zip(task_loss("a", head, logits, own[..., None]), task_loss("a", head, logits, own)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_in_float32(dtype: torch.dtype) -> None:
    for head in HEADS:
        logits, own = some_logits(head, torch.float32).to(dtype), some_labels({"a": head})["a"]
        total, _ = task_loss("a", head, logits, own)
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, task_loss("a", head, logits.float(), own)[0], rtol=0, atol=0)


def test_what_a_missing_label_is_beside_does_not_enter() -> None:
    """Not even logits that are not finite."""
    for head in HEADS:
        logits, own = some_logits(head), some_labels({"a": head}, missing=0.5)["a"]
        known = known_labels(own)
        gone = ~known if known.shape == logits.shape else ~known[..., None]
        for value in (math.nan, math.inf, 1e300):
            found, _ = task_loss("a", head, logits.masked_fill(gone, value), own)
            torch.testing.assert_close(found, task_loss("a", head, logits, own)[0], rtol=0, atol=0)


def test_zero_loss() -> None:
    logits = {"a": torch.randn(3, requires_grad=True), "b": torch.randn(3, 2, requires_grad=True)}
    loss = zero_loss(logits)
    assert (loss.item(), loss.ndim) == (0, 0)
    loss.backward()
    for own in logits.values():
        assert not own.grad.any()
