"""Saved models, and checkpoints of backbones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from saliency_reg.errors import ConfigurationError, SaliencyRegError
from saliency_reg.integrations.timm import CheckpointError, CheckpointNotFoundError, HeadConfig, TimmMultiTaskModel


def built(name: str = "test_vit", **options: object) -> TimmMultiTaskModel:
    heads = {"a": HeadConfig(hidden=(8,), activation="tanh", dropout=0.5, pooling="average+max"), "b": 3}
    options = {"image_size": 48, "in_chans": 2, "drop_rate": 0.1, **options}
    return TimmMultiTaskModel(name, heads, head=HeadConfig(hidden=(4, 4), norm="layer"), **options)


MODELS = {
    "test_vit": {"backbone_options": {"init_values": 0.1, "act_layer": "relu"}, "drop_path_rate": 0.1},
    "test_convnext": {"image_size": 64},
    "test_resnet": {"image_size": (64, 96)},
}


def test_the_same_logits_in_a_fresh_process(tmp_path: Path) -> None:
    for name, options in MODELS.items():
        model = built(name, **options)
        images = torch.randn(4, 2, *model.image_size)
        model(images)  # statistics of BatchNorm move
        model.eval().save(tmp_path / name)
        with torch.no_grad():
            torch.save((images, model(images)), tmp_path / f"{name}.pt")
    code = (
        "import sys, torch; from saliency_reg.integrations.timm import TimmMultiTaskModel; torch.set_num_threads(int(sys.argv.pop()))\n"
        "for name in sys.argv[1:]:\n"
        "    torch.manual_seed(99); model = TimmMultiTaskModel.from_pretrained(name).eval()\n"
        "    images, logits = torch.load(f'{name}.pt')\n"
        "    with torch.no_grad(): found = model(images)\n"
        "    assert list(found) == list(logits) and all(torch.equal(found[t], logits[t]) for t in logits), name\n"
        "    model.save(f'again/{name}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *MODELS, str(torch.get_num_threads())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in MODELS:
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["config.json", "model.safetensors"]
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / name / file).read_bytes() == (tmp_path / name / file).read_bytes()


def test_the_heads_are_described_as_they_are(tmp_path: Path) -> None:
    model = built()
    model.save(tmp_path)
    again = TimmMultiTaskModel.from_pretrained(str(tmp_path))
    assert again.head_configs == model.head_configs
    assert again.description == model.description
    assert str(again) == str(model)


def test_nothing_is_saved_that_json_cannot_hold(tmp_path: Path) -> None:
    model = built(backbone_options={"act_layer": torch.nn.ReLU})
    with pytest.raises(ConfigurationError, match="cannot be written as JSON"):
        model.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file(missing: str, tmp_path: Path) -> None:
    built().save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointNotFoundError, match=rf"{missing}' is missing \(the folder holds \['\w") as caught:
        TimmMultiTaskModel.from_pretrained(tmp_path)
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(CheckpointNotFoundError, match="there is no such folder"):
        TimmMultiTaskModel.from_pretrained(tmp_path / "nowhere")


def test_corrupt_weights(tmp_path: Path) -> None:
    built().save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="The file is not whole: save or copy it again"):
        TimmMultiTaskModel.from_pretrained(tmp_path)


def test_weights_of_another_model(tmp_path: Path) -> None:
    built().save(tmp_path / "vit")
    built("test_resnet", image_size=64).save(tmp_path / "resnet")
    TimmMultiTaskModel("test_vit", {"a": 1, "b": 5}, image_size=48).save(tmp_path / "other heads")
    for other in ("resnet", "other heads"):
        (tmp_path / "vit" / "model.safetensors").write_bytes((tmp_path / other / "model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match="holds the weights of another model than config.json describes"):
            TimmMultiTaskModel.from_pretrained(tmp_path / "vit")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda config: "{", "is no JSON"),
        (lambda config: "[]", "is not the configuration of a TimmMultiTaskModel"),
        (lambda config: json.dumps({"architecture": "resnet18"}), "is not the configuration of a TimmMultiTaskModel"),
        (lambda config: json.dumps({**config, "version": 99}), "has version 99 of the format, expected 1"),
        (lambda config: json.dumps({**config, "heads": [{"task": "a", "classes": 0}]}), "has a wrong one"),
        (lambda config: json.dumps({name: config[name] for name in config if name != "name"}), "lacks an entry"),
        (
            lambda config: json.dumps({**config, "heads": [{"task": "a", "depth": 3}]}),
            "lacks an entry or has a wrong one",
        ),
    ],
)
def test_a_wrong_config(change: object, text: str, tmp_path: Path) -> None:
    built().save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(CheckpointError, match=text):
        TimmMultiTaskModel.from_pretrained(tmp_path)


def test_a_config_for_a_model_that_is_gone(tmp_path: Path) -> None:
    built().save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"test_vit"', '"test_vot"'))
    with pytest.raises(SaliencyRegError, match=r"has no model 'test_vot'. Did you mean 'test_vit'"):
        TimmMultiTaskModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", 64), ("test_vit", 32), ("test_vit2", 160), ("test_convnext", 64)]
)
def test_a_checkpoint_of_a_classifier(name: str, size: int, kind: str, tmp_path: Path) -> None:
    """Of other images (position embeddings are resized), with 7 classes, which are left out."""
    source = timm.create_model(name, num_classes=7).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / f"weights.{kind}"
    torch.save(source.state_dict(), path) if kind == "pth" else save_file(source.state_dict(), path)
    model = TimmMultiTaskModel(name, ["a", "b"], image_size=size, checkpoint_path=path).eval()
    state = source.state_dict()
    resized = {"pos_embed"} if size != 160 else set()
    for parameter, value in model.backbone.model.state_dict().items():
        assert parameter in resized or torch.equal(value, state[parameter]), parameter
    if not resized or "vit" not in name:
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(model.backbone(images), source.forward_features(images))
    if name == "test_convnext":  # and the norm behind the pooling, which begins the heads
        assert torch.equal(model.heads["a"][0].weight, state["head.norm.weight"])


def test_a_checkpoint_for_other_channels(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = TimmMultiTaskModel(
        "test_resnet", ["a"], in_chans=1, image_size=64, checkpoint_path=tmp_path / "weights.pth"
    )
    expected = source.state_dict()["conv1.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.backbone.model.conv1[0].weight.detach(), expected)


def test_wrong_checkpoints(tmp_path: Path) -> None:
    def loaded(name: str, file: str) -> TimmMultiTaskModel:
        return TimmMultiTaskModel(name, ["a"], image_size=64, checkpoint_path=tmp_path / file)

    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"is no checkpoint of 'test_vit': \d+ tensors are missing"):
        loaded("test_vit", "resnet.pth")
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(
        CheckpointError, match=r"is no checkpoint of 'resnet18': \d+ have no place \(layer1.2.conv1.weight"
    ):
        loaded("resnet18", "resnet34.pth")  # whose tensors all have a place in the larger one
    with pytest.raises(CheckpointError, match="is no checkpoint of 'resnet50'"):
        loaded("resnet50", "resnet34.pth")  # other shapes
    with pytest.raises(CheckpointNotFoundError, match="there is no file"):
        loaded("test_vit", "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="could not be read as weights"):
        loaded("test_vit", "text.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    with pytest.raises(CheckpointError, match=r"holds no tensors but \['epoch'\]"):
        loaded("test_vit", "epoch.pth")
    with pytest.raises(ConfigurationError, match="both name weights for the backbone. Leave one of them out"):
        TimmMultiTaskModel("test_vit", ["a"], pretrained=True, checkpoint_path="weights.pth")


def test_number_format_and_numbers_of_numpy(tmp_path: Path) -> None:
    head = HeadConfig(classes=np.int64(3), hidden=(np.int64(4),), dropout=np.float32(0.5))
    model = TimmMultiTaskModel("test_resnet", {"a": head, "b": np.int64(2)}, image_size=64, drop_rate=np.float32(0.25))
    model.double().eval().save(tmp_path)
    same = TimmMultiTaskModel.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(same(images)["a"], model(images)["a"])


def test_the_backbone_of_a_saved_multi_task_model(tmp_path: Path) -> None:
    before = built()
    before.save(tmp_path)
    model = TimmMultiTaskModel(
        "test_vit",
        ["other"],
        checkpoint_path=tmp_path / "model.safetensors",
        **{name: before.description[name] for name in ("in_chans", "image_size")},
    )
    for name, value in before.backbone.model.state_dict().items():
        assert torch.equal(model.backbone.model.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match="is no checkpoint of 'test_resnet'"):
        TimmMultiTaskModel("test_resnet", ["a"], checkpoint_path=tmp_path / "model.safetensors", in_chans=2)


def test_everyone_can_read_the_files(tmp_path: Path) -> None:
    built().save(tmp_path)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "config.json": 0o644,
        "model.safetensors": 0o644,
    }


def test_full_disk_is_one_of_our_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_model", full)
    with pytest.raises(CheckpointError, match=r"model.safetensors' could not be written .*Make room"):
        built().save(tmp_path)
    assert not list(tmp_path.iterdir())
