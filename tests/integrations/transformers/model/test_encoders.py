"""Encoders of all kinds, and a plain Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from saliency_reg.integrations.transformers import HeadConfig, MultiTaskCollator, MultiTaskModel
from tests.integrations.transformers import reference
from tests.integrations.transformers.tiny import (
    HEADS,
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

from .support import CLOSE, assert_all_close, real, regularizer_of

#: Of names that transformers is about to give up, in its own code as well.
deprecated = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


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
