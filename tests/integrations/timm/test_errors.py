"""Every typed error of building a model: its type, and what it says."""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from saliency_reg.errors import (
    ConfigurationError,
    MissingPackageError,
    SaliencyRegError,
    ShapeError,
    TaskError,
    WrongTypeError,
)
from saliency_reg.integrations.timm import (
    CheckpointError,
    HeadConfig,
    ImageSizeError,
    NoSpatialFeatureError,
    PretrainedWeightsError,
    TimmMultiTaskModel,
    UnknownModelError,
    find_classifier,
)
from saliency_reg.integrations.timm.backbone.feature_layout import find_layout


def built(name: str = "test_vit", heads: object = ("a", "b"), **options: object) -> TimmMultiTaskModel:
    return TimmMultiTaskModel(name, heads, **{"image_size": 32, **options})


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("resnet81", UnknownModelError, r"has no model 'resnet81'. Did you mean 'resnet18', "),
        ("zzzzzzzzz", UnknownModelError, r"has no model 'zzzzzzzzz'. Use one of timm.list_models\(\)"),
        (
            "resnet18.a9_in1k",
            UnknownModelError,
            r"no pretrained weights with the tag 'a9_in1k'. Use 'resnet18.a1_in1k'",
        ),
        (18, WrongTypeError, "the name of a timm model must be a str, found int"),
    ],
)
def test_no_such_model(name: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        built(name)


def test_weights_that_do_not_exist() -> None:
    name = next(name for name in timm.list_models("test_*") if not timm.get_pretrained_cfg(name).has_weights)
    with pytest.raises(
        PretrainedWeightsError, match=r"has no pretrained weights for .*checkpoint_path='weights.safetensors'"
    ):
        built(name, pretrained=True)


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        if pretrained:
            raise OSError("Name or service not known")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        PretrainedWeightsError, match=r"OSError: Name or service not known\). Without a connection.*checkpoint_path="
    ):
        built(pretrained=True)
    with pytest.raises(
        ConfigurationError, match="unexpected keyword argument 'colour'"
    ):  # not taken for the connection
        built(pretrained=True, backbone_options={"colour": "red"})


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [
        (
            "test_vit",
            30,
            r"cannot process images of 30x30 .*divisible by patch size.* made for 160x160. Pass image_size=160, or a multiple of 16",
        ),
        ("efficientformer_l1", 64, r"made for 224x224. Pass image_size=224"),
        ("coat_tiny", 30, r"Pass image_size=224"),
    ],
)
def test_sizes_that_a_model_refuses(name: str, size: int, text: str) -> None:
    with pytest.raises(ImageSizeError, match=text) as caught:
        built(name, image_size=size)
    assert isinstance(caught.value, ShapeError)


@pytest.mark.parametrize(
    ("size", "error"),
    [(0, ConfigurationError), ("32", WrongTypeError), ((32,), WrongTypeError), (True, WrongTypeError)],
)
def test_sizes_that_are_none(size: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="image_size must be"):
        built(image_size=size)


@pytest.mark.parametrize(
    ("heads", "error", "text"),
    [
        ({}, TaskError, "heads is empty. Name at least one task"),
        ([], TaskError, "heads is empty"),
        ("smiling", WrongTypeError, r"heads must be \{task: number of classes\}"),
        (3, WrongTypeError, "or a list of task names, found int"),
        ({"a": "five"}, WrongTypeError, "task 'a' must have a number of classes or a HeadConfig, found str"),
        ({"a": 0}, ConfigurationError, "the number of classes of task 'a' must be at least 1, found 0"),
        ({"a": True}, WrongTypeError, "task 'a' must have a number of classes or a HeadConfig, found bool"),
        (["a", "a"], TaskError, r"the task names \['a'\] occur more than once"),
        ({"face.smiling": 1}, TaskError, "names are not empty and have no dot. Use 'face_smiling'"),
        ({"": 1}, TaskError, "names are not empty and have no dot"),
        ({"keys": 1}, TaskError, "has an attribute of that name. Use 'keys_task'"),
        ({"pop": 1}, TaskError, "Use 'pop_task'"),
        ({"training": 1}, TaskError, "Use 'training_task'"),
        ({1: 1}, WrongTypeError, "a task name must be a str, found 1. Use '1'"),
    ],
)
def test_wrong_heads(heads: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        built(heads=heads)


def test_names_that_work() -> None:
    names = ["Eyeglasses", "5_o_Clock_Shadow", "no beard", "naïve", "0"]
    model = built(heads=names)
    assert model.regularizer().tasks == tuple(names)
    assert list(model(torch.zeros(2, 3, 32, 32))) == names


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"classes": 0}, ConfigurationError, "classes must be at least 1, found 0"),
        ({"classes": 1.5}, WrongTypeError, "classes must be an int, found 1.5"),
        ({"hidden": 64}, WrongTypeError, r"hidden must be a tuple of widths, found 64. Pass hidden=\(64,\)"),
        ({"hidden": (64, -1)}, ConfigurationError, "each width in hidden must be at least 1, found -1"),
        (
            {"hidden": (1,) * 65},
            ConfigurationError,
            "hidden must be at most 64 widths, found more. Pass one for each layer",
        ),
        ({"hidden": count(1)}, ConfigurationError, "hidden must be at most 64 widths"),
        (
            {"activation": "swish"},
            ConfigurationError,
            "unknown activation 'swish'. Choose one of 'gelu', 'relu', 'tanh', 'silu'",
        ),
        ({"pooling": "mean"}, ConfigurationError, "unknown pooling 'mean'. Choose one of 'auto', 'average'"),
        ({"norm": "batch"}, ConfigurationError, "unknown norm 'batch'"),
        ({"dropout": 1.0}, ConfigurationError, "dropout must be in \\[0, 1\\), found 1.0"),
        ({"dropout": "much"}, WrongTypeError, "dropout must be a number in \\[0, 1\\), found 'much'"),
    ],
)
def test_wrong_head_configs(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        HeadConfig(**options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"head": {"hidden": 3}}, WrongTypeError, "head must be a HeadConfig, found dict"),
        ({"in_chans": 0}, ConfigurationError, "in_chans must be at least 1"),
        ({"drop_rate": 2}, ConfigurationError, "drop_rate must be in \\[0, 1\\)"),
        ({"drop_path_rate": -0.5}, ConfigurationError, "drop_path_rate must be in \\[0, 1\\), found -0.5"),
        ({"backbone_options": ["img_size"]}, WrongTypeError, "backbone_options must be a dict"),
        (
            {"backbone_options": {"num_classes": 3}},
            ConfigurationError,
            "'num_classes', which is given in another way: heads=",
        ),
        (
            {"backbone_options": {"img_size": 3}},
            ConfigurationError,
            "'img_size', which is given in another way: image_size=",
        ),
        (
            {"backbone_options": {"colour": 1}},
            ConfigurationError,
            r"unexpected keyword argument 'colour'.*Options: colour=1",
        ),
    ],
)
def test_wrong_options(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        built(**options)


@pytest.mark.parametrize(
    ("name", "pooling", "text"),
    [
        ("test_resnet", "token", "pooling='token' needs a class token, and this backbone has none"),
        ("test_vit_relpos", "token", "Pass pooling='average'"),
        (
            "pit_ti_224",
            "average",
            "needs positions, and this backbone returns class tokens only .* Pass pooling='token'",
        ),
    ],
)
def test_poolings_that_a_backbone_does_not_allow(name: str, pooling: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        built(name, head=HeadConfig(pooling=pooling), image_size=64)


def test_images_that_do_not_fit() -> None:
    model = built("test_resnet", head=HeadConfig(pooling="none"), image_size=64)
    with pytest.raises(ShapeError, match=r"images must be \[B, 3, H, W\], found \[2, 1, 64, 64\]"):
        model(torch.zeros(2, 1, 64, 64))
    with pytest.raises(ShapeError, match=r"images must be \[B, 3, H, W\], found \[3, 64, 64\]"):
        model(torch.zeros(3, 64, 64))
    with pytest.raises(ShapeError, match="was built for 4 positions of 96 channels, found 9 of 96"):
        model(torch.zeros(2, 3, 96, 96))


def test_the_regularizer_knows_the_heads() -> None:
    with pytest.raises(ConfigurationError, match=r"\['heads'\] are known here"):
        built().regularizer(heads="heads", strength=0.1, metric="l1")


def test_features_of_no_known_kind() -> None:
    model = torch.nn.Identity()
    for features in (
        {"a": 1},
        [torch.zeros(1, 2, 3)],
        torch.zeros(1, 2, 3, 4, 5),
        [torch.zeros(1, 3), torch.zeros(1, 5, 4)],
    ):
        with pytest.raises(NoSpatialFeatureError):
            find_layout(features, model, (32, 32))


@pytest.mark.parametrize("missing", ["timm", "safetensors.torch"])
def test_a_missing_package(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    model = built()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingPackageError, match=r'pip install "saliency-reg\[timm\]"') as caught:
        built() if missing == "timm" else model.save(tmp_path)
    assert isinstance(caught.value, ImportError)


def test_a_backbone_without_features() -> None:
    with pytest.raises(WrongTypeError, match=r"model must be what timm.create_model returns, found Linear"):
        find_classifier(torch.nn.Linear(1, 1))


class Evil:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("place", ["beside", "inside", "whole"])
def test_no_file_of_weights_runs_code(
    place: str, wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with versions of timm that unpickle whatever there is."""
    monkeypatch.setattr(timm.models, "load_state_dict", lambda path, *_, **__: torch.load(path, weights_only=False))
    mark = tmp_path / "ran"
    evil: Any = Evil(str(mark))
    weights = {"x": torch.zeros(1), "y": evil} if place == "inside" else {"x": torch.zeros(1)}
    content = {"state_dict": weights, "evil": evil} if place == "beside" else evil if place == "whole" else weights
    path = tmp_path / ("model.pth" if wrapped else "model.bin")
    torch.save({"model": content} if wrapped else content, path)
    with pytest.raises(CheckpointError):
        TimmMultiTaskModel("test_resnet", {"a": 1, "b": 1}, checkpoint_path=path)
    assert not mark.exists()


def test_options_of_a_training_beside_its_weights(tmp_path: Path) -> None:
    model = TimmMultiTaskModel("test_resnet", {"a": 1, "b": 1})
    state = {f"_orig_mod.module.{name}": value for name, value in model.backbone.model.state_dict().items()}
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "checkpoint.pth.tar")
    again = TimmMultiTaskModel("test_resnet", {"a": 1, "b": 1}, checkpoint_path=tmp_path / "checkpoint.pth.tar")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.backbone.eval()(images), model.backbone.eval()(images))


@pytest.mark.parametrize(
    "change",
    [
        {"in_chans": float("inf")},
        {"in_chans": 3.5},
        {"dtype": "int8"},
        {"dtype": 3},
        {"heads": [{"task": task, "classes": 10**12} for task in "ab"]},
        {"heads": [{"task": "a", "classes": 50_000}]},
        {"heads": [{"task": "a"}, {"task": "a"}]},
        {"heads": [{"task": "a", "hidden": [10**7]}]},
        {"heads": [{"task": "a", "hidden": [1] * 300_000}]},
        {"backbone_options": {"layers": [1_000_000, 1, 1, 1]}},
        {"backbone_options": {"deep": [[[[10**9]]]]}},
        {"image_size": [10**6, 10**6]},
        {"drop_rate": float("nan")},
        {"name": 7},
    ],
)
def test_configurations_are_checked_before_anything_is_built(change: dict[str, Any], tmp_path: Path) -> None:
    TimmMultiTaskModel("test_resnet", {"a": 1, "b": 3}, image_size=64).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SaliencyRegError):
        TimmMultiTaskModel.from_pretrained(tmp_path)
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(CheckpointError, match="no JSON"):
        TimmMultiTaskModel.from_pretrained(tmp_path)
