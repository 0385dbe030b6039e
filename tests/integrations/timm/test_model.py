"""Multi-task models: layouts, heads, and the penalty."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.errors import ConfigurationError
from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel
from saliency_reg.integrations.timm.backbone.feature_layout import (
    ChannelsFirst,
    ChannelsLast,
    Tokens,
    Vector,
    token_grid,
)
from saliency_reg.integrations.timm.model.pooling import FeaturePooling
from tests.support.attachment import uniform

from .reference import heads_on_map, penalty

#: Name, image size, axes, grid, prefix tokens.
LAYOUTS = [
    ("test_resnet", 64, "[B, C, H, W]", (2, 2), 0),
    ("test_efficientnet", 64, "[B, C, H, W]", (2, 2), 0),
    ("test_mambaout", 64, "[B, H, W, C]", (2, 2), 0),
    ("test_vit", 48, "[B, L, C]", (3, 3), 1),
    ("test_vit4", 32, "[B, L, C]", (2, 2), 1),
    ("test_vit_relpos", 32, "[B, L, C]", (2, 2), 0),
    ("gmlp_ti16_224", 32, "[B, L, C]", (2, 2), 0),
    ("deit_tiny_distilled_patch16_224", 32, "[B, L, C]", (2, 2), 2),
    ("vit_tiny_patch16_dinov3_qkvb", 32, "[B, L, C]", (2, 2), 5),
    ("xcit_nano_12_p8_224", 32, "[B, L, C]", (4, 4), 1),
    ("levit_128s", 96, "[B, L, C]", (2, 2), 0),
    ("volo_d1_224", 64, "[B, L, C]", (4, 4), 1),
    ("coat_tiny", 64, "[B, L, C]", (8, 8), 1),
    ("efficientvim_m1", 128, "[B, L, C]", (2, 2), 0),
    ("pit_ti_224", 64, "[B, L, C]", None, 1),
]
#: Of each layout, one that is small.
SMALL = [("test_resnet", 64, (1, 2)), ("test_mambaout", 64, (0, 1)), ("test_vit", 32, (0,)), ("test_vit2", 32, (0,))]


def built(name: str, heads: object, size: int, **options: object) -> TimmMultiTaskModel:
    torch.manual_seed(0)
    return TimmMultiTaskModel(name, heads, image_size=size, **options).double()


def images(size: int, batch: int = 3, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "size", "axes", "grid", "prefix"), LAYOUTS)
def test_layouts(name: str, size: int, axes: str, grid: tuple[int, int] | None, prefix: int) -> None:
    model = TimmMultiTaskModel(name, {"smiling": 1, "age": 4}, image_size=size).eval()
    layout = model.backbone.layout
    assert (layout.axes, layout.grid, layout.num_prefix_tokens) == (axes, grid, prefix)
    batch = images(size, 2).float()
    feature = model.backbone(batch)
    assert feature.shape[layout.channel_axis] == layout.channels
    assert model.pooling(feature).shape == (2, layout.channels)
    assert {task: list(logits.shape) for task, logits in model(batch).items()} == {"smiling": [2], "age": [2, 4]}
    if grid is not None:
        assert list(layout.to_maps(feature, (size, size)).shape) == [2, layout.channels, *grid]


def test_maps_have_the_entries_where_they_belong() -> None:
    """What is changed in the upper right of the image changes the map there most: no axes are swapped."""
    for name, size in (("test_vit", 64), ("test_mambaout", 128), ("test_resnet", 128), ("hiera_tiny_224", 128)):
        model = built(name, ["a"], size).eval()
        before = images(size, 1)
        after = before.clone()
        after[:, :, : size // 2, size // 2 :] += 10
        maps = [model.backbone.layout.to_maps(model.backbone(batch), (size, size)) for batch in (before, after)]
        change = (maps[1] - maps[0]).norm(dim=1)
        quadrants = nn.functional.adaptive_avg_pool2d(change, 2).flatten()
        assert int(quadrants.argmax()) == 1, (name, quadrants)


def test_images_of_another_shape() -> None:
    model = built("test_vit", ["a"], 64, backbone_options={"dynamic_img_size": True}).eval()
    batch = torch.zeros(1, 3, 32, 96, dtype=torch.float64)
    assert model.backbone.layout.to_maps(model.backbone(batch), (32, 96)).shape == (1, 64, 2, 6)
    model = TimmMultiTaskModel("test_vit", ["a"], image_size=(32, 96))
    assert model.backbone.layout.grid == (2, 6)
    assert model(torch.zeros(1, 3, 32, 96))["a"].shape == (1,)


@pytest.mark.parametrize(
    ("tokens", "size", "grid"), [(49, (224, 224), (7, 7)), (12, (96, 128), (3, 4)), (5, (1, 5), (1, 5))]
)
def test_token_grid(tokens: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert token_grid(tokens, size) == grid


HEADS = [
    HeadConfig(norm="none"),
    HeadConfig(hidden=(8,)),
    HeadConfig(hidden=(8, 6), activation="tanh", norm="layer"),
    HeadConfig(hidden=(8,), activation="silu", pooling="average+max"),
    HeadConfig(hidden=(8,), activation="relu", pooling="none"),
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("name", "size", "positions"), SMALL)
def test_penalty_is_the_explicit_loop(name: str, size: int, positions: tuple[int, ...], head: HeadConfig) -> None:
    model = built(name, {"a": 1, "b": 1, "c": 3}, size, head=head).eval()
    regularizer = model.regularizer(strength=1.0, relations=uniform(3), metric="l1")
    batch = images(size)
    model(batch)
    found = regularizer()
    expected = penalty(model.backbone, heads_on_map(model), batch, positions)
    assert expected > 0
    torch.testing.assert_close(found.item(), expected, rtol=1e-9, atol=1e-12)
    regularizer.remove()
    with model.regularizer(strength=1.0, relations=uniform(3), feature="map", metric="l1") as regularizer:
        model(batch)
        torch.testing.assert_close(regularizer().item(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pooling", ["average", "max", "average+max", "token"])
def test_surgery_at_the_pooled_feature_is_that_at_the_map(pooling: str) -> None:
    model = built("test_vit", {"a": 1, "b": 1, "c": 3}, 32, head=HeadConfig(hidden=(8,), pooling=pooling)).eval()
    model.heads["b"].load_state_dict(model.heads["a"].state_dict())  # what one wants more of, the other wants less of
    batch, directions = images(32, 4), torch.rand(3, 4, dtype=torch.float64) * torch.tensor([[1.0], [-0.5], [1.0]])
    found = []
    for feature in ("auto", "map"):
        with model.regularizer(strength=0.5, surgery=PCGrad(), feature=feature, metric="l1") as regularizer:
            outputs = [output.reshape(4, -1)[:, 0] for output in model(batch).values()]
            losses = [(output * direction).mean() for output, direction in zip(outputs, directions)]
            model.zero_grad()
            (sum(losses) + regularizer()).backward()
            assert regularizer.report.surgery.conflicts > 0
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_heads_that_pool_differently_have_a_pooling_each() -> None:
    heads = {"a": HeadConfig(pooling="max"), "b": HeadConfig(hidden=(4,)), "c": HeadConfig(pooling="none")}
    model = built("test_resnet", heads, 64).eval()
    assert isinstance(model.pooling, nn.Identity)
    batch = images(64)
    with model.regularizer(strength=1.0, relations=uniform(3), metric="l1", pool="sum") as regularizer:
        model(batch)
        found = regularizer().item()
    expected = penalty(model.backbone, list(model.heads.values()), batch, (1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ConfigurationError, match="unknown feature 'layer4'. Use 'auto' or 'map'"):
        model.regularizer(feature="layer4", strength=0.1, metric="l1")


def test_linear_heads_behind_average_pooling_have_their_weight_rows_as_saliency() -> None:
    model = built("test_resnet", ["a", "b"], 64)
    regularizer = model.regularizer(strength=1.0, relations=uniform(2), metric="l1")
    model(images(64))
    rows = [head[0].weight for head in model.heads.values()]
    torch.testing.assert_close(regularizer(), (rows[0] - rows[1]).abs().sum())


def test_channels_last_is_the_permuted_channels_first() -> None:
    model = built("test_mambaout", {"a": 1, "b": 1, "c": 3}, 64, head=HeadConfig(hidden=(8,), norm="none")).eval()

    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model.backbone
            layout = ChannelsFirst(model.backbone.layout.channels, model.backbone.layout.grid)
            self.heads = nn.ModuleDict(
                {task: nn.Sequential(FeaturePooling(layout, "average"), *head) for task, head in model.heads.items()}
            )

        def forward(self, batch: Tensor) -> dict[str, Tensor]:
            feature = self.backbone(batch).permute(0, 3, 1, 2)
            return {task: head(feature) for task, head in self.heads.items()}

    permuted = Permuted()
    options = {"heads": "heads", "strength": 1.0, "pool": "sum"}
    batch = images(64)
    found = []
    at_map = {"feature": "backbone"}
    axis = {"channel_axis": model.backbone.layout.channel_axis}
    for own, more in ((model, {**at_map, **axis}), (permuted, {}), (model, at_map), (model, {})):
        with SaliencyRegularizer(
            own, relations=uniform(3), **{"strength": 0.1, "metric": "l1", **options}, **more
        ) as regularizer:
            own(batch)
            found.append(regularizer())
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])  # without channel_axis it would be another number
    torch.testing.assert_close(found[0], found[3])


@pytest.mark.parametrize(
    "layout", [ChannelsFirst(3, (2, 4)), ChannelsLast(3, (2, 4)), Tokens(3, (2, 4), 2), Vector(3, None)]
)
def test_poolings(layout: object) -> None:
    maps, prefix = torch.randn(5, 3, 2, 4), torch.randn(5, 2, 3)
    feature = {
        ChannelsFirst: maps,
        ChannelsLast: maps.permute(0, 2, 3, 1),
        Tokens: torch.cat([prefix, maps.flatten(2).transpose(1, 2)], 1),
        Vector: maps.mean((2, 3)),
    }[type(layout)]
    if isinstance(layout, Vector):
        torch.testing.assert_close(FeaturePooling(layout, "average")(feature), feature)
        return
    torch.testing.assert_close(layout.to_maps(feature, (20, 40)), maps)
    for kind, expected in {
        "average": maps.mean((2, 3)),
        "max": maps.amax((2, 3)),
        "average+max": (maps.mean((2, 3)) + maps.amax((2, 3))) / 2,
    }.items():
        torch.testing.assert_close(FeaturePooling(layout, kind)(feature), expected)
    everything = maps.flatten(2).transpose(1, 2)
    if isinstance(layout, Tokens):
        torch.testing.assert_close(FeaturePooling(layout, "token")(feature), prefix[:, 0])
        everything = torch.cat([prefix, everything], 1)
    torch.testing.assert_close(FeaturePooling(layout, "none")(feature), everything.flatten(1))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", 64),
        ("test_vit", 32),
        ("test_vit2", 32),
        ("test_convnext", 64),
        ("test_vit_relpos", 32),
        ("crossvit_tiny_240", 240),
        ("efficientvim_m1", 128),
    ],
)
def test_auto_pools_and_normalizes_as_timm_does(name: str, size: int) -> None:
    model = built(name, ["a"], size).eval()
    for parameter in model.heads.parameters():  # a norm that is the identity would hide a lost one
        nn.init.normal_(parameter)
    for norm in (module for module in model.backbone.model.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    from saliency_reg.integrations.timm.model.task_heads import build_heads

    pooling, heads = build_heads(model.head_configs, model.backbone, 0.0)
    batch, inner = images(size, 2), model.backbone.model
    pooled = heads.double()["a"][:-2](pooling(model.backbone(batch)))  # all but Linear and Flatten
    expected = inner.forward_head(inner.forward_features(batch), pre_logits=True)
    torch.testing.assert_close(pooled, expected.flatten(1))


@pytest.mark.parametrize(
    ("name", "size"), [("test_vit3", 32), ("lcnet_035", 64), ("test_convnext", 64), ("vgg11", 64), ("coat_tiny", 64)]
)
def test_every_parameter_that_requires_grad_gets_a_gradient(name: str, size: int) -> None:
    """What only timm's classifier part uses would stall DistributedDataParallel."""
    model = TimmMultiTaskModel(name, {"a": 1, "b": 2}, image_size=size)
    sum(output.square().sum() for output in model(images(size, 2).float()).values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_surgery_and_a_step() -> None:
    model = built("test_vit", {"a": 1, "b": 1, "c": 3}, 32, head=HeadConfig(hidden=(8,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = model.regularizer(strength=0.1, optimizer=optimizer, surgery=PCGrad(), metric="l1")
    losses = {task: output.square().mean() for task, output in model(images(32)).items()}
    before = model.backbone.model.patch_embed.proj.weight.detach().clone()
    (sum(losses.values()) + regularizer(losses=losses)).backward()
    optimizer.step()
    assert regularizer.report.surgery is not None
    assert int(regularizer.relations.updates) == 1
    assert not torch.equal(before, model.backbone.model.patch_embed.proj.weight)


def test_building_leaves_statistics_modes_and_random_numbers() -> None:
    import timm

    torch.manual_seed(0)
    timm.create_model("test_resnet", num_classes=0)
    nn.Linear(96, 1)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    model = TimmMultiTaskModel("test_resnet", ["a"], image_size=64)
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(module.training for module in model.modules())
    assert all(int(value) == 0 for name, value in model.state_dict().items() if name.endswith("num_batches_tracked"))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_options_reach_the_backbone_and_the_heads() -> None:
    model = TimmMultiTaskModel(
        "test_vit",
        {"a": HeadConfig(classes=2, hidden=(8,), dropout=0.5), "b": 3, "c": HeadConfig()},
        head=HeadConfig(activation="relu", hidden=(4,)),
        in_chans=5,
        image_size=48,
        drop_rate=0.25,
        drop_path_rate=0.1,
        backbone_options={"init_values": 0.5},
    )
    assert [module.p for module in model.heads.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.25, 0.25]
    assert [type(module).__name__ for module in model.heads["b"]] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert model.backbone.model.patch_embed.proj.in_channels == 5
    assert model.backbone.model.blocks[0].ls1.gamma[0].item() == 0.5
    assert model.backbone.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert (model.tasks, model.image_size) == (("a", "b", "c"), (48, 48))
    assert model(torch.randn(2, 5, 48, 48))["a"].shape == (2, 2)
