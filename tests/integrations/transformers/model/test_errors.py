"""Every typed error of building and calling a multi-task model: its type, and what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from saliency_reg.errors import (
    ConfigurationError,
    MissingPackageError,
    SaliencyRegError,
    ShapeError,
    TaskError,
    WrongTypeError,
)
from saliency_reg.integrations.transformers import (
    EncoderError,
    HeadConfig,
    LabelError,
    MultiTaskConfig,
    MultiTaskModel,
    PretrainedWeightsError,
    TokenizerMismatchError,
    UnknownTaskError,
)
from saliency_reg.integrations.transformers.model.encoder import build_encoder
from tests.integrations.transformers.tiny import HEADS, VOCABULARY, batch, bert, built, distilbert, labels, t5


def from_encoder(encoder: Any = None, heads: Any = ("a", "b"), **options: Any) -> MultiTaskModel:
    return MultiTaskModel.from_encoder(bert() if encoder is None else encoder, heads, **options)


def clip() -> Any:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    words = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return transformers.CLIPConfig(
        text_config={**small, **words}, vision_config={**small, "image_size": 8, "patch_size": 4}
    )


# Heads.


@pytest.mark.parametrize(
    ("heads", "error", "parent", "text"),
    [
        ({}, TaskError, ValueError, "heads is empty. Name at least one task"),
        ([], TaskError, ValueError, "heads is empty"),
        ("joy", WrongTypeError, TypeError, r"heads must be \{task: number of labels\}.*found str. Pass heads="),
        (3, WrongTypeError, TypeError, "or a list of task names, found int"),
        ({"a": "five"}, WrongTypeError, TypeError, "'a' must have a number of labels or a HeadConfig, found str. Pass"),
        ({"a": 0}, ConfigurationError, ValueError, "the number of labels of task 'a' must be at least 1, found 0"),
        ({"a": True}, WrongTypeError, TypeError, "task 'a' must have a number of labels or a HeadConfig, found bool"),
        (["a", "a"], TaskError, ValueError, r"the task names \['a'\] occur more than once"),
        ({"joy.happy": 1}, TaskError, ValueError, "names are not empty and have no dot. Use 'joy_happy'"),
        ({"": 1}, TaskError, ValueError, "names are not empty and have no dot. Use 'task'"),
        ({"keys": 1}, TaskError, ValueError, "has an attribute of that name. Use 'keys_task'"),
        ({1: 1}, WrongTypeError, TypeError, "a task name must be a str, found 1. Use '1'"),
        (
            {"a": HeadConfig(pooling="pooler"), "b": HeadConfig()},
            ConfigurationError,
            ValueError,
            r"the heads \['a'\] read the encoder's pooler output.*Pass pooling='pooler' for all heads, or for none",
        ),
        (
            {"a": HeadConfig(pooling="pooler"), "b": HeadConfig(level="token")},
            ConfigurationError,
            ValueError,
            "they share no feature map",
        ),
    ],
)
def test_wrong_heads(heads: Any, error: type[Exception], parent: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        from_encoder(heads=heads)
    assert isinstance(caught.value, (SaliencyRegError, parent))
    assert issubclass(error, parent)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_labels": 0}, ConfigurationError, "num_labels must be at least 1, found 0"),
        ({"num_labels": 1.5}, WrongTypeError, "num_labels must be an int, found 1.5"),
        ({"num_labels": "3"}, WrongTypeError, "num_labels must be an int, found '3'"),
        ({"problem": "classes"}, ConfigurationError, "unknown problem 'classes'. Choose one of 'auto', 'binary', "),
        ({"level": "word"}, ConfigurationError, "unknown level 'word'. Choose one of 'sequence', 'token'"),
        (
            {"pooling": "max"},
            ConfigurationError,
            "unknown pooling 'max'. Choose one of 'auto', 'mean', 'first', 'last'",
        ),
        ({"activation": "swish"}, ConfigurationError, "unknown activation 'swish'. Choose one of 'gelu', 'relu'"),
        ({"hidden": 64}, WrongTypeError, r"hidden must be a tuple of widths, found 64. Pass hidden=\(64,\)"),
        ({"hidden": (64, -1)}, ConfigurationError, "each width in hidden must be at least 1, found -1"),
        (
            {"hidden": (1,) * 65},
            ConfigurationError,
            "hidden must be at most 64 widths, found more. Pass one for each layer",
        ),
        ({"dropout": 1.0}, ConfigurationError, "dropout must be in \\[0, 1\\), found 1.0"),
        ({"dropout": "0.1"}, WrongTypeError, "dropout must be a number in \\[0, 1\\), found '0.1'"),
        (
            {"num_labels": 2, "problem": "binary"},
            ConfigurationError,
            "a binary head has one output, found num_labels=2. Pass problem='multi_label'.*or 'single_label' for classes",
        ),
        (
            {"problem": "single_label"},
            ConfigurationError,
            "needs num_labels=2 or more, found 1. Pass problem='binary' or 'regression'",
        ),
        (
            {"level": "token", "pooling": "mean"},
            ConfigurationError,
            "a token head does not pool, found pooling='mean'. Leave it out, or pass level='sequence'",
        ),
        (
            {"num_labels": 2, "labels": ("yes",)},
            ConfigurationError,
            "found 1 names of labels for num_labels=2. Name each label once",
        ),
        (
            {"num_labels": 3, "labels": "yes"},
            WrongTypeError,
            "labels must be a tuple of names, found 'yes'. Pass labels=",
        ),
        ({"labels": 3}, WrongTypeError, "labels must be a tuple of names, found 3"),
        ({"weight": -1}, ConfigurationError, "the weight of a loss must be finite and at least 0, found -1"),
        ({"weight": float("nan")}, ConfigurationError, "finite and at least 0, found nan"),
        ({"weight": float("inf")}, ConfigurationError, "finite and at least 0, found inf"),
        ({"weight": "1"}, WrongTypeError, "the weight of a loss must be a number, found '1'"),
        ({"weight": True}, WrongTypeError, "the weight of a loss must be a number, found True"),
    ],
)
def test_wrong_head_configs(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        HeadConfig(**options)
    assert isinstance(caught.value, TypeError if error is WrongTypeError else ValueError)
    with pytest.raises(error, match=text):  # as a file would have it
        MultiTaskConfig(bert(), {"a": options})


def test_a_wrong_default_for_heads() -> None:
    for heads in (["a"], {"a": 3}):
        with pytest.raises(WrongTypeError, match="head must be a HeadConfig, found dict. Use HeadConfig"):
            from_encoder(heads=heads, head={"hidden": (8,)})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            ("bert", {"a": HeadConfig()}),
            WrongTypeError,
            "must be a configuration of transformers, found str. Use AutoC",
        ),
        (({"hidden_size": 16}, {}), ConfigurationError, "does not name its model_type"),
        ((bert(), ["a"]), WrongTypeError, r"heads must be \{task: HeadConfig\}, found list. Pass heads="),
        (
            (bert(), {"a": 3}),
            WrongTypeError,
            r"task 'a' must have a HeadConfig, found int. Use HeadConfig\(num_labels",
        ),
        (
            (bert(), {"a": {"depth": 3}}),
            ConfigurationError,
            r"the head of task 'a' has \['depth'\]. A HeadConfig has \['n",
        ),
    ],
)
def test_wrong_configurations(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MultiTaskConfig(*arguments)


def test_configurations_that_make_no_model() -> None:
    with pytest.raises(ConfigurationError, match="unknown encoder_part 'half'. Use 'whole' or 'encoder'"):
        MultiTaskConfig(bert(), {"a": HeadConfig()}, encoder_part="half")
    for config in (MultiTaskConfig(), MultiTaskConfig(bert()), bert()):
        with pytest.raises(
            ConfigurationError, match="needs a MultiTaskConfig with an encoder and heads. Use MultiTaskM"
        ):
            MultiTaskModel(config)
    with pytest.raises(TaskError, match="names are not empty and have no dot"):
        MultiTaskModel(MultiTaskConfig(bert(), {"a.b": HeadConfig()}))


# Encoders.


@pytest.mark.parametrize(
    ("encoder", "error", "text"),
    [
        (
            nn.Linear(1, 1),
            WrongTypeError,
            r"found Linear. For any other backbone use SaliencyRegularizer\(model, heads=",
        ),
        (
            3,
            WrongTypeError,
            "encoder must be a hub id, a folder, a configuration or a model of transformers, found int",
        ),
        (transformers.BertModel, WrongTypeError, "a model of transformers, found type"),
        (
            lambda: transformers.T5Model(t5()).encoder,
            EncoderError,
            r"T5Stack cannot be built again.*Pass the whole model",
        ),
        (
            lambda: transformers.CLIPModel(clip()),
            EncoderError,
            r"CLIPModel has several towers \(text_config, vision_con",
        ),
        (clip, EncoderError, "Take one tower, such as CLIPVisionModel or CLIPTextModel"),
        (
            transformers.PretrainedConfig(),
            EncoderError,
            "transformers has no encoder for Pre[tT]rainedConfig: AutoModel does not know it. Choose another",
        ),
        (
            lambda: transformers.EncoderDecoderConfig(encoder=bert().to_dict(), decoder=bert().to_dict()),
            EncoderError,
            "no encoder for EncoderDecoderConfig: AutoModel does not know it. Choose another",
        ),
    ],
)
def test_what_is_no_encoder(encoder: Any, error: type[Exception], text: str) -> None:
    is_maker = callable(encoder) and not isinstance(encoder, (type, nn.Module))
    with pytest.raises(error, match=text) as caught:
        from_encoder(encoder() if is_maker else encoder)
    assert isinstance(caught.value, TypeError if error is WrongTypeError else ValueError)


def test_two_towers_with_a_width_all_the_same() -> None:
    model = from_encoder(clip(), hidden_width=16)
    with pytest.raises(
        EncoderError, match=r"CLIPModel returns .*, and no last_hidden_state. Choose an encoder; of a mod"
    ):
        model(input_ids=torch.ones(2, 3, dtype=torch.long), pixel_values=torch.zeros(2, 3, 8, 8))


def test_a_wrong_width() -> None:
    model = from_encoder(hidden_width=12)
    with pytest.raises(
        ShapeError, match=r"BertModel has shape \[3, 7, 16\], but .* for 12 channels. Pass hidden_width=16"
    ):
        model(**batch())


def test_folders_that_hold_no_encoder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    transformers.BertModel(bert()).save_pretrained(tmp_path / "short")
    weights = tmp_path / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    for name, text in {
        str(
            tmp_path / "nowhere"
        ): r"nowhere' could not be loaded \(there is no such folder\). Pass a folder that save_pre",
        "./nowhere": r"'./nowhere' could not be loaded \(there is no such folder\)",
        str(
            tmp_path / "empty"
        ): r"empty' could not be loaded \(\w+: .*config.json.*from_encoder\(AutoConfig.for_model\('be",
        str(tmp_path / "short"): r"short' could not be loaded \(",
        "no such:name": r"'no such:name' could not be loaded \(OSError: .*or the id of a model on the hub",
    }.items():
        with pytest.raises(PretrainedWeightsError, match=text) as caught:
            from_encoder(name, local_files_only=True)
        assert isinstance(caught.value, OSError)


def test_options_where_nothing_is_loaded() -> None:
    with pytest.raises(
        WrongTypeError, match=r"\['dtype'\] are options of from_pretrained\(\), but encoder= is a configur"
    ):
        from_encoder(dtype=torch.float64)
    with pytest.raises(WrongTypeError, match="but encoder= is a model. Set them there, or leave them out"):
        from_encoder(transformers.BertModel(bert()), revision="main")


def test_a_pooler_that_is_not_there() -> None:
    model = from_encoder(distilbert(), head=HeadConfig(pooling="pooler"))
    with pytest.raises(EncoderError, match="this encoder has no pooler output. Pass pooling='mean' or pooling='first'"):
        model(**batch())


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from saliency_reg.integrations.shared.libraries import need

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r'Run: pip install "saliency-reg\[transformers\]"') as caught:
        need("transformers")
    assert isinstance(caught.value, ImportError)


# Calls.


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (
            torch.tensor([[1, VOCABULARY]]),
            r"input_ids go from 1 to 40, but BertModel has embeddings for 0 to 39. Use the tok",
        ),
        (torch.tensor([[-1, 3]]), r"go from -1 to 3.*model.resize_token_embeddings\(len\(tokenizer\)\)"),
        (
            torch.tensor([[1.0, 2.0]]),
            "input_ids must be whole numbers, found torch.float32. Pass what a tokenizer returns",
        ),
    ],
)
def test_wrong_ids(ids: torch.Tensor, text: str) -> None:
    with pytest.raises(TokenizerMismatchError, match=text) as caught:
        built()(input_ids=ids)
    assert isinstance(caught.value, (ShapeError, ValueError))


@pytest.mark.parametrize(
    ("given", "error", "parent", "text"),
    [
        (
            torch.zeros(3),
            WrongTypeError,
            TypeError,
            r"found a tensor of shape \[3\]. Pass labels=\{'joy': ...\}; MultiTask",
        ),
        ([1, 0, 1], WrongTypeError, TypeError, r"labels must be a dictionary \{task: tensor\}, found list"),
        (
            {},
            LabelError,
            ValueError,
            "labels has no task of .*For a batch without labels leave labels= out; for missing",
        ),
        ({"joy": None}, LabelError, ValueError, "labels has no task of"),
        (
            {"jy": torch.zeros(3)},
            UnknownTaskError,
            LookupError,
            r"labels names \['jy'\], .*The tasks are \['joy', 'topic'",
        ),
        (
            {"joy": [1, 0, 1]},
            WrongTypeError,
            TypeError,
            r"labels of task 'joy' must be a tensor, found list. Use torch.te",
        ),
        (
            {"joy": torch.zeros(2)},
            LabelError,
            ValueError,
            r"the labels of task 'joy' have shape \[2\], its logits \[3\]: expected labels \[3\]. For a prediction on each",
        ),
        (
            {"joy": torch.zeros(1, 3)},
            LabelError,
            ValueError,
            r"have shape \[1, 3\], its logits \[3\]: expected labels \[3\]",
        ),
        (
            {"topic": torch.zeros(3, 4)},
            LabelError,
            ValueError,
            r"expected labels \[3\]. For several yes-or-no labels per sample use HeadConfig\(K, problem='multi_label'\)",
        ),
        (
            {"tags": torch.zeros(3)},
            LabelError,
            ValueError,
            r"expected labels \[3, 3\]. This head wants 3 columns; for one class per sample pass problem='single_label'",
        ),
        (
            {"topic": torch.tensor([0, 4, 1])},
            LabelError,
            ValueError,
            r"'topic' go from 0 to 4, expected whole numbers from 0 to 3 \(-100 where one is missing\). Use HeadConfig\(num",
        ),
        (
            {"topic": torch.tensor([0, -1, 1])},
            LabelError,
            ValueError,
            "go from -1 to 1, expected whole numbers from 0 to 3",
        ),
        ({"topic": torch.tensor([0, 1.5, 1])}, LabelError, ValueError, "expected whole numbers from 0 to 3"),
        (
            {"joy": torch.tensor([0, 2, 1])},
            LabelError,
            ValueError,
            r"from 0 to 2, expected 0 or 1 .*For numbers use HeadConfig\(problem='regression'\), for classes HeadConfig\(",
        ),
        ({"joy": torch.tensor([0, 0.5, 1])}, LabelError, ValueError, "go from 0 to 1, expected 0 or 1"),
        ({"tags": torch.full((3, 3), float("inf"))}, LabelError, ValueError, "go from inf to inf, expected 0 or 1"),
    ],
)
def test_wrong_labels(given: Any, error: type[Exception], parent: type[Exception], text: str) -> None:
    model = built()
    with pytest.raises(error, match=text) as caught:
        model(**batch(), labels=given)
    assert isinstance(caught.value, parent)
    assert isinstance(caught.value, SaliencyRegError)
    with pytest.raises(error, match=text):
        model.sample_losses(model(**batch()).logits, given)


def test_wrong_labels_of_tokens() -> None:
    model = built("token")
    with pytest.raises(
        LabelError, match=r"labels \[3, 7\]. A token head wants a label for each token: pad them with -100"
    ):
        model(**batch(), labels={"kind": torch.zeros(3, 6, dtype=torch.long)})


@pytest.mark.parametrize(
    ("tasks", "error", "text"),
    [
        (["jy"], UnknownTaskError, r"tasks= names \['jy'\], which this model does not have: \['joy', 'topic'"),
        ("jy", UnknownTaskError, r"tasks= names \['jy'\]"),
        ([], UnknownTaskError, r"tasks= is empty. Name some of \['joy', .*, or leave it out for all"),
        (3, WrongTypeError, r"tasks must be a list of task names, found 3. Choose of \['joy', 'topic'"),
    ],
)
def test_wrong_tasks(tasks: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        built()(**batch(), tasks=tasks)


def test_labels_of_heads_that_do_not_run() -> None:
    model, own = built(), labels(HEADS["mean"])
    with pytest.raises(
        UnknownTaskError, match=r"labels has \['topic'\], whose heads do not run: tasks=\['joy'\]. Name"
    ):
        model(**batch(), tasks=["joy"], labels={"topic": own["topic"]})
    logits = model(**batch(), tasks=["joy"]).logits
    with pytest.raises(
        UnknownTaskError, match=r"labels has \['topic'\], but logits only \['joy'\]. Leave these labels out"
    ):
        model.sample_losses(logits, {"joy": own["joy"], "topic": own["topic"]})


def test_what_the_regularizer_knows_already() -> None:
    for option in ({"heads": "heads"}, {"tasks": ["a"]}, {"channel_axis": 1}):
        with pytest.raises(
            ConfigurationError, match=rf"\['{next(iter(option))}'\] are known here. Leave them out, or use"
        ):
            built().regularizer(**{"strength": 0.1, "metric": "l1", **option})
    with pytest.raises(ConfigurationError, match="unknown scalarize 'mean'. Choose one of 'auto', 'max'"):
        built("mixed").regularizer(scalarize="mean", strength=0.1, metric="l1")


@pytest.mark.parametrize("name", ["pipeline", "__version__", "BertConfig"])
def test_an_encoder_class_that_is_no_model(name: str) -> None:
    config = MultiTaskConfig(
        transformers.BertConfig(**TINY_SIZES), {"a": HeadConfig(), "b": HeadConfig()}, encoder_class=name
    )
    with pytest.raises(EncoderError, match="no class of models"):
        MultiTaskModel(config)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        # Narrow, so that one that is built all the same takes no memory.
        (lambda: transformers.BertConfig(**{**TINY_SIZES, "num_hidden_layers": 1001}), "num_hidden_layers must be"),
        (
            lambda: transformers.DistilBertConfig(dim=4, hidden_dim=4, n_heads=1, vocab_size=9, n_layers=1001),
            "n_layers",
        ),
        (
            lambda: transformers.GPT2Config(n_embd=4, n_head=1, vocab_size=9, n_layer=1001),
            "n_layer must be at most 1000",
        ),
        (
            lambda: transformers.T5Config(
                d_model=4, d_kv=2, d_ff=4, num_heads=1, vocab_size=9, num_decoder_layers=1001
            ),
            "num_decoder_layers must be at most 1000, found 1001. Pass the number of layers",
        ),
        (lambda: transformers.ConvNextConfig(hidden_sizes=[2] * 4, depths=[500, 1, 1, 500]), "depths must.*found 1002"),
        (lambda: transformers.CLIPConfig(text_config={**TINY_SIZES, "num_hidden_layers": 1001}), "num_hidden_layers"),
    ],
)
def test_encoders_of_very_many_layers_are_refused_at_once(config: Callable[[], Any], text: str) -> None:
    with pytest.raises(EncoderError, match=text):
        build_encoder(config(), None, "whole")


def test_other_numbers_of_a_layer_are_none_of_layers() -> None:
    config = transformers.BertConfig(**TINY_SIZES)
    config.vocab_size_per_layer_input = 262144
    assert build_encoder(config, None, "whole").config.num_hidden_layers == 1


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_config": {"model_type": "unheard_of"}},
        {"hidden_width": 0},
        {"heads": [{"task": "a", "num_labels": 10**12}]},
        {"heads": [{"task": "a", "hidden": [10**12]}]},
        {"heads": [{"task": "a", "hidden": [1] * 300_000}]},
        {"heads": [{"task": ["a"]}]},
    ],
)
def test_entries_of_a_configuration_file(options: dict[str, Any]) -> None:
    with pytest.raises(SaliencyRegError):
        MultiTaskConfig(
            **{"encoder_config": transformers.BertConfig(**TINY_SIZES), "heads": {"a": HeadConfig()}, **options}
        )


TINY_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
}
