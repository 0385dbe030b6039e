"""What is found in a classifier, what is changed on it, and what is refused."""

from __future__ import annotations

import copy
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
from tests.support.attachment import is_clean, uniform

from .support import TASKS, batch, built, config, sum_of_distances

#: Of names that peft and older scripts use.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

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


@pytest.mark.parametrize(("key", "name"), CLASSIFIERS.items())
def test_what_is_found(key: str, name: str) -> None:
    model = classifier_model(TINY_MODELS[key])
    state = torch.get_rng_state()
    assert find_classifier(model) == name
    assert torch.equal(state, torch.get_rng_state())
    assert is_clean(model)


@pytest.mark.parametrize("where", ["beside", "within"])
def test_lora(where: str, tmp_path: Any) -> None:
    model = built()
    targets = ["query", "value"] + (["classifier"] if where == "within" else [])
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS if where == "beside" else None, r=2, target_modules=targets, lora_dropout=0.0
    )
    wrapped = get_peft_model(model, lora).double()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    regularizer = saliency_regularizer(
        wrapped, TASKS, strength=0.7, relations=uniform(3), optimizer=optimizer, metric="l1"
    )
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
        regularizer = saliency_regularizer(model, TASKS, strength=0.7, surgery=PCGrad(), metric="l1")
        loss = model(**batch(), labels=torch.ones(3, 3, dtype=torch.float64)).loss
        (loss + regularizer()).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        regularizer.remove()
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_it_leaves_no_trace() -> None:
    model, plain = built().train(), built().train()
    names = list(vars(model))
    regularizer = saliency_regularizer(
        model, TASKS, feature="bert.encoder:output.last_hidden_state", strength=0.1, metric="l1"
    )
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
    regularizer = saliency_regularizer(model, TASKS, feature="bert.encoder.layer.0", strength=0.1, metric="l1")
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[1000]]))
    assert torch.backends.cuda.flash_sdp_enabled()
    regularizer.remove()


def test_names_of_the_labels_are_those_of_the_configuration() -> None:
    model = built(id2label={0: "joy", 1: "anger", 2: "fear"}, label2id={"joy": 0, "anger": 1, "fear": 2})
    assert saliency_regularizer(model, strength=0.1, metric="l1").tasks == ("joy", "anger", "fear")


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
        saliency_regularizer(model, **{"strength": 0.1, "metric": "l1", "tasks": TASKS, **options})
    assert is_clean(model)


def test_attached_twice() -> None:
    model = built()
    first = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    with pytest.raises(AlreadyAttachedError):
        saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    model(**batch())
    assert first() > 0


def test_a_layer_that_is_not_the_classifier() -> None:
    model = built(num_labels=5)
    regularizer = saliency_regularizer(
        model,
        [str(column) for column in range(12)],
        classifier="bert.pooler.dense",
        feature=None,
        strength=0.1,
        metric="l1",
    )
    model(**batch())
    with pytest.raises(ClassifierNotFoundError, match="and 'bert.pooler.dense' .* that is not the classifier"):
        regularizer()


def test_a_wrapper_that_calls_the_forward_and_not_the_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

        def forward(self, **inputs: Tensor) -> Any:
            return self.module.forward(**inputs)

    model = built("BertForTokenClassification", problem_type=None, attn_implementation="sdpa")
    place = "bert.encoder.layer.0"
    with saliency_regularizer(
        model, TASKS, relations=uniform(3), feature=place, strength=0.1, metric="l1"
    ) as regularizer:
        model(**batch())
        expected = regularizer()
    wrapped = Wrapper(model)
    with saliency_regularizer(
        wrapped, TASKS, relations=uniform(3), feature=place, strength=0.1, metric="l1"
    ) as regularizer:
        wrapped(**batch())
        assert torch.allclose(regularizer(), expected, rtol=1e-12)


def test_an_interrupted_forward_leaves_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built()
    regularizer = saliency_regularizer(model, TASKS, feature="bert.encoder.layer.0", strength=0.1, metric="l1")

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
        model, TASKS, feature="bert.encoder.layer.0", strength=0.0 if off == "strength" else 0.1, metric="l1"
    )
    if off == "enabled":
        regularizer.enabled = False
    assert torch.equal(model(**batch()).logits, expected)


def test_checkpointed_layers_do_not_matter_in_an_evaluation() -> None:
    model = built(attn_implementation="sdpa").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    regularizer = saliency_regularizer(model, TASKS, feature="bert.encoder.layer.0", strength=0.1, metric="l1")
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
    regularizer = saliency_regularizer(model, ["a", "b"], strength=0.1, metric="l1")
    model(**batch())
    with pytest.raises(ClassifierNotFoundError, match=text):
        regularizer()


def test_tuples_are_looked_at_too() -> None:
    model = built(return_dict=False)
    regularizer = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    assert isinstance(model(**batch()), tuple)
    assert regularizer() > 0
    wrong = built(return_dict=False)
    regularizer = saliency_regularizer(
        wrong, [str(column) for column in range(12)], classifier="bert.pooler.dense", strength=0.1, metric="l1"
    )
    wrong(**batch())
    with pytest.raises(ClassifierNotFoundError, match="that is not the classifier"):
        regularizer()


def test_something_behind_the_classifier() -> None:
    model = built()
    model.classifier = nn.Sequential(model.classifier, nn.Tanh())
    regularizer = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
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
        saliency_regularizer(model, ["joy", "anger"], strength=0.1, metric="l1")
    with pytest.raises(TaskError, match="this model has one task"):
        MultiTaskModel.from_encoder(config(), {"joy": 1}).regularizer()
