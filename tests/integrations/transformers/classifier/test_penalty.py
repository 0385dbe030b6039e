"""The penalty of unmodified classifiers is that of each text alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from recipes.sweeps.tiny_models.registry import TINY_MODELS, classifier_model
from saliency_reg import PCGrad
from saliency_reg.errors import ConfigurationError
from saliency_reg.integrations.transformers import ClassifierNotFoundError, MultiTaskModel, saliency_regularizer
from tests.support.attachment import uniform

from .support import LENGTHS, TASKS, batch, built, sum_of_distances

#: Of names that peft and older scripts use.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def texts() -> list[Tensor]:
    """Each text alone, without padding, ``[1, L]``."""
    return [ids[:length][None] for ids, length in zip(batch()["input_ids"], LENGTHS)]


def slow_penalty(
    model: Any, hidden_of: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor], mean: bool
) -> Tensor:
    """One text, one task, one pair at a time; each text without any padding.

    ``rest`` goes from hidden states ``[1, L, C]`` to logits ``[1, T]`` or ``[1, L, T]``.
    """
    total = torch.zeros((), dtype=torch.float64)
    for ids in texts():
        hidden = hidden_of(ids)
        logits = rest(hidden)
        rows = []
        for task in range(3):
            (gradient,) = torch.autograd.grad(logits[..., task].sum(), hidden, create_graph=True)
            rows.append(gradient[0].mean(0) if mean else gradient[0].sum(0))
        total = total + sum_of_distances(torch.stack(rows)) / len(LENGTHS)
    return total


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_the_saliency_of_a_linear_classifier_is_its_weight_row(kind: str) -> None:
    model = built(kind, problem_type=None)
    regularizer = saliency_regularizer(model, TASKS, strength=0.7, relations=uniform(3), metric="l1")
    model(**batch())
    penalty = regularizer()
    assert torch.allclose(penalty, 0.7 * sum_of_distances(model.classifier.weight), rtol=1e-12)
    assert "the heads' weight rows" in regularizer.describe()


def test_of_a_decoder_only_model_the_penalty_does_not_grow_with_the_texts() -> None:
    model = classifier_model(TINY_MODELS["gpt2"]).double()
    regularizer = saliency_regularizer(model, TASKS, strength=0.7, relations=uniform(3), surgery=PCGrad(), metric="l1")
    found = []
    for longer in (0, 5):
        inputs = TINY_MODELS["gpt2"].inputs(3, 0)
        ids = torch.cat([inputs["input_ids"][:, :1].expand(-1, longer), inputs["input_ids"]], dim=1)
        mask = torch.cat([torch.ones(3, longer, dtype=torch.long), inputs["attention_mask"]], dim=1)
        logits = model(input_ids=ids, attention_mask=mask).logits
        found.append(regularizer())
        (found[-1] + logits.square().mean()).backward()
        assert regularizer.report is not None
        assert regularizer.report.surgery is not None
    assert torch.allclose(found[0], 0.7 * sum_of_distances(model.score.weight), rtol=1e-12)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", ["last", "first"])
def test_at_hidden_states_the_penalty_is_that_of_each_text_alone(attention: str, layer: str) -> None:
    model = built(attn_implementation=attention)
    place = "bert.encoder:output.last_hidden_state" if layer == "last" else "bert.encoder.layer.0"
    regularizer = saliency_regularizer(model, TASKS, strength=0.7, relations=uniform(3), feature=place, metric="l1")
    loss = model(**batch()).logits.square().mean()
    penalty = regularizer()
    parameters = [p for p in model.parameters() if p.requires_grad]
    fast = torch.autograd.grad(penalty, parameters, allow_unused=True, retain_graph=True)
    loss.backward()  # fused attention in front of the feature has a backward pass as ever
    regularizer.remove()
    model.set_attn_implementation("eager")
    hidden_state: list[Tensor] = []

    def hidden_of(ids: Tensor) -> Tensor:
        states = model.bert(input_ids=ids, output_hidden_states=True).hidden_states
        hidden_state[:] = [states[-1 if layer == "last" else 1]]
        return hidden_state[0]

    def rest(hidden: Tensor) -> Tensor:
        if layer == "first":
            out = model.bert.encoder.layer[1](hidden)
            hidden = out[0] if isinstance(out, tuple) else out
        return model.classifier(model.bert.pooler(hidden))

    slow = 0.7 * slow_penalty(model, hidden_of, rest, mean=False)
    assert torch.allclose(penalty, slow, rtol=1e-10)
    expected = torch.autograd.grad(slow, parameters, allow_unused=True)
    for own, other in zip(fast, expected):
        own, other = (torch.zeros(1) if one is None else one for one in (own, other))
        assert torch.allclose(own.double(), other.double(), atol=1e-10)
    reached = dict(zip([name for name, p in model.named_parameters() if p.requires_grad], fast))
    assert reached["bert.embeddings.word_embeddings.weight"].abs().max() > 0  # the encoder, not the classifier alone


def test_padding_does_not_enter_the_saliency_of_tokens() -> None:
    model = built("BertForTokenClassification", problem_type=None)
    # Something that is not linear between the hidden states and the logits.
    model.dropout = nn.GELU()
    place = "bert.encoder:output.last_hidden_state"
    regularizer = saliency_regularizer(model, TASKS, strength=0.7, relations=uniform(3), feature=place, metric="l1")
    model(**batch())
    penalty = regularizer()
    regularizer.remove()

    def hidden_of(ids: Tensor) -> Tensor:
        hidden: Tensor = model.bert(input_ids=ids).last_hidden_state
        return hidden

    slow = slow_penalty(model, hidden_of, lambda hidden: model.classifier(model.dropout(hidden)), mean=True)
    assert torch.allclose(penalty, 0.7 * slow, rtol=1e-10)


def test_checkpointed_layers_behind_a_feature() -> None:
    place = "bert.encoder.layer.0"
    eager, fused = (built(attn_implementation=name).train() for name in ("eager", "sdpa"))
    plain = built(attn_implementation="eager").train()
    found = []
    for model in (plain, eager):
        if model is eager:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        regularizer = saliency_regularizer(model, TASKS, relations=uniform(3), feature=place, strength=0.1, metric="l1")
        model(**batch())
        regularizer().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*found))
    fused.gradient_checkpointing_enable({"use_reentrant": False})
    regularizer = saliency_regularizer(fused, TASKS, feature=place, strength=0.1, metric="l1")
    with pytest.raises(ConfigurationError, match="set_attn_implementation\\('eager'\\)"):
        fused(**batch())
    regularizer.remove()


def test_in_half_precision() -> None:
    model = built().float().train()
    regularizer = saliency_regularizer(
        model, TASKS, feature="bert.encoder:output.last_hidden_state", strength=0.7, relations=uniform(3), metric="l1"
    )
    model(**batch())
    exact = regularizer()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch())
        rough = regularizer()
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, rtol=0.05)


def test_a_feature_of_your_own_choice_and_logits_of_one_token() -> None:
    model = classifier_model(TINY_MODELS["gpt2"]).double()
    regularizer = saliency_regularizer(model, TASKS, feature="transformer.ln_f", strength=0.1, metric="l1")
    model(**TINY_MODELS["gpt2"].inputs(3, 0))
    with pytest.raises(ClassifierNotFoundError, match="Leave feature= out"):
        regularizer()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_does_not_enter_where_attention_lies_behind_the_feature(attention: str) -> None:
    model = built("BertForTokenClassification", problem_type=None, attn_implementation=attention)
    regularizer = saliency_regularizer(
        model, TASKS, relations=uniform(3), feature="bert.encoder.layer.0", strength=0.1, metric="l1"
    )
    found = []
    for more in (0, 5):
        inputs = {name: torch.cat([own, own.new_zeros(3, more)], dim=1) for name, own in batch().items()}
        model(**inputs)
        found.append(regularizer())
    assert found[0] > 1e-3
    assert torch.allclose(found[0], found[1], rtol=1e-10)


def test_a_loss_has_its_saliency_at_one_token_of_a_decoder() -> None:
    model = classifier_model(TINY_MODELS["gpt2"]).double().eval()
    regularizer = saliency_regularizer(model, TASKS, relations=uniform(3), target="loss", strength=0.1, metric="l1")
    ids = TINY_MODELS["gpt2"].inputs(2, 0)["input_ids"][:1, :4]
    found = []
    for times in (1, 3):  # behind padding on the left, so that the text and its positions stay the same
        padded = torch.cat([torch.zeros(1, 4 * (times - 1), dtype=torch.long), ids], dim=1)
        mask = torch.cat([torch.zeros(1, 4 * (times - 1), dtype=torch.long), torch.ones_like(ids)], dim=1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=padded, attention_mask=mask, position_ids=places).logits
        losses = nn.functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
        found.append(regularizer(losses=dict(zip(TASKS, losses.unbind(1)))))
    assert found[0] > 1e-4
    assert torch.allclose(found[0], found[1], rtol=1e-8)


def test_the_mask_of_a_forward_is_not_that_of_the_next() -> None:
    model = built("BertForTokenClassification", problem_type=None)
    model.dropout = nn.GELU()
    place = "bert.encoder:output.last_hidden_state"
    regularizer = saliency_regularizer(model, TASKS, relations=uniform(3), feature=place, strength=0.1, metric="l1")
    ids = batch()["input_ids"]
    model(input_ids=ids)
    expected = regularizer()
    model(**batch())
    assert not torch.allclose(regularizer(), expected)
    model.classifier(model.dropout(model.bert(input_ids=ids).last_hidden_state))  # without the model's own forward
    assert torch.allclose(regularizer(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("key", "pooling"), [("whisper", "mean"), ("bart", "mean"), ("gpt2", "last"), ("bert", "mean")]
)
def test_only_decoder_only_models_are_read_at_their_last_token(key: str, pooling: str) -> None:
    encoder = transformers.AutoModel.from_config(TINY_MODELS[key].config())
    assert MultiTaskModel.from_encoder(encoder, ["a", "b"]).pooling.kind == pooling


def test_padding_of_a_recording() -> None:
    entry = TINY_MODELS["wav2vec2"]
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_config(entry.config()).eval()
    model = MultiTaskModel.from_encoder(encoder, ["a", "b"]).eval()
    waves = torch.randn(1, 400)
    longer = torch.cat([waves, torch.zeros(1, 200)], dim=1)
    mask = torch.cat([torch.ones(1, 400), torch.zeros(1, 200)], dim=1).long()
    hidden = encoder(input_values=longer, attention_mask=mask).last_hidden_state
    frames = encoder._get_feature_vector_attention_mask(hidden.shape[1], mask).bool()
    assert not frames.all()
    pooled: list[Tensor] = []
    model.pooling.register_forward_hook(lambda module, args, output: pooled.append(output))
    model(input_values=longer, attention_mask=mask)
    assert torch.allclose(pooled[0][0], hidden[0, frames[0]].mean(0), atol=1e-6)


def test_a_forward_that_raised_or_diverged_condemns_nothing() -> None:
    model = built()
    regularizer = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    with pytest.raises(ValueError, match="size"):
        model(**batch(), labels=torch.zeros(3, 4, dtype=torch.float64))
    weight = model.classifier.weight.detach().clone()
    model.classifier.weight.data[0, 0] = torch.nan
    model(**batch())
    assert torch.isnan(regularizer())
    model.classifier.weight.data.copy_(weight)
    model(**batch())
    assert regularizer() > 0


def test_padded_frames_of_a_recording_do_not_enter_behind_attention() -> None:
    entry = TINY_MODELS["wav2vec2"]
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForAudioFrameClassification(entry.classifier_config()).double().eval()
    model.set_attn_implementation("eager")
    waves = torch.randn(1, 680, dtype=torch.float64)
    inputs = {"input_values": waves, "attention_mask": (torch.arange(680) < 400)[None].long()}
    with saliency_regularizer(
        model, TASKS, relations=uniform(3), feature="wav2vec2.encoder.layers.0", strength=0.1, metric="l1"
    ) as regularizer:
        model(**inputs)
        penalty = regularizer()
    states: list[Tensor] = []
    layer = model.wav2vec2.encoder.layers[0]
    layer.register_forward_hook(
        lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    logits = model(**inputs).logits[0]
    real = model._get_feature_vector_attention_mask(len(logits), inputs["attention_mask"])[0].bool()
    assert not real.all()
    rows = [
        torch.autograd.grad(logits[real, task].sum(), states[0], retain_graph=True)[0][0][real].mean(0)
        for task in range(3)
    ]
    assert torch.allclose(penalty, 0.1 * sum_of_distances(torch.stack(rows)), rtol=1e-10)
