"""Tasks that come and go on a multi-task model: weights that are there stay, saved and loaded as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer
from saliency_reg.errors import ConfigurationError, StateMismatchError, TaskError, WrongTypeError
from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, parameter_groups

NAMES = {"test_resnet": 64, "test_vit": 32, "test_convnext": 64}


def built(name: str = "test_resnet", heads: Any = None, **options: Any) -> TimmMultiTaskModel:
    torch.manual_seed(0)
    heads = {"a": HeadConfig(hidden=(8,)), "b": 3} if heads is None else heads
    return TimmMultiTaskModel(name, heads, image_size=NAMES[name], **options).double()


def images(name: str = "test_resnet", batch: int = 3) -> Tensor:
    size = NAMES[name]
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def logits(model: nn.Module, name: str = "test_resnet") -> dict[str, Tensor]:
    with torch.no_grad():
        return model.eval()(images(name))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("name", list(NAMES))
def test_a_head_comes_and_goes(name: str, tmp_path: Path) -> None:
    model = built(name, drop_rate=0.1)
    before, outputs = state(model), logits(model, name)
    torch.manual_seed(7)
    model.add_task("c", 4, head=HeadConfig(hidden=(6,)))
    torch.manual_seed(7)
    alone = TimmMultiTaskModel(name, {"a": 1}, image_size=NAMES[name], drop_rate=0.1).double()
    assert list(model.tasks) == ["a", "b", "c"]
    assert not model.heads["c"].training
    assert {p.dtype for p in model.heads["c"].parameters()} == {torch.float64}
    assert len(model.heads["c"]) == len(alone.heads["a"]) - 1 + 2  # no Flatten, a hidden layer with its dropout
    found = logits(model, name)
    assert_same({task: found[task] for task in "ab"}, outputs)
    assert list(found["c"].shape) == [3, 4]
    assert_same({key: value for key, value in state(model).items() if ".c." not in key}, before)
    model.save(tmp_path)
    again = TimmMultiTaskModel.from_pretrained(tmp_path)
    assert again.head_configs == model.head_configs
    assert_same(logits(again, name), found)
    # Before and after, both ways.
    fresh = built(name, drop_rate=0.1)
    fresh.load_state_dict(state(model), tasks="common")
    assert_same(logits(fresh, name), outputs)
    new = state(model.heads["c"])
    model.heads["a"][-2].weight.data.zero_()
    model.load_state_dict(before, tasks="common")
    assert_same(logits(model, name), found)
    assert_same(state(model.heads["c"]), new)
    model.remove_task("c")
    assert_same(state(model), before)
    assert list(model.tasks) == ["a", "b"]


def test_it_begins_as_the_others_did() -> None:
    torch.manual_seed(3)
    model = built("test_convnext", ["a"])
    torch.manual_seed(5)
    model.add_task("c")
    torch.manual_seed(5)
    expected = nn.Linear(model.backbone.layout.channels, 1)
    found = dict(model.heads["c"].named_parameters())
    assert_close = torch.testing.assert_close
    assert_close(found["1.weight"], expected.weight.double())
    assert isinstance(model.heads["c"][0], nn.LayerNorm)
    assert_same(state(model.heads["c"][0]), state(model.backbone.pooled_norm()))


@pytest.mark.parametrize("heads", [{"a": 1, "b": 3}, {"a": HeadConfig(pooling="max"), "b": HeadConfig(3)}])
def test_the_regularizer_takes_it_too(heads: Any) -> None:
    model = built(heads=heads)
    regularizer = model.regularizer(strength=1.0, metric="l1")
    model.add_task("c", 2, head=HeadConfig(hidden=(4,)), regularizer=regularizer)
    assert list(regularizer.tasks) == list(model.tasks) == ["a", "b", "c"]
    model.train()
    model(images())
    found = regularizer()
    regularizer.remove()
    relations = RelationWeights(3, "fixed", matrix=regularizer.relations.matrix())
    fresh = model.regularizer(strength=1.0, metric="l1", relations=relations)
    model(images())
    torch.testing.assert_close(fresh(), found, rtol=1e-12, atol=1e-12)
    assert found > 0
    model.remove_task("a", regularizer=fresh)
    assert fresh.tasks == model.tasks == ("b", "c")
    model(images())
    assert fresh() > 0


def test_heads_that_are_left_pool_by_themselves(tmp_path: Path) -> None:
    model = built(heads={"a": HeadConfig(pooling="max"), "b": 3, "d": HeadConfig(hidden=(4,))})
    model.remove_task("a")
    expected = logits(model)
    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pools_apart"] is True
    again = TimmMultiTaskModel.from_pretrained(tmp_path)
    assert_same(logits(again), expected)
    assert again.channel_axis == model.channel_axis
    assert list(again.state_dict()) == list(model.state_dict())
    again.add_task("e", HeadConfig(pooling="max"))
    again.save(tmp_path)
    assert "pools_apart" not in json.loads((tmp_path / "config.json").read_text())
    assert_same(logits(TimmMultiTaskModel.from_pretrained(tmp_path)), logits(again))


def test_the_others_can_be_frozen() -> None:
    model = built()
    model.freeze_backbone("layer1")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.train()
    regularizer = model.regularizer(strength=1.0)
    model.add_task("c", freeze_others=True, regularizer=regularizer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    before = state(model)
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        loss = sum(output.square().mean() for output in model(images()).values())
        (loss + regularizer()).backward()
        optimizer.step()
    moved = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert moved == {f"heads.c.{name}" for name in model.heads["c"].state_dict()}
    model.add_task("d", freeze_others=True, regularizer=regularizer)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"heads.d.{name}" for name, _ in model.heads["d"].named_parameters()
    }
    model.unfreeze_others()
    new = {name for name, _ in model.named_parameters() if name.startswith(("heads.c.", "heads.d."))}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable | new
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(m.training for m in norms)
    with pytest.raises(ConfigurationError, match="no task is trained alone"):
        model.unfreeze_others()
    # Who goes alone lets the others go on.
    model.freeze_others("d")
    model.remove_task("d", regularizer=regularizer)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        name for name in trainable | new if not name.startswith("heads.d.")
    }


def test_the_optimizer_takes_the_groups_of_the_new_head() -> None:
    model = built()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.05, backbone_rate_factor=0.1))
    model.add_task("c", head=HeadConfig(hidden=(4,)))
    groups = parameter_groups(model, 1e-3, 0.05, backbone_rate_factor=0.1, task="c")
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("heads", 1e-3, 0.05),
        ("heads, no weight decay", 1e-3, 0.0),
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(model.heads["c"].parameters()))
    for group in groups:
        optimizer.add_param_group(group)
    with pytest.raises(TaskError, match="has no task 'x'"):
        parameter_groups(model, 1e-3, task="x")


@pytest.mark.parametrize(
    ("action", "kind", "words"),
    [
        (lambda m: m.add_task("a"), TaskError, "there is a task 'a' already"),
        (lambda m: m.add_task("a.b"), TaskError, "cannot name a head"),
        (lambda m: m.add_task("c", HeadConfig(pooling="max")), ConfigurationError, "would have to pool by 'max'"),
        (lambda m: m.add_task("c", HeadConfig(pooling="token")), ConfigurationError, "would have to pool by 'token'"),
        (lambda m: m.remove_task("c"), TaskError, "there is no task 'c' to remove"),
        (lambda m: m.freeze_others("c"), TaskError, "there is no task 'c' to train alone"),
        (lambda m: m.remove_task("a"), ConfigurationError, "a regularizer or surgery is attached to the head of 'a'"),
        (lambda m: m.load_state_dict({}, tasks="some"), ConfigurationError, "tasks"),
        (lambda m: m.load_state_dict({"heads.x.0.weight": torch.ones(1)}), StateMismatchError, "it lacks ['a', 'b']"),
        (lambda m: m.load_state_dict({}, tasks="common"), StateMismatchError, "of which this model has none"),
        (
            lambda m: m.load_state_dict({"heads.a.0.weight": torch.ones(1)}, tasks="common"),
            StateMismatchError,
            "of what both models should have the state dict lacks",
        ),
    ],
)
def test_refusals_change_nothing(action: Any, kind: type[Exception], words: str) -> None:
    model = built()
    regularizer = model.regularizer(strength=1.0)
    before, configs = state(model), dict(model.head_configs)
    with pytest.raises(kind) as caught:
        action(model)
    assert words in str(caught.value)
    assert_same(state(model), before)
    assert model.head_configs == configs
    model.train()(images())
    assert regularizer() > 0


def test_what_the_regularizer_refuses_changes_nothing() -> None:
    model, other = built(), built()
    regularizer = other.regularizer(strength=1.0)
    before = state(model)
    with pytest.raises(ConfigurationError, match="is attached to no head of this model"):
        model.add_task("c", regularizer=regularizer)
    with pytest.raises(ConfigurationError, match="is attached to no head of this model"):
        model.remove_task("a", regularizer=regularizer)
    with pytest.raises(WrongTypeError, match="must be a SaliencyRegularizer, found str"):
        model.add_task("c", regularizer="mine")
    own = SaliencyRegularizer(model, {"a": "heads.a", "c": "heads.b"}, strength=1.0)
    with pytest.raises(TaskError, match="there is a task 'c' already"):
        model.add_task("c", regularizer=own)
    assert model.tasks == ("a", "b")
    assert_same(state(model), before)
    with pytest.raises(TaskError, match="one task would be left"):
        other.remove_task("a", regularizer=regularizer)
    assert other.tasks == ("a", "b")
    with pytest.raises(TaskError, match="is the only task"):
        built(heads=["a"]).remove_task("a")
