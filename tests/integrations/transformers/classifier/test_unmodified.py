"""The regularizer on the classifier of an unmodified model of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

from recipes.sweeps.tiny_models.registry import TINY_MODELS, classifier_model
from saliency_reg import PCGrad
from saliency_reg.errors import (
    AlreadyAttachedError,
    ConfigurationError,
    ModuleNotFoundInModelError,
    SaliencyRegError,
    TaskError,
    WrongTypeError,
)
from saliency_reg.integrations.transformers import (
    ClassifierNotFoundError,
    MultiTaskModel,
    find_classifier,
    saliency_regularizer,
)
from tests.integrations.timm.reference import is_clean, uniform

#: Of names that peft and older scripts use.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

TASKS = ["joy", "anger", "fear"]
CLASSIFIERS = {
    "bert": "classifier",
    "roberta": "classifier.out_proj",
    "funnel": "classifier.linear_out",
    "t5": "classification_head.out_proj",
    "xlm": "sequence_summary.summary",
    "xlnet": "logits_proj",
    "gpt2": "score",
    "resnet": "classifier.1",
    "wav2vec2": "classifier",
    "audio-spectrogram-transformer": "classifier.dense",
}
LENGTHS = (7, 4, 6)


def config(**options: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=60,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        **{"num_labels": 3, "problem_type": "multi_label_classification", **options},
    )


def built(kind: str = "BertForSequenceClassification", **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(config(**options)).double()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def texts() -> list[Tensor]:
    """Each text alone, without padding, ``[1, L]``."""
    return [ids[:length][None] for ids, length in zip(batch()["input_ids"], LENGTHS)]


def sum_of_distances(rows: Tensor) -> Tensor:
    """Over pairs of tasks, of ``[T, C]``."""
    return sum(
        ((rows[i] - rows[j]).abs().sum() for i in range(len(rows)) for j in range(i + 1, len(rows))),
        start=torch.zeros((), dtype=rows.dtype),
    )


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


@pytest.mark.parametrize(("key", "name"), CLASSIFIERS.items())
def test_what_is_found(key: str, name: str) -> None:
    model = classifier_model(TINY_MODELS[key])
    state = torch.get_rng_state()
    assert find_classifier(model) == name
    assert torch.equal(state, torch.get_rng_state())
    assert is_clean(model)


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_the_saliency_of_a_linear_classifier_is_its_weight_row(kind: str) -> None:
    model = built(kind, problem_type=None)
    regularizer = saliency_regularizer(model, TASKS, strength=0.7, relations=uniform(3))
    model(**batch())
    penalty = regularizer()
    assert torch.allclose(penalty, 0.7 * sum_of_distances(model.classifier.weight), rtol=1e-12)
    assert "the heads' weight rows" in regularizer.describe()


def test_of_a_decoder_only_model_the_penalty_does_not_grow_with_the_texts() -> None:
    model = classifier_model(TINY_MODELS["gpt2"]).double()
    regularizer = saliency_regularizer(model, TASKS, strength=0.7, relations=uniform(3), surgery=PCGrad())
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
    regularizer = saliency_regularizer(model, TASKS, strength=0.7, relations=uniform(3), feature=place)
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
    regularizer = saliency_regularizer(model, TASKS, strength=0.7, relations=uniform(3), feature=place)
    model(**batch())
    penalty = regularizer()
    regularizer.remove()

    def hidden_of(ids: Tensor) -> Tensor:
        hidden: Tensor = model.bert(input_ids=ids).last_hidden_state
        return hidden

    slow = slow_penalty(model, hidden_of, lambda hidden: model.classifier(model.dropout(hidden)), mean=True)
    assert torch.allclose(penalty, 0.7 * slow, rtol=1e-10)


@pytest.mark.parametrize("where", ["beside", "within"])
def test_lora(where: str, tmp_path: Any) -> None:
    model = built()
    targets = ["query", "value"] + (["classifier"] if where == "within" else [])
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS if where == "beside" else None, r=2, target_modules=targets, lora_dropout=0.0
    )
    wrapped = get_peft_model(model, lora).double()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    regularizer = saliency_regularizer(wrapped, TASKS, strength=0.7, relations=uniform(3), optimizer=optimizer)
    before = copy.deepcopy(wrapped.state_dict())
    labels = torch.randint(2, (3, 3), generator=torch.Generator().manual_seed(2)).double()
    for _ in range(2):
        loss = wrapped(**batch(), labels=labels).loss
        penalty = regularizer(losses=loss.detach())
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
    layer = wrapped.base_model.model.classifier
    if where == "beside":
        rows = layer.modules_to_save["default"].weight.detach()
    else:
        rows = layer.base_layer.weight + layer.get_delta_weight("default")
    regularizer.relations = uniform(3)
    wrapped(**batch())
    assert torch.allclose(regularizer(), 0.7 * sum_of_distances(rows), rtol=1e-10)
    changed = {name for name, value in wrapped.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora" in name or "modules_to_save" in name for name in changed)
    regularizer.remove()
    wrapped.eval()
    logits = wrapped(**batch()).logits
    wrapped.save_pretrained(str(tmp_path))
    from peft import PeftModel

    again = PeftModel.from_pretrained(built(), str(tmp_path)).double().eval()
    assert torch.allclose(again(**batch()).logits, logits, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = built().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        regularizer = saliency_regularizer(model, TASKS, strength=0.7, surgery=PCGrad())
        loss = model(**batch(), labels=torch.ones(3, 3, dtype=torch.float64)).loss
        (loss + regularizer()).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        regularizer.remove()
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_checkpointed_layers_behind_a_feature() -> None:
    place = "bert.encoder.layer.0"
    eager, fused = (built(attn_implementation=name).train() for name in ("eager", "sdpa"))
    plain = built(attn_implementation="eager").train()
    found = []
    for model in (plain, eager):
        if model is eager:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        regularizer = saliency_regularizer(model, TASKS, relations=uniform(3), feature=place)
        model(**batch())
        regularizer().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*found))
    fused.gradient_checkpointing_enable({"use_reentrant": False})
    regularizer = saliency_regularizer(fused, TASKS, feature=place)
    with pytest.raises(ConfigurationError, match="set_attn_implementation\\('eager'\\)"):
        fused(**batch())
    regularizer.remove()


def test_it_leaves_no_trace() -> None:
    model, plain = built().train(), built().train()
    names = list(vars(model))
    regularizer = saliency_regularizer(model, TASKS, feature="bert.encoder:output.last_hidden_state")
    model(**batch())
    regularizer().backward()
    with torch.no_grad():
        model(**batch())
        assert regularizer() == 0
    copied = copy.deepcopy(model)
    assert is_clean(copied)
    regularizer.remove()
    assert is_clean(model)
    assert list(vars(model)) == names
    assert torch.equal(model(**batch()).logits, plain(**batch()).logits)
    # Attention is as fused as before.
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_forward_that_fails_gives_the_fused_kernels_back() -> None:
    model = built()
    regularizer = saliency_regularizer(model, TASKS, feature="bert.encoder.layer.0")
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[1000]]))
    assert torch.backends.cuda.flash_sdp_enabled()
    regularizer.remove()


def test_names_of_the_labels_are_those_of_the_configuration() -> None:
    model = built(id2label={0: "joy", 1: "anger", 2: "fear"}, label2id={"joy": 0, "anger": 1, "fear": 2})
    assert saliency_regularizer(model).tasks == ("joy", "anger", "fear")


def test_in_half_precision() -> None:
    model = built().float().train()
    regularizer = saliency_regularizer(
        model, TASKS, feature="bert.encoder:output.last_hidden_state", strength=0.7, relations=uniform(3)
    )
    model(**batch())
    exact = regularizer()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch())
        rough = regularizer()
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, rtol=0.05)


def _two_layers() -> nn.Module:
    found: nn.Module = classifier_model(TINY_MODELS["swiftformer"])
    return found


@pytest.mark.parametrize(
    ("build", "options", "kind", "text"),
    [
        (
            lambda: built("BertModel"),
            {},
            ClassifierNotFoundError,
            "BertModel has no layer with 3 outputs behind its encoder",
        ),
        (lambda: built("BertForMaskedLM"), {}, ClassifierNotFoundError, "BertForMaskedLM predicts tokens"),
        (
            lambda: transformers.GPT2LMHeadModel(TINY_MODELS["gpt2"].classifier_config()),
            {},
            ClassifierNotFoundError,
            "GPT2LMHeadModel predicts tokens, and has no classifier with 3 labels",
        ),
        (_two_layers, {}, ClassifierNotFoundError, "has 2 layers with 3 outputs: head, dist_head"),
        (lambda: nn.Linear(2, 3), {}, WrongTypeError, "model must be a classifier of transformers, found Linear"),
        (
            lambda: built("BertForSequenceClassification", num_labels=1, problem_type=None),
            {"tasks": None},
            ConfigurationError,
            "has a single label",
        ),
        (built, {"tasks": ["a", "b"]}, TaskError, "tasks has 2 names, but BertForSequenceClassification has 3 labels"),
        (built, {"heads": "classifier"}, ConfigurationError, r"\['heads'\] are found here"),
        (built, {"classifier": "nowhere"}, ModuleNotFoundInModelError, "nowhere"),
        (built, {"classifier": "bert"}, ClassifierNotFoundError, "does not say how many outputs"),
    ],
)
def test_bad_input(build: Any, options: dict[str, Any], kind: type[SaliencyRegError], text: str) -> None:
    model = build()
    with pytest.raises(kind, match=text):
        saliency_regularizer(model, **{"tasks": TASKS, **options})
    assert is_clean(model)


def test_attached_twice() -> None:
    model = built()
    first = saliency_regularizer(model, TASKS)
    with pytest.raises(AlreadyAttachedError):
        saliency_regularizer(model, TASKS)
    model(**batch())
    assert first() > 0


def test_a_layer_that_is_not_the_classifier() -> None:
    model = built(num_labels=5)
    regularizer = saliency_regularizer(
        model, [str(column) for column in range(12)], classifier="bert.pooler.dense", feature=None
    )
    model(**batch())
    with pytest.raises(ClassifierNotFoundError, match="and 'bert.pooler.dense' .* that is not the classifier"):
        regularizer()


def test_a_feature_of_your_own_choice_and_logits_of_one_token() -> None:
    model = classifier_model(TINY_MODELS["gpt2"]).double()
    regularizer = saliency_regularizer(model, TASKS, feature="transformer.ln_f")
    model(**TINY_MODELS["gpt2"].inputs(3, 0))
    with pytest.raises(ClassifierNotFoundError, match="Leave feature= out"):
        regularizer()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_does_not_enter_where_attention_lies_behind_the_feature(attention: str) -> None:
    model = built("BertForTokenClassification", problem_type=None, attn_implementation=attention)
    regularizer = saliency_regularizer(model, TASKS, relations=uniform(3), feature="bert.encoder.layer.0")
    found = []
    for more in (0, 5):
        inputs = {name: torch.cat([own, own.new_zeros(3, more)], dim=1) for name, own in batch().items()}
        model(**inputs)
        found.append(regularizer())
    assert found[0] > 1e-3
    assert torch.allclose(found[0], found[1], rtol=1e-10)


def test_a_loss_has_its_saliency_at_one_token_of_a_decoder() -> None:
    model = classifier_model(TINY_MODELS["gpt2"]).double().eval()
    regularizer = saliency_regularizer(model, TASKS, relations=uniform(3), target="loss")
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
    regularizer = saliency_regularizer(model, TASKS, relations=uniform(3), feature=place)
    ids = batch()["input_ids"]
    model(input_ids=ids)
    expected = regularizer()
    model(**batch())
    assert not torch.allclose(regularizer(), expected)
    model.classifier(model.dropout(model.bert(input_ids=ids).last_hidden_state))  # without the model's own forward
    assert torch.allclose(regularizer(), expected, rtol=1e-12)


def test_a_wrapper_that_calls_the_forward_and_not_the_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

        def forward(self, **inputs: Tensor) -> Any:
            return self.module.forward(**inputs)

    model = built("BertForTokenClassification", problem_type=None, attn_implementation="sdpa")
    place = "bert.encoder.layer.0"
    with saliency_regularizer(model, TASKS, relations=uniform(3), feature=place) as regularizer:
        model(**batch())
        expected = regularizer()
    wrapped = Wrapper(model)
    with saliency_regularizer(wrapped, TASKS, relations=uniform(3), feature=place) as regularizer:
        wrapped(**batch())
        assert torch.allclose(regularizer(), expected, rtol=1e-12)


def test_an_interrupted_forward_leaves_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built()
    regularizer = saliency_regularizer(model, TASKS, feature="bert.encoder.layer.0")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.bert.pooler, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch())
    regularizer.remove()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize("off", ["strength", "enabled"])
def test_where_it_is_off_attention_is_fused(off: str) -> None:
    model = built(attn_implementation="sdpa").float()
    expected = model(**batch()).logits
    regularizer = saliency_regularizer(
        model, TASKS, feature="bert.encoder.layer.0", strength=0.0 if off == "strength" else 0.1
    )
    if off == "enabled":
        regularizer.enabled = False
    assert torch.equal(model(**batch()).logits, expected)


def test_checkpointed_layers_do_not_matter_in_an_evaluation() -> None:
    model = built(attn_implementation="sdpa").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    regularizer = saliency_regularizer(model, TASKS, feature="bert.encoder.layer.0")
    model.eval()
    with torch.no_grad():
        model(**batch())
    assert regularizer.tasks == tuple(TASKS)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("BertForQuestionAnswering", "returned no logits"), ("BertForPreTraining", "returned no logits")],
)
def test_models_that_are_no_classifiers(kind: str, text: str) -> None:
    model = built(kind, num_labels=2, problem_type=None)
    regularizer = saliency_regularizer(model, ["a", "b"])
    model(**batch())
    with pytest.raises(ClassifierNotFoundError, match=text):
        regularizer()


def test_tuples_are_looked_at_too() -> None:
    model = built(return_dict=False)
    regularizer = saliency_regularizer(model, TASKS)
    assert isinstance(model(**batch()), tuple)
    assert regularizer() > 0
    wrong = built(return_dict=False)
    regularizer = saliency_regularizer(wrong, [str(column) for column in range(12)], classifier="bert.pooler.dense")
    wrong(**batch())
    with pytest.raises(ClassifierNotFoundError, match="that is not the classifier"):
        regularizer()


def test_something_behind_the_classifier() -> None:
    model = built()
    model.classifier = nn.Sequential(model.classifier, nn.Tanh())
    regularizer = saliency_regularizer(model, TASKS)
    model(**batch())
    with pytest.raises(ClassifierNotFoundError, match="something is computed behind it"):
        regularizer()


def test_of_two_adapters_the_active_one_is_taken() -> None:
    wrapped = get_peft_model(built(), LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"]))
    wrapped.add_adapter("two", LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"]))
    wrapped.set_adapter("two")
    assert find_classifier(wrapped) == "classifier.modules_to_save.two"


def test_a_multi_task_model_has_a_method_of_its_own() -> None:
    model = MultiTaskModel.from_encoder(config(), {"joy": 1, "anger": 1})
    with pytest.raises(WrongTypeError, match=r"model\.regularizer"):
        saliency_regularizer(model, ["joy", "anger"])
    with pytest.raises(TaskError, match="this model has one task"):
        MultiTaskModel.from_encoder(config(), {"joy": 1}).regularizer()


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
    regularizer = saliency_regularizer(model, TASKS)
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
    with saliency_regularizer(model, TASKS, relations=uniform(3), feature="wav2vec2.encoder.layers.0") as regularizer:
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
