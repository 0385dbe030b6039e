"""The regularizer on the classifier of an unmodified timm model."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.errors import (
    AlreadyAttachedError,
    ConfigurationError,
    SecondDerivativeError,
    TaskError,
    WrongTypeError,
)
from saliency_reg.integrations.timm import (
    ClassifierNotFoundError,
    FeatureNotFoundError,
    ImageSizeError,
    find_classifier,
    find_feature,
    saliency_regularizer,
    task_saliency_maps,
)
from tests.support.attachment import is_clean, uniform

from .reference import penalty

TASKS = ["a", "b", "c"]
#: Name, image size, names of the classifier, name of the feature map.
MODELS = [
    ("test_resnet", 64, ("fc",), "layer4"),
    ("test_efficientnet", 64, ("classifier",), "bn2"),
    ("test_convnext", 64, ("head.fc",), "norm_pre"),
    ("test_mambaout", 64, ("head.fc",), "stages"),
    ("test_vit", 32, ("head",), "norm"),
    ("test_vit3", 32, ("head",), "norm"),
    ("dla46x_c", 64, ("fc",), "level5"),
    ("deit_tiny_distilled_patch16_224", 32, ("head", "head_dist"), "norm"),
    ("pit_ti_224", 64, ("head",), "norm"),
    ("lcnet_035", 64, ("classifier",), "blocks"),
]
#: With several classifiers, or several maps.
SEVERAL = [
    ("crossvit_tiny_240", 240),
    ("coat_tiny", 32),
    ("efficientvim_m1", 64),
    ("deit_tiny_distilled_patch16_224", 32),
]


def built(name: str, size: int, classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    takes_size = timm.get_pretrained_cfg(name).fixed_input_size
    return timm.create_model(name, num_classes=classes, **({"img_size": size} if takes_size else {})).double()


def images(size: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "size", "classifier", "feature"), MODELS)
def test_what_is_found(name: str, size: int, classifier: tuple[str, ...], feature: str) -> None:
    model = built(name, size).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert find_classifier(model) == classifier
    assert find_feature(model) == feature
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert is_clean(model)


@pytest.mark.parametrize("feature", ["auto", "map"])
@pytest.mark.parametrize(("name", "size"), [("test_resnet", 64), ("test_vit", 32), ("test_mambaout", 64), *SEVERAL])
def test_penalty_is_the_explicit_loop(name: str, size: int, feature: str) -> None:
    model = built(name, size).eval()
    batch = images(size, 2)
    with saliency_regularizer(
        model, TASKS, strength=1.0, relations=uniform(3), feature=feature, metric="l1"
    ) as regularizer:
        model(batch)
        found = regularizer()
    whole = len(find_classifier(model)) == 1

    def run(image: Tensor) -> list[Tensor]:
        features = model.forward_features(image)
        if feature == "auto" and whole:
            return [model.forward_head(features, pre_logits=True).flatten(1)]
        return list(features) if isinstance(features, list) else [features]

    maps = run(batch[:1])
    shapes = [each.shape[1:] for each in maps]

    def flat(image: Tensor) -> Tensor:
        return torch.cat([each.flatten(1) for each in run(image)], 1)

    def column(task: int):
        def of(features: Tensor) -> Tensor:
            parts = features.split([shape.numel() for shape in shapes], 1)
            parts = [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]
            if feature == "auto" and whole:
                return model.get_submodule(find_classifier(model)[0])(parts[0])[:, task]
            return model.forward_head(parts if len(parts) > 1 else parts[0])[:, task]

        return of

    expected = _penalty_of_flat(flat, [column(task) for task in range(3)], batch, shapes, model)
    assert expected > 0
    torch.testing.assert_close(found.item(), expected, rtol=1e-9, atol=1e-12)


def _penalty_of_flat(flat: object, columns: list, batch: Tensor, shapes: list, model: nn.Module) -> float:
    """The saliency of several maps: each summed over its positions, then side by side."""
    from .reference import gradients

    found = gradients(flat, columns, batch)

    def pooled(gradient: Tensor) -> Tensor:
        parts = []
        for part, shape in zip(gradient.split([shape.numel() for shape in shapes]), shapes):
            part = part.unflatten(0, shape)
            if part.ndim == 1:
                parts.append(part)
            elif part.ndim == 2:  # tokens [L, C], but [C, L] of EfficientViM
                parts.append(part.sum(1 if type(model).__name__ == "EfficientViM" else 0))
            else:  # [C, H, W], but [H, W, C] of MambaOut
                parts.append(part.sum((0, 1) if type(model).__name__ == "MambaOut" else (1, 2)))
        return torch.cat(parts)

    total = 0.0
    for one in range(3):
        for other in range(one + 1, 3):
            for sample in range(len(batch)):
                difference = pooled(found[one][sample][0]) - pooled(found[other][sample][0])
                total += float(difference.abs().sum()) / len(batch)
    return total


@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", 64), ("dla46x_c", 64), ("test_efficientnet", 64), ("test_vit4", 32)]
)
def test_behind_average_pooling_the_input_of_the_classifier_says_what_the_map_says(name: str, size: int) -> None:
    """The reason for the default: the same penalty, gradient and surgery, without differentiating anything."""
    found = []
    for feature in ("auto", "map"):
        model = built(name, size).eval()
        regularizer = saliency_regularizer(model, TASKS, strength=1.0, feature=feature, surgery=PCGrad(), metric="l1")
        logits = model(images(size))
        loss = regularizer()
        losses = (logits - torch.arange(3)).square().mean(0)
        (losses.sum() + loss).backward()
        weight = model.get_submodule(find_classifier(model)[0]).weight.grad
        first = next(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
        found.append((loss.detach(), weight, first, torch.tensor(regularizer.report.surgery.conflicts)))
    if name == "test_vit4":  # a norm lies between the map and the classifier: another feature, another saliency
        assert not torch.allclose(found[0][0], found[1][0])
        return
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_closed_form_for_a_linear_classifier() -> None:
    model = built("test_resnet", 64)
    regularizer = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    model(images(64))
    regularizer()
    assert "closed form" in str(regularizer)


def with_named_feature(model: nn.Module, size: int, feature: str) -> float:
    with saliency_regularizer(
        model, TASKS, strength=1.0, relations=uniform(3), feature=feature, metric="l1"
    ) as regularizer:
        model(images(size))
        found = regularizer()
        assert feature in str(regularizer)
    return found.item()


def test_a_named_feature() -> None:
    model = built("test_resnet", 64).eval()
    heads = [lambda f, task=task: model.forward_head(model.layer4(f))[:, task] for task in range(3)]
    expected = penalty(lambda image: _until_layer3(model, image), heads, images(64), (1, 2))
    torch.testing.assert_close(with_named_feature(model, 64, "layer3"), expected, rtol=1e-9, atol=1e-12)


def test_a_named_feature_in_front_of_a_pair() -> None:
    model = built("deit_tiny_distilled_patch16_224", 32).eval()
    heads = [lambda f, task=task: model.forward_head(f)[:, task] for task in range(3)]
    expected = penalty(model.forward_features, heads, images(32), (0,))
    torch.testing.assert_close(with_named_feature(model, 32, "norm"), expected, rtol=1e-9, atol=1e-12)


def _until_layer3(model: nn.Module, image: Tensor) -> Tensor:
    feature = model.maxpool(model.act1(model.bn1(model.conv1(image))))
    return model.layer3(model.layer2(model.layer1(feature)))


def test_attention_pooling_at_the_map() -> None:
    """Behind the map there is a fused kernel without a second derivative: run as it is, it would end in an error."""
    model = built("test_vit3", 32).float()
    batch = images(32).float()
    regularizer = SaliencyRegularizer(model, heads="head", tasks=TASKS, feature="norm", strength=0.1, metric="l1")
    model(batch)
    with pytest.raises(SecondDerivativeError, match="sdpa_kernel"):
        regularizer()
    regularizer.remove()
    regularizer = saliency_regularizer(model, TASKS, feature="map", strength=0.1, metric="l1")
    logits = model(batch)
    (logits.sum() + regularizer()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    regularizer.remove()
    torch.testing.assert_close(model(batch), logits)


@pytest.mark.parametrize("feature", ["auto", "map"])
@pytest.mark.parametrize(("name", "size"), [("test_resnet", 64), ("crossvit_tiny_240", 240)])
def test_nothing_is_left_behind(name: str, size: int, feature: str) -> None:
    model = built(name, size).eval()
    keys, modules = list(model.state_dict()), [own for own, _ in model.named_modules()]
    before = model(images(size, 2))
    regularizer = saliency_regularizer(model, TASKS, feature=feature, strength=0.1, metric="l1")
    assert (list(model.state_dict()), [own for own, _ in model.named_modules()]) == (keys, modules)
    assert torch.equal(model(images(size, 2)), before)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_clean(twin) or set(vars(twin)) & {"forward_head"}
        assert torch.equal(twin(images(size, 2)), before)
        saliency_regularizer(twin, TASKS, feature=feature, strength=0.1, metric="l1").remove()
    with pytest.raises(AlreadyAttachedError):
        saliency_regularizer(model, TASKS, feature=feature, strength=0.1, metric="l1")
    assert regularizer() >= 0  # the one that is attached still works
    regularizer.remove()
    assert is_clean(model)
    del regularizer
    saliency_regularizer(model, TASKS, feature=feature, strength=0.1, metric="l1")  # dropped at once
    gc.collect()
    assert is_clean(model)
    with pytest.raises(ConfigurationError):
        saliency_regularizer(model, TASKS, feature=feature, metric="l7", strength=0.1)
    assert is_clean(model)


def test_state_and_copies_of_the_regularizer() -> None:
    model = built("deit_tiny_distilled_patch16_224", 32)
    regularizer = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    model(images(32))
    regularizer()
    regularizer.step()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(regularizer)))
    twin.remove()
    assert not is_clean(model)  # the copy was attached to nothing
    again = saliency_regularizer(built("deit_tiny_distilled_patch16_224", 32), TASKS, strength=0.1, metric="l1")
    again.load_state_dict(regularizer.state_dict())
    assert torch.equal(again.relations.matrix(), regularizer.relations.matrix())


def test_a_frozen_backbone() -> None:
    for feature in ("auto", "map"):
        model = built("deit_tiny_distilled_patch16_224", 32)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        model.head_dist.requires_grad_(True)
        regularizer = saliency_regularizer(model, TASKS, feature=feature, strength=0.1, metric="l1")
        model(images(32))
        penalty = regularizer()
        penalty.backward()
        assert bool(model.head.weight.grad.any())


def test_distributed_data_parallel() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name, feature in (
            ("test_resnet", "auto"),
            ("test_resnet", "map"),
            ("deit_tiny_distilled_patch16_224", "auto"),
        ):
            found = []
            for wrapped in (False, True):
                model = built(name, 32)
                outer = nn.parallel.DistributedDataParallel(model) if wrapped else model
                with saliency_regularizer(outer, TASKS, feature=feature, strength=1.0, metric="l1") as regularizer:
                    loss = outer(images(32)).sum() + regularizer()
                    loss.backward()
                    found.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
            torch.testing.assert_close(found[0], found[1])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("tasks", "options", "error", "text"),
    [
        (["a", "b"], {}, TaskError, "tasks has 2 names, but ResNet has 3 classes. .*num_classes=2"),
        (["a", "b", "a"], {}, TaskError, r"the task names \['a'\] occur more than once"),
        ("abc", {}, WrongTypeError, "tasks must be a list of names"),
        (TASKS, {"heads": "fc"}, ConfigurationError, r"\['heads'\] are found here"),
    ],
)
def test_wrong_arguments(tasks: object, options: dict, error: type[Exception], text: str) -> None:
    model = built("test_resnet", 64)
    with pytest.raises(error, match=text):
        saliency_regularizer(model, tasks, **{"strength": 0.1, "metric": "l1", **options})
    assert is_clean(model)


def test_no_classifier() -> None:
    for model in (built("test_resnet", 64, 0), built("test_vit", 32, 0)):
        for call in (
            find_classifier,
            find_feature,
            lambda model: saliency_regularizer(model, TASKS, strength=0.1, metric="l1"),
        ):
            with pytest.raises(
                ClassifierNotFoundError, match=r"num_classes=0.*Use timm.create_model\(name, num_classes="
            ):
                call(model)
    with pytest.raises(WrongTypeError, match="model must be what timm.create_model returns, found Sequential"):
        saliency_regularizer(nn.Sequential(nn.Linear(2, 3)), TASKS, strength=0.1, metric="l1")


def test_no_single_feature() -> None:
    with pytest.raises(FeatureNotFoundError, match=r"returns 2 maps, of norm.0, norm.1.*feature='map'"):
        find_feature(built("crossvit_tiny_240", 240))
    with pytest.raises(FeatureNotFoundError, match="computes its feature map behind the last module"):
        find_feature(built("efficientvim_m1", 64))


def test_a_model_that_does_not_run() -> None:
    model = built("test_vit", 32)
    model.norm = nn.Linear(3, 3)
    with pytest.raises(ImageSizeError, match=r"could not be run on a blank image \[1, 3, 32, 32\] \(RuntimeError: "):
        find_classifier(model)
    assert is_clean(model)


def test_a_model_that_does_not_tell_its_size() -> None:
    """As VOLO of older versions of timm."""
    model = built("deit_tiny_distilled_patch16_224", 32)
    model._traits = model._model_args = {}
    model.patch_embed.img_size = None
    model.patch_embed.strict_img_size = False
    with pytest.raises(ImageSizeError, match=r"\[1, 3, 224, 224\].*Pass image_size= with the size"):
        find_classifier(model)
    assert find_classifier(model, 32) == ("head", "head_dist")
    assert find_feature(model, (32, 32)) == "norm"
    saliency_regularizer(model, TASKS, image_size=32, strength=0.1, metric="l1").remove()
    assert is_clean(model)


def test_a_compiled_model_is_refused_and_looked_at_all_the_same() -> None:
    model = built("test_resnet", 64)
    compiled = torch.compile(model)
    for feature in ("auto", "map"):
        with pytest.raises(ConfigurationError, match=r"compiled by torch.compile.*Compile the backbone alone"):
            saliency_regularizer(compiled, ["a", "b", "c"], feature=feature, strength=0.1, metric="l1")
    assert is_clean(model)
    maps = task_saliency_maps(compiled, images(64))
    assert torch.equal(maps, task_saliency_maps(model, images(64)))


def test_a_forward_head_by_hand_is_neither_passed_by_nor_lost() -> None:
    model = built("test_resnet", 64)
    own = model.forward_head
    model.forward_head = lambda features, **options: 2 * own(features, **options)
    with pytest.raises(ConfigurationError, match="was replaced by hand"):
        saliency_regularizer(model, ["a", "b", "c"], feature="map", strength=0.1, metric="l1")
    assert torch.equal(model.eval()(images(64)), 2 * own(model.forward_features(images(64))))
