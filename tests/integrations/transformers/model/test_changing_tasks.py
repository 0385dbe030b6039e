"""Tasks that come and go on a multi-task model: weights that are there stay, saved and loaded as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights
from saliency_reg.errors import ConfigurationError, StateMismatchError, TaskError
from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel
from tests.integrations.transformers.tiny import HEADS, batch, built

from .support import CLOSE, assert_all_close


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def logits(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.eval()(**batch()).logits


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_head_comes_and_goes(tmp_path: Path) -> None:
    model = built("mean")
    twin = MultiTaskModel(model.config)
    before, outputs, config = state(model), logits(model), model.config
    model.add_task("anger", 5, head=HeadConfig(hidden=(200,)))
    assert model.tasks == model.config.tasks == (*config.tasks, "anger")
    assert twin.config is config
    assert config.tasks == twin.tasks == tuple(HEADS["mean"])
    first = model.heads["anger"].layers[0]
    assert first.weight.dtype == torch.float64
    assert float(first.weight.detach().std()) == pytest.approx(0.3, rel=0.1)  # initializer_range
    assert not first.bias.any()
    found = logits(model)
    assert_same({task: found[task] for task in outputs}, outputs)
    assert list(found["anger"].shape) == [3, 5]
    model.save_pretrained(tmp_path)
    again = MultiTaskModel.from_pretrained(tmp_path)
    assert again.tasks == model.tasks
    assert again.head_configs == model.head_configs
    assert_all_close(logits(again.double()), found)
    # Before and after, both ways.
    after = state(model)
    fresh = built("mean", seed=9)
    fresh.load_state_dict(after, tasks="common")
    assert_same(logits(fresh), outputs)
    with pytest.raises(StateMismatchError, match=r"it lacks \[\] and has \['anger'\] without a place"):
        fresh.load_state_dict(after)
    with pytest.raises(StateMismatchError, match=r"it lacks \['anger'\].*tasks='common'"):
        model.load_state_dict(before)
    model.heads["joy"].layers[0].weight.data.zero_()
    model.load_state_dict(before, tasks="common")
    assert_same(state(model), after)
    model.remove_task("anger")
    assert_same(state(model), before)
    assert model.config.tasks == config.tasks


#: Heads of the model, the new one, and options of the regularizer.
ADDED: dict[str, tuple[str, HeadConfig, dict[str, Any]]] = {
    "on sequences": ("mean", HeadConfig(3, problem="multi_label", hidden=(4,)), {}),
    "a regression": ("mean", HeadConfig(2, problem="regression", hidden=(4,)), {"scalarize": "max"}),
    "on tokens": ("mixed", HeadConfig(level="token", hidden=(4,)), {}),
    "at a layer": ("token", HeadConfig(level="token", hidden=(4,)), {"feature": "encoder.encoder.layer.0"}),
    "of its own pooling": ("poolings", HeadConfig(3, hidden=(4,), pooling="first"), {"scalarize": "logsumexp"}),
}


@pytest.mark.parametrize("case", list(ADDED))
@pytest.mark.parametrize("by_model", [True, False])
def test_the_regularizer_is_as_one_that_is_built_now(case: str, by_model: bool) -> None:
    heads, config, options = ADDED[case]
    options = {"strength": 1.0, "metric": "l1", **options}
    model = built(heads)
    regularizer = model.regularizer(**options)
    if by_model:
        model.add_task("new", config, regularizer=regularizer)
    else:
        model.add_task("new", config)
        regularizer.add_task("new")
    for gone in (None, model.tasks[0]):
        if gone is not None:
            model.remove_task(gone, regularizer=regularizer)
        assert regularizer.tasks == model.tasks
        model(**batch())
        found = regularizer()
        matrix = regularizer.relations.matrix()
        twin = built(dict(model.head_configs.items()))
        twin.load_state_dict(model.state_dict())
        fresh = twin.regularizer(relations=RelationWeights(len(matrix), "fixed", matrix=matrix), **options)
        twin(**batch())
        torch.testing.assert_close(found, fresh(), **CLOSE)
        assert found > 0


def test_the_others_can_be_frozen() -> None:
    model = built("mean").train()
    regularizer = model.regularizer(strength=1.0)
    model.add_task("anger", freeze_others=True, regularizer=regularizer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    before = state(model)
    output = model(**batch(), labels={"anger": torch.tensor([1.0, 0.0, 1.0]), "joy": torch.tensor([1.0, 0.0, 1.0])})
    (output.loss + regularizer()).backward()
    optimizer.step()
    moved = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert moved == {f"heads.anger.{name}" for name in model.heads["anger"].state_dict()}
    model.unfreeze_others()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_refusals_change_nothing() -> None:
    model = built("mean")
    regularizer = model.regularizer(strength=1.0)
    before, config = state(model), model.config
    for action, kind, words in (
        (lambda: model.add_task("joy"), TaskError, "there is a task 'joy' already"),
        (lambda: model.add_task("a.b"), TaskError, "cannot name a head"),
        (lambda: model.add_task("x", HeadConfig(level="token")), ConfigurationError, "would have to pool by 'none'"),
        (lambda: model.add_task("x", HeadConfig(pooling="first")), ConfigurationError, "share a pooling|read what was"),
        (lambda: model.add_task("x", HeadConfig(pooling="pooler")), ConfigurationError, "share no feature map"),
        (lambda: model.remove_task("x"), TaskError, "there is no task 'x' to remove"),
        (lambda: model.remove_task("joy"), ConfigurationError, "is attached to the head of 'joy'"),
    ):
        with pytest.raises(kind, match=words):
            action()
    assert_same(state(model), before)
    assert model.config is config
    model.train()(**batch())
    assert regularizer() > 0
