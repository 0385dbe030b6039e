"""Multi-task models over an encoder: logits, losses, padding, and the penalty, against loops over single texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from saliency_reg.integrations.transformers import HeadConfig, MultiTaskCollator, MultiTaskModel, MultiTaskOutput
from saliency_reg.integrations.transformers.model.pooling import SequencePooling
from tests.integrations.timm.reference import is_clean, uniform
from tests.integrations.transformers import reference
from tests.integrations.transformers.tiny import (
    ENCODERS,
    HEADS,
    LENGTHS,
    VOCABULARY,
    batch,
    bert,
    built,
    distilbert,
    gpt2,
    labels,
    t5,
    tokenizer,
    vit,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
#: Of names that transformers is about to give up, in its own code as well.
deprecated = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def regularizer_of(model: Any, **options: Any) -> SaliencyRegularizer:
    return model.regularizer(**{"strength": 1.0, "relations": uniform(len(model.tasks)), **options})


def real(model: Any, logits: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With zeros at padding."""
    gone = inputs["attention_mask"] == 0
    found = {}
    for task, own in logits.items():
        if model.head_configs[task].level == "token":
            own = own.masked_fill(gone if own.ndim == 2 else gone[..., None], 0)
        found[task] = own
    return found


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if own is None else own for (name, p), own in zip(parameters.items(), found)}


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# Against loops.


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


# Padding.


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


# Tasks and labels.


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


# Encoders.


def test_a_pretrained_encoder_is_kept() -> None:
    for whole in (transformers.BertModel(bert()), transformers.BertForSequenceClassification(bert(num_labels=3))):
        for parameter in whole.parameters():
            nn.init.normal_(parameter)
        whole.double()
        before = {name: value.clone() for name, value in whole.base_model.state_dict().items()}
        model = MultiTaskModel.from_encoder(whole, HEADS["mean"])
        assert model.encoder is whole.base_model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
        assert not [name for name, _ in model.named_parameters() if "classifier" in name]


def test_a_folder_as_the_encoder(tmp_path: Path) -> None:
    whole = transformers.BertForSequenceClassification(bert(num_labels=3)).eval()
    whole.save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        model = MultiTaskModel.from_encoder(folder, ["a"], attn_implementation="eager", dtype=torch.float64).eval()
        assert (model.dtype, model.heads["a"].layers[-1].weight.dtype) == (torch.float64, torch.float64)
        inputs = batch()
        expected = whole.double().bert(**inputs).last_hidden_state
        torch.testing.assert_close(model.encoder(**inputs).last_hidden_state, expected, **CLOSE)


def test_new_heads_begin_as_the_encoder_does() -> None:
    model = MultiTaskModel.from_encoder(bert(initializer_range=0.05), {"a": HeadConfig(hidden=(200, 200))})
    first, second, last = (layer for layer in model.heads["a"].layers if isinstance(layer, nn.Linear))
    for layer in (first, second):
        assert layer.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert not any(layer.bias.any() for layer in (first, second, last))


def test_a_decoder_pools_its_last_token() -> None:
    """Of each text, on whatever side the padding is."""
    model = built({"joy": 1, "topic": 4}, gpt2(), head=HeadConfig(hidden=(8,)))
    assert model.pooling.kind == "last"
    for side in ("right", "left"):
        inputs = batch(side=side)
        found = model(**inputs).logits
        for sample, text in enumerate(reference.alone(inputs)):
            hidden = model.encoder(**text).last_hidden_state[:, -1]
            for task, logits in found.items():
                expected = model.heads[task].layers(hidden).flatten()
                torch.testing.assert_close(logits[sample].flatten(), expected, **CLOSE)


def test_the_encoder_of_an_encoder_decoder() -> None:
    whole = transformers.T5Model(t5()).double().eval()
    for given in (whole, transformers.T5ForConditionalGeneration(t5()), t5()):
        model = MultiTaskModel.from_encoder(given, ["a", "b"])
        assert type(model.encoder).__name__ == "T5Stack"
        assert model.config.encoder_part == "encoder"
        assert not [name for name, _ in model.named_parameters() if "decoder" in name]
    model = MultiTaskModel.from_encoder(whole, ["a", "b"])
    inputs = batch()
    pooled = reference.pooled("mean", whole.encoder(**inputs).last_hidden_state, inputs["attention_mask"])
    torch.testing.assert_close(model(**inputs).logits["a"], model.heads["a"].layers(pooled)[:, 0], **CLOSE)


@pytest.mark.parametrize("pooling", ["auto", "first", "pooler"])
def test_images(pooling: str) -> None:
    model = built({"joy": 1, "topic": 4}, vit(), head=HeadConfig(hidden=(8,), pooling=pooling))
    assert model.main_input_name == "pixel_values"
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    output = model.encoder(images)
    hidden = output.last_hidden_state
    pooled = {"auto": hidden.mean(1), "first": hidden[:, 0], "pooler": output.pooler_output}[pooling]
    with regularizer_of(model) as regularizer:
        logits = model(pixel_values=images).logits
        assert regularizer().item() > 0
    torch.testing.assert_close(logits["topic"], model.heads["topic"].layers(pooled), **CLOSE)


def test_patches_as_tokens() -> None:
    model = built({"part": HeadConfig(2, level="token"), "real": HeadConfig(level="token")}, vit())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    output = model(pixel_values=images, labels={"part": torch.tensor([[-100, 0, 1, 1, 0]] * 2)})
    assert {task: list(own.shape) for task, own in output.logits.items()} == {"part": [2, 5, 2], "real": [2, 5]}
    expected = reference.task_losses(model, output.logits, {"part": torch.tensor([[-100, 0, 1, 1, 0]] * 2)})
    torch.testing.assert_close(output.loss, expected["part"], **CLOSE)


def test_token_types_are_kept_from_an_encoder_without_them() -> None:
    inputs = batch()
    types = torch.ones_like(inputs["input_ids"])
    for config in (distilbert(), t5()):
        model = built(encoder=config)
        assert_all_close(model(**inputs, token_type_ids=types).logits, model(**inputs).logits)
    model = built()  # BERT reads them
    changed = model(**inputs, token_type_ids=types).logits["joy"] - model(**inputs).logits["joy"]
    assert changed.abs().min() > 1e-6


def test_embeddings_in_place_of_ids() -> None:
    model, inputs = built("mixed"), batch()
    expected = model(**inputs).logits
    vectors = model.get_input_embeddings()(inputs["input_ids"])
    assert_all_close(model(inputs_embeds=vectors, attention_mask=inputs["attention_mask"]).logits, expected)
    other = nn.Embedding(VOCABULARY, 16).double()
    model.set_input_embeddings(other)
    assert model.encoder.embeddings.word_embeddings is other


def test_the_attention_implementation_reaches_the_encoder() -> None:
    inputs = batch()
    for name in ("eager", "sdpa"):
        model = built("mixed", bert(attn_implementation=name))
        found = (model.config._attn_implementation, model.encoder.config._attn_implementation)
        assert found == (name, name)
    expected = model(**inputs).logits
    assert model(**inputs, output_hidden_states=True).hidden_states is not None
    model.set_attn_implementation("eager")
    assert model.encoder.config._attn_implementation == "eager"
    assert model(**inputs, output_attentions=True).attentions[0].shape == (3, 2, 7, 7)
    assert_all_close(real(model, model(**inputs).logits, inputs), real(model, expected, inputs))


@deprecated
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning", "ignore:None of the inputs:UserWarning")
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("heads", ["mean", "mixed"])
def test_gradient_checkpointing_gives_the_same_gradients(heads: str, options: dict[str, bool] | None) -> None:
    inputs, own = batch(), labels(HEADS[heads])
    model = built(heads).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(options)
            assert any(getattr(part, "gradient_checkpointing", False) for part in model.encoder.modules())
            assert model.is_gradient_checkpointing
        runs: list[int] = []
        handle = model.encoder.encoder.layer[0].intermediate.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        with regularizer_of(model) as regularizer:
            (model(**inputs, labels=own).loss + regularizer()).backward()
        handle.remove()
        assert len(runs) == (2 if checkpointing else 1)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert_all_close(found[1], found[0])


def test_options_of_heads_reach_the_layers() -> None:
    heads = {"a": HeadConfig(dropout=0.5), "b": HeadConfig(hidden=(8, 4), activation="relu"), "c": HeadConfig(2)}
    model = MultiTaskModel.from_encoder(bert(classifier_dropout=0.25), heads)
    assert [module.p for module in model.heads.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.25, 0.25, 0.25]
    names = [type(module).__name__ for module in model.heads["b"].layers]
    assert names == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]


def test_numbers_of_labels_fill_up_the_default() -> None:
    import numpy

    model = MultiTaskModel.from_encoder(bert(), {"a": 1, "b": numpy.int64(3)}, head=HeadConfig(hidden=(4,)))
    assert {task: head.problem for task, head in model.head_configs.items()} == {"a": "binary", "b": "single_label"}
    assert all(head.hidden == (4,) for head in model.head_configs.values())
    tags = HeadConfig(2, problem="multi_label")
    model = MultiTaskModel.from_encoder(bert(), {"a": 1, "b": 3}, head=tags)
    assert {head.problem for head in model.head_configs.values()} == {"multi_label"}


# Trainer.


def test_evaluating_with_a_plain_trainer(tmp_path: Path) -> None:
    """Of examples of two data sets, each labelled for its own task, so that whole batches lack one."""
    heads = {"joy": HeadConfig(), "topic": HeadConfig(4), "kind": HeadConfig(3, level="token")}
    model = built(heads).float()
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for index in range(10):
        length = 3 + index % 4
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        own = {"joy": index % 2} if index < 5 else {"topic": index % 4, "kind": [index % 3] * length}
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": own})
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True
    )
    collator = MultiTaskCollator(model, tokenizer())
    trainer = transformers.Trainer(model, arguments, data_collator=collator)
    found = trainer.predict(rows)
    assert {task: value.shape for task, value in found.predictions.items()} == {
        "joy": (10,),
        "topic": (10, 4),
        "kind": (10, 6, 3),
    }
    for index, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])[None]
        with torch.no_grad():
            logits = model(ids).logits
        for task in ("joy", "topic"):
            torch.testing.assert_close(torch.tensor(found.predictions[task][index]), logits[task][0])
            assert found.label_ids[task][index] == row["labels"].get(task, -100)
        token_logits = torch.tensor(found.predictions["kind"][index, : ids.shape[1]])
        torch.testing.assert_close(token_logits, logits["kind"][0])
        kinds = row["labels"].get("kind", [])
        assert found.label_ids["kind"][index].tolist() == kinds + [-100] * (6 - len(kinds))
    metrics = trainer.evaluate(rows)
    losses = [model(**collator(rows[start : start + 2])).loss.item() for start in range(0, 10, 2)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    without = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    again = trainer.predict(without)
    assert again.label_ids is None
    torch.testing.assert_close(torch.tensor(again.predictions["joy"]), torch.tensor(found.predictions["joy"]))
