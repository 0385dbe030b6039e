"""Tasks that run, and labels that are there."""

from __future__ import annotations

import pytest
import torch

from saliency_reg.integrations.transformers import MultiTaskOutput
from tests.integrations.transformers import reference
from tests.integrations.transformers.tiny import HEADS, batch, built, labels

from .support import CLOSE, assert_all_close, regularizer_of


@pytest.mark.parametrize("heads", ["mean", "mixed"])
def test_the_order_of_the_heads_does_not_matter(heads: str) -> None:
    inputs, own = batch(), labels(HEADS[heads])
    model = built(heads)
    other = built(dict(reversed(HEADS[heads].items())), seed=5)
    other.load_state_dict(model.state_dict())
    assert other.tasks == model.tasks[::-1]
    found = []
    for each in (model, other):
        with regularizer_of(each) as regularizer:
            output = each(**inputs, labels=dict(reversed(own.items())))
            assert tuple(output.losses) == each.tasks
            found.append((output, regularizer()))
    (one, penalty), (two, other_penalty) = found
    torch.testing.assert_close(one.loss, two.loss, **CLOSE)
    torch.testing.assert_close(penalty, other_penalty, **CLOSE)
    assert_all_close(one.logits, {task: two.logits[task] for task in one.logits})


@pytest.mark.parametrize("heads", ["mean", "token", "poolings"])
def test_a_batch_is_its_samples(heads: str) -> None:
    """The penalty of a batch is the mean of those of its samples, in any order; so is a loss without gaps."""
    model, inputs, own = built(heads), batch(), labels(HEADS[heads], missing=0.0)
    found = {}
    with regularizer_of(model) as regularizer:
        for rows in ([0, 1, 2], [2, 0, 1], [0], [1], [2]):
            part = {task: value[rows] for task, value in own.items()}
            output = model(**{name: value[rows] for name, value in inputs.items()}, labels=part)
            losses = model.sample_losses(output.logits, part)
            found[tuple(rows)] = [regularizer(), *(losses[task].mean() for task in model.tasks)]
    whole = found[0, 1, 2]
    for index, value in enumerate(whole):
        torch.testing.assert_close(found[2, 0, 1][index], value, **CLOSE)
        torch.testing.assert_close(sum(found[row,][index] for row in range(3)) / 3, value, **CLOSE)


@pytest.mark.parametrize("heads", ["mean", "mixed"])
def test_tasks_runs_those_heads_alone(heads: str) -> None:
    model, inputs, own = built(heads), batch(), labels(HEADS[heads])
    ran: list[str] = []
    for task, head in model.heads.items():
        head.register_forward_hook(lambda *_, task=task: ran.append(task))
    whole = model(**inputs).logits
    assert ran == list(model.tasks)
    first, second, third = model.tasks[:3]
    with regularizer_of(model) as regularizer:
        for given, chosen in (([third, first], (first, third)), ((second,), (second,)), (second, (second,))):
            ran.clear()
            output = model(**inputs, tasks=given, labels={chosen[0]: own[chosen[0]]})
            assert tuple(ran) == chosen == tuple(output.logits)
            assert_all_close(output.logits, {task: whole[task] for task in chosen})
            assert list(output.losses) == [chosen[0]]
            expected = reference.penalty(model, inputs, chosen)
            torch.testing.assert_close(regularizer().double(), expected, **CLOSE)


def test_a_task_without_labels_has_no_loss_but_its_head_runs() -> None:
    model, inputs, own = built(), batch(), labels(HEADS["mean"])
    everything = model(**inputs, labels=own)
    for left_out in ({"topic": None}, {"topic": torch.full((3,), -100)}):
        output = model(**inputs, labels={**own, **left_out})
        assert list(output.losses) == ["joy", "tags", "age", "place"]
        assert_all_close(output.logits, everything.logits)
        expected = everything.loss - 2.0 * everything.losses["topic"]
        torch.testing.assert_close(output.loss, expected, **CLOSE)
        output.loss.backward()
        assert all(parameter.grad is None for parameter in model.heads["topic"].parameters())
        assert all(parameter.grad is not None for parameter in model.heads["joy"].parameters())
        model.zero_grad()
    alone = model(**inputs, labels={"age": own["age"]})
    torch.testing.assert_close(alone.loss, everything.losses["age"], **CLOSE)


@pytest.mark.parametrize("heads", ["mean", "mixed"])
def test_all_labels_missing(heads: str) -> None:
    model, inputs = built(heads), batch()
    missing = {task: torch.full_like(own, -100) for task, own in labels(HEADS[heads]).items()}
    output = model(**inputs, labels=missing)
    assert (output.loss.item(), output.losses) == (0, {})
    output.loss.backward()
    assert all(not parameter.grad.any() for parameter in model.heads.parameters())
    model.zero_grad()
    with regularizer_of(model) as regularizer:
        loss = model(**inputs, labels=missing).loss + regularizer()
        loss.backward()
        assert loss.item() > 0
    assert any(parameter.grad.any() for parameter in model.heads.parameters())


def test_without_labels_there_is_no_loss() -> None:
    output = built()(**batch())
    assert isinstance(output, MultiTaskOutput)
    assert (output.loss, output.losses, output.hidden_states, output.attentions) == (None, None, None, None)
    assert list(output.keys()) == ["logits"]


def test_what_is_returned() -> None:
    model, inputs, own = built("mixed"), batch(), labels(HEADS["mixed"])
    output = model(**inputs, labels=own, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    plain = model.encoder(**inputs)
    torch.testing.assert_close(output.hidden_states[-1], plain.last_hidden_state, **CLOSE)
    loss, logits, losses = model(**inputs, labels=own, return_dict=False)
    torch.testing.assert_close(loss, output.loss, **CLOSE)
    assert_all_close(logits, output.logits)
    assert_all_close(losses, output.losses)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def test_losses_of_a_model_in_half_precision_are_in_float32() -> None:
    for heads in ("mean", "token"):
        model, inputs, own = built(heads).bfloat16(), batch(), labels(HEADS[heads])
        output = model(**inputs, labels=own)
        assert {value.dtype for value in output.logits.values()} == {torch.bfloat16}
        assert {value.dtype for value in (output.loss, *output.losses.values())} == {torch.float32}
        logits = {task: value.float() for task, value in output.logits.items()}
        for task, loss in reference.task_losses(model, logits, own).items():
            torch.testing.assert_close(output.losses[task].double(), loss.double(), rtol=1e-5, atol=1e-5)
