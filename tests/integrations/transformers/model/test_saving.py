"""Models come back from a folder, a copy, and a pickle as they were."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from saliency_reg.integrations.transformers import EncoderError, HeadConfig, MultiTaskConfig, MultiTaskModel
from tests.integrations.transformers.tiny import (
    ENCODERS,
    HEADS,
    VOCABULARY,
    batch,
    bert,
    built,
    gpt2,
    labels,
    t5,
    tokenizer,
    vit,
)


def logits(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found: dict[str, torch.Tensor] = model.eval()(**(inputs or batch())).logits
    return found


def described(config: Any) -> dict[str, Any]:
    """But for what transformers notes of the loading."""
    found = config.to_dict()
    for own in (found, found["encoder_config"]):
        for name in ("_name_or_path", "dtype", "architectures"):
            own.pop(name, None)
    return found


def assert_same(found: Any, expected: Any, **inputs: Any) -> None:
    assert found.tasks == expected.tasks
    assert found.head_configs == expected.head_configs
    assert described(found.config) == described(expected.config)
    one, two = found.state_dict(), expected.state_dict()
    assert list(one) == list(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype, name
        assert torch.equal(value, two[name]), name
    for task, own in logits(expected, **inputs).items():
        assert own.abs().min() > 0
        torch.testing.assert_close(logits(found, **inputs)[task], own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", HEADS)
def test_a_folder(heads: str, tmp_path: Path) -> None:
    model = built(heads)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again, loading = MultiTaskModel.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(loading.values()), loading
    assert not again.training
    assert_same(again, model)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_other_encoders(encoder: str, tmp_path: Path) -> None:
    model = built("mixed", ENCODERS[encoder]())
    model.save_pretrained(tmp_path)
    again = MultiTaskModel.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert type(again.encoder) is type(model.encoder)
    assert_same(again, model)


def test_images(tmp_path: Path) -> None:
    model = built({"joy": 1, "topic": 4}, vit())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.main_input_name == "pixel_values"
    assert_same(again, model, pixel_values=torch.randn(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_number_formats(dtype: torch.dtype, tmp_path: Path) -> None:
    model = built("mixed").to(dtype)
    model.save_pretrained(tmp_path)
    again = MultiTaskModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert (again.dtype, again.config.dtype) == (dtype, dtype)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    found, expected = logits(again), logits(model)
    for task, own in expected.items():
        torch.testing.assert_close(found[task], own, rtol=1e-6, atol=1e-6)
    other = MultiTaskModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}


def test_automatic_classes(tmp_path: Path) -> None:
    model = built("mixed")
    model.save_pretrained(tmp_path)
    assert_same(transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager"), model)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MultiTaskConfig)
    assert config.head_configs == HEADS["mixed"]
    new = transformers.AutoModel.from_config(config)
    assert isinstance(new, MultiTaskModel)
    assert [p.shape for p in new.parameters()] == [p.shape for p in model.parameters()]


def test_the_same_logits_in_a_fresh_process(tmp_path: Path) -> None:
    for name, model in {"bert": built("mixed"), "t5": built("mean", t5())}.items():
        model.save_pretrained(tmp_path / name)
        torch.save((batch(), logits(model)), tmp_path / f"{name}.pt")
    code = (
        "import torch\n"
        "from saliency_reg.integrations.transformers import MultiTaskModel\n"
        "from transformers import AutoModel\n"
        "for name, kind in (('bert', AutoModel), ('t5', MultiTaskModel)):\n"
        "    torch.manual_seed(99); model = kind.from_pretrained(name, attn_implementation='eager').eval()\n"
        "    inputs, logits = torch.load(f'{name}.pt')\n"
        "    with torch.no_grad(): found = model(**inputs).logits\n"
        "    assert isinstance(model, MultiTaskModel) and list(found) == list(logits), found\n"
        "    for task, own in logits.items(): torch.testing.assert_close(found[task], own, rtol=1e-12, atol=1e-12)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_configuration_as_json() -> None:
    head = HeadConfig(3, problem="multi_label", hidden=(8, 4), dropout=0.5, weight=2.5, labels=("x", "y", "z"))
    config = MultiTaskConfig(bert(), {"b": head, "a": HeadConfig(2, level="token")}, hidden_width=16)
    again = MultiTaskConfig(**json.loads(config.to_json_string()))
    assert again.head_configs == config.head_configs == {"b": head, "a": HeadConfig(2, level="token")}
    assert again.tasks == ("b", "a")  # a file has its keys sorted
    assert again.to_dict() == config.to_dict()
    assert type(again.encoder_config) is transformers.BertConfig
    assert again.get_text_config().hidden_size == 16
    assert (again.encoder_part, again.hidden_width) == ("whole", 16)
    assert MultiTaskConfig().tasks == ()  # as transformers builds it to compare
    assert "heads" in config.to_diff_dict()


def test_options_of_loading_reach_the_encoder(tmp_path: Path) -> None:
    built().save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        model = MultiTaskModel.from_pretrained(tmp_path, attn_implementation=name)
        assert (model.config._attn_implementation, model.encoder.config._attn_implementation) == (name, name)


@pytest.mark.parametrize("encoder", ["bert", "t5", "gpt2"])
def test_more_words(encoder: str, tmp_path: Path) -> None:
    model = built("mean", ENCODERS[encoder]())
    before = logits(model)
    weight = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape == (VOCABULARY + 7, 16)
    assert torch.equal(model.get_input_embeddings().weight[:VOCABULARY], weight)
    for task, own in logits(model).items():
        torch.testing.assert_close(own, before[task])
    ids = torch.full((1, 3), VOCABULARY + 6)
    assert logits(model, input_ids=ids)["joy"].isfinite().all()
    model.save_pretrained(tmp_path)
    again = MultiTaskModel.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert again.config.encoder_config.vocab_size == VOCABULARY + 7
    assert_same(again, model, input_ids=ids)


def test_copies() -> None:
    model = built("mixed")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    for again in copies:
        assert_same(again, model)
        own = labels(HEADS["mixed"])
        regularizer = again.regularizer(strength=0.1, metric="l1")
        (again(**batch(), labels=own).loss + regularizer()).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.nn.utils.get_total_norm([p.grad for p in again.parameters() if p.grad is not None]) > 0


def test_a_folder_with_its_tokenizer(tmp_path: Path) -> None:
    built().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = MultiTaskModel.from_pretrained(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = model(**words(["w2 w3 w4", "w5"], padding=True, return_tensors="pt"))
    assert found.logits["topic"].shape == (2, 4)


def test_a_saved_configuration_of_very_many_layers_is_refused(tmp_path: Path) -> None:
    built().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["encoder_config"]["num_hidden_layers"] = 10**6
    path.write_text(json.dumps(saved))
    with pytest.raises(EncoderError, match="num_hidden_layers must be at most 1000, found 1000000"):
        MultiTaskModel.from_pretrained(tmp_path)


def test_the_encoder_of_a_saved_model(tmp_path: Path) -> None:
    """New heads on what other heads have trained."""
    model = built()
    model.encoder.save_pretrained(tmp_path)
    again = MultiTaskModel.from_encoder(tmp_path, ["other"], attn_implementation="eager")
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[name], value), name


def test_a_decoder_keeps_its_pooling(tmp_path: Path) -> None:
    built({"joy": 1}, gpt2()).save_pretrained(tmp_path)
    assert MultiTaskModel.from_pretrained(tmp_path).pooling.kind == "last"
