"""Parameter groups, freezing, transforms."""

from __future__ import annotations

import pytest
import timm
import timm.optim
import torch
from PIL import Image
from torch import nn

from saliency_reg.errors import ConfigurationError, ModuleNotFoundInModelError, WrongTypeError
from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, parameter_groups


def built(name: str = "test_resnet", size: int = 64, **options: object) -> TimmMultiTaskModel:
    torch.manual_seed(0)
    return TimmMultiTaskModel(name, {"a": 1, "b": 3}, head=HeadConfig(hidden=(8,)), image_size=size, **options)


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", 64), ("test_vit", 32), ("test_convnext", 64), ("test_mambaout", 64)]
)
def test_layer_decay_is_that_of_timm(name: str, size: int) -> None:
    model = built(name, size)
    full = timm.create_model(name, num_classes=3, **({"img_size": size} if name == "test_vit" else {}))
    no_decay = full.no_weight_decay() if hasattr(full, "no_weight_decay") else ()
    reference = by_name(
        full,
        timm.optim.param_groups_layer_decay(full, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=no_decay),
    )
    found = {
        name.removeprefix("backbone.model."): group
        for name, group in by_name(model, parameter_groups(model, 2.0, 0.05, layer_decay=0.5)).items()
    }
    shared = set(reference) & set(found)
    assert len(shared) > 10
    for parameter in shared:
        assert found[parameter]["lr"] == pytest.approx(2.0 * reference[parameter]["lr_scale"]), parameter
        assert found[parameter]["weight_decay"] == reference[parameter]["weight_decay"], parameter
    assert len({group["lr"] for group in found.values()}) > 3


def test_every_parameter_is_in_one_group() -> None:
    model = built("test_vit3", 32)
    model.freeze_backbone("blocks.1")
    groups = parameter_groups(model, 0.1, 0.01, backbone_rate_factor=0.1)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("backbone", pytest.approx(0.01), 0.01),
        ("backbone, no weight decay", pytest.approx(0.01), 0.0),
        ("heads", 0.1, 0.01),
        ("heads, no weight decay", 0.1, 0.0),
    ]
    torch.optim.AdamW(groups).step()


def test_no_weight_decay_where_timm_names_it() -> None:
    model = built("test_vit", 32)
    found = by_name(model, parameter_groups(model, 0.1, 0.01))
    assert found["backbone.model.pos_embed"]["weight_decay"] == 0  # three axes, but named by no_weight_decay()
    assert found["backbone.model.patch_embed.proj.weight"]["weight_decay"] == 0.01
    assert all(group["weight_decay"] == 0 for name, group in found.items() if name.endswith(".bias"))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"learning_rate": 0.0}, ConfigurationError, "learning_rate must be finite and above 0"),
        ({"learning_rate": "0.1"}, WrongTypeError, "learning_rate must be a number, found '0.1'"),
        ({"weight_decay": -1}, ConfigurationError, "weight_decay must be finite and at least 0, found -1"),
        ({"backbone_rate_factor": float("nan")}, ConfigurationError, "backbone_rate_factor must be finite"),
        ({"layer_decay": 0}, ConfigurationError, "layer_decay must be finite and above 0"),
        ({"model": nn.Linear(1, 1)}, WrongTypeError, "model must be a TimmMultiTaskModel, found Linear"),
    ],
)
def test_wrong_groups(arguments: dict, error: type[Exception], text: str) -> None:
    given = {"model": built(), "learning_rate": 0.1, **arguments}
    with pytest.raises(error, match=text):
        parameter_groups(given.pop("model"), given.pop("learning_rate"), **given)


def test_nothing_to_train() -> None:
    model = built()
    model.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"Call model.unfreeze_backbone\(\)"):
        parameter_groups(model, 0.1)


def test_a_frozen_backbone_does_not_move() -> None:
    model = built()
    model.freeze_backbone()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    for _ in range(2):
        model.train()
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1), weight_decay=0.1)
        sum(output.square().sum() for output in model(torch.randn(4, 3, 64, 64)).values()).backward()
        optimizer.step()
    assert model.heads.training
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    model.unfreeze_backbone()
    assert all(module.training for module in model.modules())
    model(torch.randn(4, 3, 64, 64))
    assert not torch.equal(model.backbone.model.bn1.running_mean, before["model.bn1.running_mean"])


def test_frozen_up_to_a_layer() -> None:
    model = built()
    model.freeze_backbone(up_to="layer2")
    inner = model.backbone.model
    frozen = [name for name, child in inner.named_children() if any(True for _ in child.parameters())]
    assert {name: all(not p.requires_grad for p in inner.get_submodule(name).parameters()) for name in frozen} == {
        "conv1": True, "bn1": True, "layer1": True, "layer2": True, "layer3": False, "layer4": False,
    }  # fmt: skip
    model.train()
    assert not inner.layer2[0].bn1.training
    assert inner.layer3[0].bn1.training
    assert all(p.requires_grad for p in inner.layer4.parameters())


def test_freezing_in_eval_mode_keeps_it() -> None:
    model = built().eval()
    model.freeze_backbone()
    model.unfreeze_backbone()
    assert not any(module.training for module in model.modules())


def test_what_has_no_gradient_stays_frozen() -> None:
    model = built("test_vit3", 32)
    idle = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert any("attn_pool" in name for name in idle)
    model.freeze_backbone()
    model.unfreeze_backbone()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == idle


@pytest.mark.parametrize(("name", "text"), [("layer22", "Did you mean 'layer2'"), ("zzz", "Use one of 'conv1', 'bn1'")])
def test_freezing_up_to_nothing(name: str, text: str) -> None:
    model = built()
    with pytest.raises(ModuleNotFoundInModelError, match=text):
        model.freeze_backbone(name)
    with pytest.raises(WrongTypeError, match="up_to must be the name of a module, found int"):
        model.freeze_backbone(2)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_transforms(channels: int, mode: str) -> None:
    model = built("test_vit", 48, in_chans=channels)
    picture = Image.new(mode, (80, 60), 128 if mode == "L" else (128, 0, 255))
    for train in (True, False):
        image = model.transforms(train)(picture)
        assert image.shape == (channels, 48, 48)
        assert model(image[None].expand(2, -1, -1, -1))["a"].shape == (2,)
    config = model.backbone.model.pretrained_cfg
    if channels == 3:
        expected = (torch.tensor([128 / 255, 0, 1]) - torch.tensor(config["mean"])) / torch.tensor(config["std"])
        torch.testing.assert_close(model.transforms(False)(picture).mean((1, 2)), expected, atol=1e-4, rtol=1e-4)
    names = [type(step).__name__ for step in model.transforms(True).transforms]
    assert "RandomHorizontalFlip" in names
    assert "RandomHorizontalFlip" not in [type(step).__name__ for step in model.transforms(False).transforms]
    with pytest.raises(WrongTypeError, match=r"Call model.transforms\(train=True\)"):
        model.transforms("train")
