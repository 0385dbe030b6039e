"""Saliency maps, against loops, and what they must not touch."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.errors import (
    CaptureError,
    ConfigurationError,
    ModuleNotFoundInModelError,
    ShapeError,
    TaskError,
    WrongTypeError,
)
from saliency_reg.integrations.timm import (
    HeadConfig,
    NoSpatialFeatureError,
    TimmMultiTaskModel,
    saliency_regularizer,
    task_saliency_maps,
)

from .reference import gradients, heads_on_map

METHODS = ["gradient", "gradient_times_activation", "grad_cam"]
HEADS = {"a": 1, "b": 1, "c": 3}


def built(name: str = "test_resnet", size: int = 64, **options: object) -> TimmMultiTaskModel:
    torch.manual_seed(0)
    return TimmMultiTaskModel(name, HEADS, **{"head": HeadConfig(hidden=(8,)), "image_size": size, **options}).double()


def images(size: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def as_map(tensor: Tensor, name: str) -> list[list[Tensor]]:
    """``[row][column]``: the channels there, of one sample."""
    if name == "test_mambaout":
        return [list(row) for row in tensor]
    if "vit" in name:
        tokens = tensor[1:] if name != "test_vit_relpos" else tensor
        side = int(len(tokens) ** 0.5)
        return [[tokens[row * side + column] for column in range(side)] for row in range(side)]
    return [[tensor[:, row, column] for column in range(tensor.shape[2])] for row in range(tensor.shape[1])]


def at_position(own: Tensor, value: Tensor, mean: Tensor, method: str) -> float:
    """From gradient, feature, and mean gradient over positions, ``[C]`` each."""
    if method == "gradient":
        return sum(float(each) ** 2 for each in own) ** 0.5
    if method == "gradient_times_activation":
        return sum(float(g * a) for g, a in zip(own, value))
    return max(sum(float(g * a) for g, a in zip(mean, value)), 0.0)


def slow(name: str, found: list[list[tuple[Tensor, Tensor]]], method: str) -> Tensor:
    """``[T, B, H, W]`` with a loop over each axis."""
    maps: list[list[list[list[float]]]] = []
    for of_task in found:
        maps.append([])
        for gradient, activation in of_task:
            gradient_map, activation_map = as_map(gradient, name), as_map(activation, name)
            flat = [each for row in gradient_map for each in row]
            mean = sum(flat[1:], start=flat[0]) / len(flat)
            maps[-1].append(
                [
                    [at_position(own, value, mean, method) for own, value in zip(gradient_row, activation_row)]
                    for gradient_row, activation_row in zip(gradient_map, activation_map)
                ]
            )
    return torch.tensor(maps, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", 64), ("test_mambaout", 64), ("test_vit2", 48), ("test_vit_relpos", 32)]
)
def test_maps_are_those_of_loops(name: str, size: int, method: str) -> None:
    model = built(name, size).eval()
    expected = slow(name, gradients(model.backbone, heads_on_map(model), images(size)), method)
    found = task_saliency_maps(model, images(size), method=method)
    assert bool(expected.any())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(task_saliency_maps(model, images(size), ["c", "a"], method=method), expected[[2, 0]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", 64), ("test_mambaout", 64), ("test_vit2", 48), ("test_vit_relpos", 32)]
)
def test_an_unmodified_model(name: str, size: int, method: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **({"img_size": size} if "vit" in name else {})).double().eval()
    heads = [lambda f, task=task: model.forward_head(f)[:, task] for task in range(3)]
    expected = slow(name, gradients(model.forward_features, heads, images(size)), method)
    torch.testing.assert_close(task_saliency_maps(model, images(size), method=method), expected)
    torch.testing.assert_close(task_saliency_maps(model, images(size), [2], method=method), expected[2:])


def test_the_sum_over_positions_is_the_logit() -> None:
    """Completeness, for linear heads behind average pooling."""
    model = TimmMultiTaskModel("test_resnet", ["a", "b"], image_size=96).double().eval()
    maps = task_saliency_maps(model, images(96))
    for own, (task, logit) in zip(maps, model(images(96)).items()):
        torch.testing.assert_close(own.sum((1, 2)) + model.heads[task][-2].bias, logit)


def test_the_sum_is_kept_where_maps_are_joined() -> None:
    torch.manual_seed(0)
    model = timm.create_model("efficientvim_m1", num_classes=2).double().eval()
    bias = sum(weight * head.bias for weight, head in zip(model.weights.softmax(-1), model.heads))
    maps = task_saliency_maps(model, images(128))
    torch.testing.assert_close(maps.sum((2, 3)).T + bias, model(images(128)))


@pytest.mark.parametrize(
    ("name", "size", "module"),
    [
        ("test_vit", 48, "blocks.5.norm1"),
        ("pit_ti_224", 64, "transformers.2.blocks.3.norm1"),
        ("xcit_nano_12_p8_224", 32, "cls_attn_blocks.1.norm1"),
    ],
)
def test_behind_a_class_token_the_last_map_that_counts_is_taken(name: str, size: int, module: str) -> None:
    model = built(name, size).eval()
    found = task_saliency_maps(model, images(size))
    torch.testing.assert_close(found, task_saliency_maps(model, images(size), feature=f"backbone.model.{module}"))
    assert all(bool(own.any()) for own in found)


def test_a_named_feature() -> None:
    model = built().eval()
    inner = model.backbone.model

    def until_layer3(image: Tensor) -> Tensor:
        feature = inner.maxpool(inner.act1(inner.bn1(inner.conv1(image))))
        return inner.layer3(inner.layer2(inner.layer1(feature)))

    heads = [lambda f, head=head: head(inner.layer4(f)) for head in heads_on_map(model)]
    expected = slow("test_resnet", gradients(until_layer3, heads, images()), "gradient_times_activation")
    torch.testing.assert_close(task_saliency_maps(model, images(), feature="layer3"), expected)
    torch.testing.assert_close(task_saliency_maps(model, images(), feature=inner.layer3), expected)
    assert task_saliency_maps(model, images(), feature="layer1.0.bn1").shape == (3, 2, 16, 16)  # changed in place


def test_sizes() -> None:
    model = built().eval()
    maps = task_saliency_maps(model, images())
    assert maps.shape == (3, 2, 2, 2)
    for size, target in (("image", (64, 64)), (10, (10, 10)), ((4, 6), (4, 6))):
        expected = nn.functional.interpolate(maps, target, mode="bilinear", align_corners=False)
        assert torch.equal(task_saliency_maps(model, images(), size=size), expected)


def test_float16_and_float32() -> None:
    model = built()
    assert task_saliency_maps(model.float(), images().float()).dtype == torch.float32
    half = task_saliency_maps(model.bfloat16(), images().bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("unmodified", [False, True])
@pytest.mark.parametrize(("name", "size"), [("test_resnet", 64), ("test_vit", 32)])
def test_nothing_is_touched(name: str, size: int, unmodified: bool) -> None:
    model: nn.Module = built(name, size)
    if unmodified:
        model = timm.create_model(name, num_classes=3, **({"img_size": size} if "vit" in name else {})).double()
    model.train()
    next(model.children()).eval()
    first, second, *_ = model.parameters()
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    attributes = [set(vars(module)) for module in model.modules()]
    state, batch = torch.get_rng_state(), images(size)
    maps = task_saliency_maps(model, batch)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(task_saliency_maps(model, batch), maps)
            inside = images(size)
            assert torch.equal(task_saliency_maps(model, inside), maps)
    assert not maps.requires_grad
    assert not batch.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert trained == [parameter.requires_grad for parameter in model.parameters()]
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(second.grad, torch.ones_like(second))
    assert all(p.grad is None for p in model.parameters() if p is not second)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.parametrize("way", ["multi-task", "auto", "map"])
def test_an_attached_regularizer_does_not_notice(way: str, surgery: bool) -> None:
    found = []
    for look in (False, True):
        options = {"surgery": PCGrad()} if surgery else {}  # each has random numbers of its own
        torch.manual_seed(0)
        model = (
            built("test_vit", 32) if way == "multi-task" else timm.create_model("test_vit", num_classes=3, img_size=32)
        )
        model = model.double()
        regularizer = (
            SaliencyRegularizer(model, heads="heads", **{"strength": 0.1, "metric": "l1", **options})
            if way == "multi-task"
            else saliency_regularizer(
                model, ["a", "b", "c"], feature=way, **{"strength": 0.1, "metric": "l1", **options}
            )
        )
        if look:
            task_saliency_maps(model, images(32))
            with pytest.raises(CaptureError, match="has not run a forward yet"):  # that was no forward of a training
                regularizer()
        outputs = model(images(32))
        if look:
            task_saliency_maps(model, images(32, 5))
        outputs = list(outputs.values()) if isinstance(outputs, dict) else list(outputs.unbind(1))
        loss = sum(output.square().mean() for output in outputs) + regularizer()
        if look:
            task_saliency_maps(model, images(32, 5))
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        assert regularizer.enabled
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_no_gradient_of_a_parameter_is_computed() -> None:
    model = built().eval()
    seen = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: seen.append(gradient))
    task_saliency_maps(model, images())
    assert seen == []


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "lime"}, ConfigurationError, "unknown method 'lime'. Choose one of 'gradient_times_activation'"),
        ({"size": "full"}, ConfigurationError, "unknown size 'full'. Pass size='image'"),
        ({"size": 0}, ConfigurationError, "at least 1"),
        ({"size": (1, 2, 3)}, WrongTypeError, r"size must be 'image', an int or \(height, width\), found \(1, 2, 3\)"),
        ({"tasks": ["aa"]}, TaskError, r"'aa' is no task of this model. Did you mean 'a'"),
        ({"tasks": "a"}, WrongTypeError, r"tasks must be a list, found 'a'. Pass tasks=\['a'\]"),
        ({"tasks": []}, TaskError, "tasks is empty"),
        ({"tasks": ["a", "a"]}, TaskError, "names a task twice"),
        ({"feature": "layer9"}, ModuleNotFoundInModelError, "has no feature 'layer9'. Did you mean"),
        (
            {"feature": "heads.a.1"},
            NoSpatialFeatureError,
            r"the feature 'heads.a.1' is \[B, C\], 8 channels, no positions",
        ),
        ({"feature": "heads.a.0"}, NoSpatialFeatureError, "Name a module in front of the pooling"),
    ],
)
def test_wrong_arguments(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        task_saliency_maps(built(), images(), **options)


def test_wrong_models_and_images() -> None:
    for wrong in (
        torch.zeros(3, 64, 64),
        torch.zeros(0, 3, 64, 64),
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        None,
    ):
        with pytest.raises(ShapeError, match=r"images must be a floating-point tensor \[B, in_chans, H, W\]"):
            task_saliency_maps(built(), wrong)
    with pytest.raises(WrongTypeError, match="model must be what timm.create_model returns"):
        task_saliency_maps(nn.Conv2d(3, 3, 1), images())
    model = timm.create_model("test_resnet", num_classes=3).double()
    for wrong in (["smiling"], [3], [True], [-1]):
        with pytest.raises(TaskError, match="is no class of ResNet, which has 3. Pass numbers from 0 to 2"):
            task_saliency_maps(model, images(), wrong)


@pytest.mark.parametrize(("name", "size", "side"), [("test_resnet", 64, 2), ("test_vit", 32, 2), ("pit_ti_224", 64, 2)])
def test_a_head_that_depends_on_nothing_has_a_map_of_zeros(name: str, size: int, side: int) -> None:
    model = built(name, size)
    expected = task_saliency_maps(model, images(size))
    nn.init.zeros_(model.heads["b"][-2].weight)
    found = task_saliency_maps(model, images(size))
    assert found.shape == (3, 2, side, side)
    assert not bool(found[1].any())
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


def test_a_feature_that_no_task_reads() -> None:
    model = built()
    model.aside = nn.Conv2d(3, 4, 3).double()

    def look_aside(_: nn.Module, args: tuple) -> None:
        model.aside(args[0])

    model.backbone.register_forward_pre_hook(look_aside)
    with pytest.raises(NoSpatialFeatureError, match="a task does not depend on the feature 'aside'"):
        task_saliency_maps(model, images(), feature="aside")
    model.unused = nn.Conv2d(3, 4, 3)
    with pytest.raises(CaptureError, match="the feature 'unused' did not run"):
        task_saliency_maps(model, images(), feature="unused")
